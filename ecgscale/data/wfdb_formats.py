"""Bytes of WFDB data files: how much a file can hold, and its raw samples, block by block.

A day of twelve leads is a gigabyte: nothing here holds more than the samples that are wanted, in 16 bits where the
format has no more, and one block. The formats are those of signal(5) of the WFDB Applications Guide.

Shape suffixes: F frames, W samples of a frame over all signals, T samples.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.data.wfdb_header import SignalLine
from ecgscale.errors import InputError

Integers = npt.NDArray[np.integer]

_BLOCK_VALUES = 1 << 20
PADDING = 2  # the most values that fill up a pair or triplet at a file's end
_FRAMES_APART = 6  # blocks begin at whole pairs (212) and triplets (310, 311) whatever the number of signals
_FLAC_SAMPLES_PER_BYTE = 65_535 / 8  # the most that a FLAC file can hold: one constant block in some 10 bytes


_MAT_HEADER = struct.Struct("<5i")  # type, rows, columns, imaginary, bytes of the name that follows
_LONGEST_MAT_NAME = 64
# Numbers of MATLAB's version 4, little-endian, and the format of WFDB that they are.
_MAT_TYPES = {0: ("double", ""), 10: ("single", ""), 20: ("int32", "32"), 30: ("int16", "16"), 40: ("uint16", "160")}
_MAT_TYPES |= {50: ("uint8", "80")}


class Format(NamedTuple):
    """How a format packs its samples."""

    bytes_per_sample: Fraction  # 0 for FLAC, whose bytes say nothing
    bits: int | None  # the lowest number of so many bits marks an invalid sample; None: the format has no such mark
    dtype: type[np.int16 | np.int32]  # that holds all its samples


FORMATS = {
    "8": Format(Fraction(1), None, np.int32),  # differences
    "16": Format(Fraction(2), 16, np.int16),
    "24": Format(Fraction(3), 24, np.int32),
    "32": Format(Fraction(4), 32, np.int32),
    "61": Format(Fraction(2), 16, np.int16),
    "80": Format(Fraction(1), 8, np.int16),
    "160": Format(Fraction(2), 16, np.int16),
    "212": Format(Fraction(3, 2), 12, np.int16),
    "310": Format(Fraction(4, 3), 10, np.int16),
    "311": Format(Fraction(4, 3), 10, np.int16),
    "508": Format(Fraction(0), 8, np.int16),
    "516": Format(Fraction(0), 16, np.int16),
    "524": Format(Fraction(0), 24, np.int32),
}
FLAC_FORMATS = ("508", "516", "524")


def frames_in(path: Path, lines: Sequence[SignalLine]) -> int:
    """The most frames that a data file with these signals can hold, judged by its size.

    Raises InputError for a missing file, an unknown format, and signals that cannot share a file.
    """
    first = lines[0]
    if any((line.format, line.byte_offset) != (first.format, first.byte_offset) for line in lines):
        raise InputError("signals of one file with unequal formats or offsets; they must be equal")
    if first.format not in FORMATS:
        raise InputError(f"format {first.format!r} is unknown; known are {' '.join(FORMATS)}")
    if not path.is_file():
        raise InputError("no such data file")
    size = path.stat().st_size
    if path.suffix.lower() == ".mat" and (in_mat := _mat_frames(path, first, _width(lines))) is not None:
        size = min(size, first.byte_offset + in_mat * _n_bytes(first.format, _width(lines)))
    if first.format in FLAC_FORMATS:
        return max(0, _flac_samples(path, size) - first.byte_offset) // first.samples_per_frame
    width = _width(lines)
    n_frames = max(0, math.floor((size - first.byte_offset) / (FORMATS[first.format].bytes_per_sample * width)))
    while n_frames and _n_bytes(first.format, n_frames * width) > size - first.byte_offset:
        n_frames -= 1
    return n_frames


def _mat_frames(path: Path, line: SignalLine, width: int) -> int | None:
    """Columns of a MATLAB file of version 4, by its own header; None for raw samples that are only called so.

    Raises InputError where it is not what the WFDB header takes it for: the samples would be read shifted.
    """
    with path.open("rb") as file:
        head = file.read(_MAT_HEADER.size)
    if head.startswith(b"MATLAB"):
        raise InputError("a MATLAB file of version 5 or later, which no WFDB format is; save it as version 4, of int16")
    numbers: tuple[int, ...] = _MAT_HEADER.unpack(head.ljust(_MAT_HEADER.size, b"\xff"))
    kind, rows, columns, imaginary, name_length = numbers
    if kind not in _MAT_TYPES or imaginary not in (0, 1) or not 0 < name_length <= _LONGEST_MAT_NAME:
        if line.byte_offset:
            raise InputError(f"no MATLAB file of version 4, although samples begin at byte {line.byte_offset}; damaged")
        return None
    name, format_ = _MAT_TYPES[kind]
    if imaginary or format_ != line.format:
        raise InputError(f"a MATLAB file of {'complex ' * imaginary}{name}; the header says format {line.format}")
    if rows != width:
        hint = ": it is transposed" if columns == width else ""
        raise InputError(f"a MATLAB file of {rows} rows and {columns} columns; the header says {width} signals{hint}")
    if (begin := _MAT_HEADER.size + name_length) != line.byte_offset:
        raise InputError(f"samples begin at byte {begin} of the MATLAB file; the header says {line.byte_offset}")
    return columns


def _n_bytes(format_: str, n_values: int) -> int:
    """Bytes that so many samples take. The second one of a triplet of 310 reaches into its fourth byte."""
    return math.ceil(n_values * FORMATS[format_].bytes_per_sample) + (format_ == "310" and n_values % 3 == 2)


def _width(lines: Sequence[SignalLine]) -> int:
    return sum(line.samples_per_frame for line in lines)


def _flac_samples(path: Path, size: int) -> int:
    """Samples per channel by the FLAC file's own header (STREAMINFO), checked against its size."""
    with path.open("rb") as file:
        head = file.read(42)
    if len(head) < 42 or head[:4] != b"fLaC":
        raise InputError("not a FLAC file, or one that ends in its header")
    n_samples = int.from_bytes(head[21:26], "big") & ((1 << 36) - 1)
    if n_samples > size * _FLAC_SAMPLES_PER_BYTE:
        raise InputError(f"{n_samples} samples in {size} bytes; FLAC cannot pack so many")
    return n_samples


