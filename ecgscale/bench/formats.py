"""Lossless codecs for int16 recordings side by side: bytes, encoding and decoding.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from ecgscale.bench.measure import Round, interleaved, timed
from ecgscale.data.payload import decode, encode
from ecgscale.record import Counts

PCO, NPY, FLAC = "pco", "npy", "FLAC, 2 x 6 leads"
_FLAC_HZ = 500  # written into the file, and without effect on its bytes


@dataclass(frozen=True)
class Codec:
    """Signal (L, T) to bytes and back."""

    encode: Callable[[Counts], Any]
    decode: Callable[[Any], Counts]
    size: Callable[[Any], int] = len


@dataclass(frozen=True)
class Measured:
    """What a codec makes of some records."""

    ratio: float  # bytes over those of the int16 samples
    encoding: list[Round]  # units: records
    decoding: list[Round]


def codecs() -> dict[str, Codec]:
    """Those that are installed here."""
    found = {
        PCO: Codec(lambda signal_LT: encode(signal_LT, "pco")[0], decode),
        NPY: Codec(
            lambda signal_LT: encode(signal_LT, "npy")[0],
            lambda content: np.load(io.BytesIO(content), allow_pickle=False),
        ),
    }
    with suppress(ImportError, OSError):  # OSError: without the library that it binds
        found[FLAC] = _flac(import_module("soundfile"))
    with suppress(ImportError):
        found["zstd 3"] = _zstd(import_module("zstandard"))
    return found


def _zstd(zstandard: Any) -> Codec:
    return Codec(
        lambda signal_LT: (signal_LT.shape, zstandard.compress(signal_LT.tobytes())),
        lambda coded: np.frombuffer(zstandard.decompress(coded[1]), np.int16).reshape(coded[0]),
        lambda coded: len(coded[1]),
    )


def _flac(soundfile: Any) -> Codec:
    """FLAC takes eight channels at most, so twelve leads are two files, as in WFDB's format 516."""

    def coded(signal_LT: Counts) -> list[bytes]:
        files = []
        for part_LT in (signal_LT[:6], signal_LT[6:]):
            file = io.BytesIO()
            soundfile.write(file, part_LT.T, _FLAC_HZ, format="FLAC", subtype="PCM_16")
            files.append(file.getvalue())
        return files

    def decoded(files: list[bytes]) -> Counts:
        parts = [soundfile.read(io.BytesIO(file), dtype="int16")[0].T for file in files]
        return np.concatenate(parts)

    return Codec(coded, decoded, lambda files: sum(map(len, files)))


def measure(signals: list[Counts], rounds: int, seconds: float) -> dict[str, Measured]:
    """Encode and decode all signals with every codec, and check that they come back."""
    found = codecs()
    coded = {name: [codec.encode(signal_LT) for signal_LT in signals] for name, codec in found.items()}
    for name, codec in found.items():
        for content, signal_LT in zip(coded[name], signals, strict=True):
            assert np.array_equal(codec.decode(content), signal_LT), name
    size = sum(signal_LT.nbytes for signal_LT in signals)

    def over_all(work: Callable[[Any], Any], items: list[Any]) -> Callable[[], Round]:
        def one_pass() -> int:
            for item in items:
                work(item)
            return len(items)

        return lambda: timed(one_pass, seconds)

    encoding = interleaved({n: over_all(c.encode, signals) for n, c in found.items()}, rounds, "encoding")
    decoding = interleaved({n: over_all(c.decode, coded[n]) for n, c in found.items()}, rounds, "decoding")
    return {
        name: Measured(sum(map(codec.size, coded[name])) / size, encoding[name], decoding[name])
        for name, codec in found.items()
    }
