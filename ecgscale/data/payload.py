"""int16 samples <-> the bytes of a shard's payload member, plain (``.npy``) or losslessly compressed (``.pco``).

A ``.pco`` member is a header and blocks of at most BLOCK samples in time, so that a window of a long recording costs
one or two blocks. The header holds the length and the xxh3-64 of each block; a block is what pcodec makes of its
(leads, samples) numbers in C order, with first-order differences. All numbers are little-endian::

    magic "ECGp" | uint32 leads | uint32 samples | uint32 samples per block | per block: uint32 bytes, uint64 xxh3-64

Compression level 7 of 12 makes 0.5 % more bytes than pcodec's default, 8, and is read 2.5 % faster; 6 makes another 1 %
more for 1.5 %, 10 makes 0.3 % fewer than 8 and is read 20 % slower.

Tried and left out, on the acceptable records of CinC 2011 set A: second-order differences (7 % larger), pcodec's
convolutions (6 times slower to read), one chunk per lead (1 % larger, 1.5 times slower), Einthoven's and Goldberger's
equations to predict four of the twelve leads (5 to 10 % smaller, but only where the recorder had derived them).

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import io
import re
import struct
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.standalone import simple_compress, simple_decompress_into
from xxhash import xxh3_64_intdigest

from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import Counts

Payload = Literal["pco", "npy"]
PAYLOADS: tuple[Payload, ...] = ("pco", "npy")
BLOCK = 8192  # samples: a 10-second recording at 500 Hz is one block

_MAGIC = b"ECGp"
_HEAD = struct.Struct("<4sIII")
_ENTRY = np.dtype([("bytes", "<u4"), ("xxh3", "<u8")])
_ONE = struct.Struct("<IQ")  # the same, where there is one block
_ONE_BLOCK_HEAD = _HEAD.size + _ONE.size
_CODEC = ChunkConfig(compression_level=7, delta_spec=DeltaSpec.try_consecutive(1), mode_spec=ModeSpec.classic())

_NPY_LIMIT_BYTES = 4096  # of an .npy header: numpy's take 128
_NPY_FIELD = re.compile(rb"'(descr|fortran_order|shape)': *('[^']*'|[A-Za-z]+|\([0-9, ]*\)|\[.*\])")

Bytes = npt.NDArray[np.uint8]


def encode(signal_LT: Counts, payload: Payload) -> tuple[bytes, int]:
    """The member's bytes, and the xxh3-64 that its reader checks: of a whole ``.npy``, of the header of a ``.pco``."""
    if payload == "npy":
        values_LT = np.ascontiguousarray(signal_LT)
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(values_LT))
        content = b"".join((buffer.getvalue(), values_LT.data.cast("B")))  # one copy: a day's recording is a gigabyte
        return content, xxh3_64_intdigest(content)
    leads, samples = signal_LT.shape
    blocks = [
        simple_compress(np.ascontiguousarray(signal_LT[:, first : first + BLOCK]).reshape(-1), _CODEC)
        for first in range(0, samples, BLOCK)
    ]
    table = np.array([(len(block), xxh3_64_intdigest(block)) for block in blocks], _ENTRY)
    header = _HEAD.pack(_MAGIC, leads, samples, BLOCK) + table.tobytes()
    return b"".join((header, *blocks)), xxh3_64_intdigest(header)


class DamagedError(InputError):
    """Bytes that differ from their checksum. Whoever knows the file names it."""