def frame_blocks(n_frames: int, lines: Sequence[SignalLine]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive frames that are read at once."""
    step = _FRAMES_APART * max(1, _BLOCK_VALUES // (_FRAMES_APART * _width(lines)))
    for first in range(0, n_frames, step):
        yield first, min(first + step, n_frames)


def empty_samples(lines: Sequence[SignalLine], n_frames: int) -> list[Integers]:
    """Room for all samples of some signals, (T,) each."""
    return [np.empty(n_frames * line.samples_per_frame, FORMATS[line.format].dtype) for line in lines]


def read_file(path: Path, lines: Sequence[SignalLine], n_frames: int) -> Iterator[tuple[int, int, Integers]]:
    """(first frame, last + 1, samples (F, W)) of a data file that is not FLAC, block by block.

    Raises InputError where it ends before.
    """
    format_ = lines[0].format
    width = _width(lines)
    with path.open("rb") as file:
        file.seek(lines[0].byte_offset)
        decode = _Differences(lines) if format_ == "8" else _DECODERS[format_]
        for first, stop in frame_blocks(n_frames, lines):
            n_values = (stop - first) * width
            packed = _bytes(file, _n_bytes(format_, n_values))
            yield first, stop, decode(packed)[:n_values].reshape(-1, width)


def _bytes(file: IO[bytes], n_bytes: int) -> npt.NDArray[np.uint8]:
    packed = np.fromfile(file, np.uint8, n_bytes)
    if packed.size < n_bytes:
        raise InputError(f"truncated: {n_bytes - packed.size} bytes are missing")
    return packed


# --- formats ---


def _padded(packed: npt.NDArray[np.uint8], multiple: int) -> npt.NDArray[np.uint8]:
    """The last pair or triplet may be cut off behind its last sample."""
    rest = -packed.size % multiple
    return np.concatenate([packed, np.zeros(rest, np.uint8)]) if rest else packed


def _signed(value_T: Integers, bits: int) -> npt.NDArray[np.int16]:
    """Two's complement of so many bits."""
    sign = 1 << (bits - 1)
    signed: npt.NDArray[np.int16] = (value_T.astype(np.int16) ^ sign) - np.int16(sign)
    return signed


def _decode_24(packed: npt.NDArray[np.uint8]) -> Integers:
    wide = np.zeros((packed.size // 3, 4), np.uint8)
    wide[:, 1:] = packed.reshape(-1, 3)  # in the upper bytes, so that the shift extends the sign
    return wide.reshape(-1).view("<i4") >> 8


def _decode_212(packed: npt.NDArray[np.uint8]) -> Integers:
    low, middle, high = _padded(packed, 3).reshape(-1, 3).astype(np.int16).T
    return _signed(np.stack([low | (middle & 0x0F) << 8, high | (middle >> 4) << 8], axis=1).reshape(-1), 12)


def _decode_310(packed: npt.NDArray[np.uint8]) -> Integers:
    first, second = _padded(packed, 4).view("<u2").reshape(-1, 2).T
    third = first >> 11 | (second >> 11) << 5
    return _signed(np.stack([first >> 1 & 0x3FF, second >> 1 & 0x3FF, third], axis=1).reshape(-1), 10)


def _decode_311(packed: npt.NDArray[np.uint8]) -> Integers:
    word = _padded(packed, 4).view("<u4")
    return _signed(np.stack([word & 0x3FF, word >> 10 & 0x3FF, word >> 20 & 0x3FF], axis=1).reshape(-1), 10)


_DECODERS = {
    "16": lambda packed: packed.view("<i2"),
    "24": _decode_24,
    "32": lambda packed: packed.view("<i4"),
    "61": lambda packed: packed.view(">i2"),
    "80": lambda packed: packed.astype(np.int16) - np.int16(128),
    "160": lambda packed: (packed.view("<u2") ^ 0x8000).view("<i2"),
    "212": _decode_212,
    "310": _decode_310,
    "311": _decode_311,
}


class _Differences:
    """Format 8: each block goes on from the last samples of the one before."""

    def __init__(self, lines: Sequence[SignalLine]) -> None:
        self._columns = [line.samples_per_frame for line in lines]
        self._last = [line.initial_value for line in lines]
        if beyond := [value for value in self._last if abs(value) >= 1 << 31]:
            raise InputError(f"initial value {beyond[0]}; it must fit into 32 bits")

    def __call__(self, packed: npt.NDArray[np.uint8]) -> Integers:
        step_FW = packed.view(np.int8).reshape(-1, sum(self._columns))
        value_FW = np.empty(step_FW.shape, np.int32)
        end = 0
        for i, width in enumerate(self._columns):
            begin, end = end, end + width
            value_T = step_FW[:, begin:end].reshape(-1).cumsum(dtype=np.int64) + self._last[i]
            if np.abs(value_T).max(initial=0) >= 1 << 31:
                raise InputError("its differences add up to more than 32 bits; damaged")
            value_FW[:, begin:end] = value_T.reshape(-1, width)
            self._last[i] = int(value_T[-1])
        return value_FW.reshape(-1)