def header_bytes(samples: int) -> int:
    """Length of a ``.pco`` header."""
    return _HEAD.size + _ENTRY.itemsize * -(-samples // BLOCK)


def decode_window(
    member: Bytes, checksum: int, leads: int, samples: int, start: int, stop: int, scratch: Counts | None = None
) -> Counts:
    """Samples ``start`` to ``stop`` of a ``.pco`` member, (L, stop − start), verified. Raises DamagedError.

    The shape is the caller's word, from the index; a header that says otherwise is refused. With ``scratch``
    (leads · BLOCK numbers or more) the result may be a view of it, which the next call overwrites.
    """
    content = member.data
    if samples <= BLOCK:
        room = np.empty(leads * samples, np.int16) if scratch is None else scratch[: leads * samples]
        decode_one_block(content, checksum, leads, samples, room)
        return room.reshape(leads, samples)[:, start:stop]
    head = header_bytes(samples)
    header = bytes(content[:head])
    _check_header(header, head, checksum, leads, samples)
    table = np.frombuffer(header, _ENTRY, offset=_HEAD.size)
    end = head + np.cumsum(table["bytes"], dtype=np.int64)
    if end[-1] != member.size:
        raise DamagedError("its blocks do not fill it")
    pieces = []
    for number in range(start // BLOCK, -(-stop // BLOCK)):
        first = number * BLOCK
        block = bytes(content[int(end[number]) - int(table["bytes"][number]) : int(end[number])])
        values = np.empty(leads * min(BLOCK, samples - first), np.int16)
        _decode_block(block, int(table["xxh3"][number]), values)
        pieces.append(values.reshape(leads, -1)[:, max(0, start - first) : stop - first])
    return np.concatenate(pieces, axis=1) if pieces else np.empty((leads, 0), np.int16)


def decode_one_block(content: memoryview, checksum: int, leads: int, samples: int, values: Counts) -> None:
    """All samples of a member of one block into ``values`` (leads · samples,), verified. Raises DamagedError.

    Nearly all recordings are one block, so every call of Python counts here.
    """
    header, block = bytes(content[:_ONE_BLOCK_HEAD]), bytes(content[_ONE_BLOCK_HEAD:])
    _check_header(header, _ONE_BLOCK_HEAD, checksum, leads, samples)
    length, digest = _ONE.unpack_from(header, _HEAD.size)
    if len(block) != length:
        raise DamagedError("its blocks do not fill it")
    _decode_block(block, digest, values)


def _check_header(header: bytes, length: int, checksum: int, leads: int, samples: int) -> None:
    if xxh3_64_intdigest(header) != checksum or len(header) < length:
        raise DamagedError("its checksum differs from the index")
    if header[: _HEAD.size] != _expected_head(leads, samples):
        raise DamagedError(f"its header does not say {leads} leads of {samples} samples in blocks of {BLOCK}")


@lru_cache(maxsize=1024)
def _expected_head(leads: int, samples: int) -> bytes:
    return _HEAD.pack(_MAGIC, leads, samples, BLOCK)


def _decode_block(block: bytes, digest: int, values: Counts) -> None:
    if xxh3_64_intdigest(block) != digest:
        raise DamagedError("its checksum differs from its header")
    try:
        progress = simple_decompress_into(block, values)
    except (RuntimeError, TypeError) as error:  # what pcodec raises for bytes of another shape or type
        raise DamagedError(f"its samples cannot be read ({error})") from error
    if progress.n_processed != values.size or not progress.finished:
        raise DamagedError(f"it does not hold {values.size} numbers")


def decode(member: bytes) -> Counts:
    """The whole signal (L, T) of a ``.pco`` member, for readers other than ours, such as the webdataset library.

    Raises InputError where the bytes are no such member.
    """
    try:
        magic, leads, samples, block = _HEAD.unpack_from(member)
    except struct.error as error:
        raise InputError(f"{len(member)} bytes are no .pco member of ecgscale") from error
    if magic != _MAGIC or block != BLOCK or not 0 < leads <= len(LEADS) or not samples:
        raise InputError("not a .pco member of ecgscale")
    checksum = xxh3_64_intdigest(member[: header_bytes(samples)])
    return decode_window(np.frombuffer(member, np.uint8), checksum, leads, samples, 0, samples)


def decode_member(member: bytes, payload: Payload) -> Counts:
    """The whole signal (L, T) of a member that ``encode`` has made. Raises InputError for other bytes."""
    if payload == "pco":
        return decode(member)
    try:
        signal_LT: Counts = np.lib.format.read_array(io.BytesIO(member), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{len(member)} bytes are no .npy member of ecgscale ({error})") from error
    return signal_LT


def npy_shape(member: Bytes) -> tuple[int, int]:
    """(leads, samples) of an ``.npy`` member, by its header alone, which is matched and never evaluated.

    Raises DamagedError unless it holds int16 counts of that shape in C order, and nothing more.
    """
    start = member[:_NPY_LIMIT_BYTES].tobytes()
    long = start[6:7] != b"\1"
    first = 12 if long else 10
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\1", b"\2", b"\3") or len(start) < first:
        raise DamagedError("it is no .npy array; write it with numpy.save")
    end = first + int.from_bytes(start[8:first], "little")
    if end > len(start):
        raise DamagedError(f"its .npy header claims {end} bytes of {member.size}; write it with numpy.save")
    leads, samples = _npy_header(start[first:end])
    if end + 2 * leads * samples != member.size:
        raise DamagedError(
            f"its header says {leads} x {samples} int16 values, {member.size - end} bytes follow; write it again"
        )
    if end % 2:
        raise DamagedError("its values begin at an odd byte; write it with numpy.save")
    return leads, samples


@lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[int, int]:
    """One header after the other is the same; raises DamagedError."""
    fields = dict(_NPY_FIELD.findall(header))
    dtype = fields.get(b"descr", b"none").decode("latin-1").strip("'")
    if dtype != "<i2":
        raise DamagedError(f"its dtype is {dtype[:40]!r}, not int16 in little-endian order; write counts.astype('<i2')")
    if fields.get(b"fortran_order") != b"False":
        raise DamagedError("it stands in Fortran order; write numpy.ascontiguousarray(counts)")
    shape = fields.get(b"shape", b"").decode("latin-1")
    sizes = [int(size) for size in re.findall("[0-9]{1,20}", shape)]
    if len(sizes) != 2 or min(sizes) < 1:
        raise DamagedError(f"its shape is {shape[:40]}, not (leads, samples), with one or more of each")
    return sizes[0], sizes[1]
