"""Samples of a WFDB record: what its data files can hold, and from raw samples to counts in canonical leads.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ecgscale.data.wfdb_header import SignalLine
from ecgscale.errors import InputError
from ecgscale.record import source_leads

# header(5), signal(5): format -> (bytes per sample, bits per sample). FLAC's bytes say nothing. Format 8
# holds differences and so has no code for an invalid sample.
FORMATS = {
    "8": (1.0, None),
    "16": (2.0, 16),
    "24": (3.0, 24),
    "32": (4.0, 32),
    "61": (2.0, 16),
    "80": (1.0, 8),
    "160": (2.0, 16),
    "212": (1.5, 12),
    "310": (4 / 3, 10),
    "311": (4 / 3, 10),
    "508": (0.0, 8),
    "516": (0.0, 16),
    "524": (0.0, 24),
}
INT16_FORMATS = {"16": "<i2", "61": ">i2"}
_NO_RENAMES: Mapping[str, str] = {}
FLAC_FORMATS = ("508", "516", "524")
_FLAC_SAMPLES_PER_BYTE = 65_535 / 8  # the most that a FLAC file can hold: one constant block in some 10 bytes


@dataclass(frozen=True)
class Signals:
    """Leads of a record or a segment."""

    leads: tuple[str, ...]  # canonical names, in the order of the header
    counts_LT: npt.NDArray[np.int64]  # baseline subtracted
    valid_LT: npt.NDArray[np.bool_]
    mv_per_count_L: npt.NDArray[np.float64]
    rate_hz: float


def by_file(lines: Sequence[SignalLine]) -> dict[str, list[SignalLine]]:
    """Signals by data file; raises InputError where those of one file do not stand together."""
    groups: dict[str, list[SignalLine]] = {}
    previous = None
    for line in lines:
        if line.file_name in groups and line.file_name != previous:
            # wfdb takes the signals of a file for neighbours and would mix them up.
            raise InputError(f"signals of {line.file_name} do not stand together; a file's signals must")
        groups.setdefault(line.file_name, []).append(line)
        previous = line.file_name
    return groups


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
    if first.format in FLAC_FORMATS:
        return max(0, _flac_samples(path, size) - first.byte_offset) // first.samples_per_frame
    bytes_per_frame = FORMATS[first.format][0] * sum(line.samples_per_frame for line in lines)
    return max(0, int((size - first.byte_offset) / bytes_per_frame))


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


def read_int16(
    folder: Path, lines: Sequence[SignalLine], wanted: Sequence[int], n_frames: int
) -> list[npt.NDArray[np.integer]]:
    """Raw samples of some of a header's signals, all of interleaved int16 (INT16_FORMATS)."""
    samples: list[npt.NDArray[np.integer]] = []
    frames: dict[str, npt.NDArray[np.int16]] = {}
    for i in wanted:
        file_name = lines[i].file_name
        width = sum(line.samples_per_frame for line in lines if line.file_name == file_name)
        if file_name not in frames:
            dtype, offset = INT16_FORMATS[lines[i].format], lines[i].byte_offset
            flat = np.fromfile(folder / file_name, dtype, count=n_frames * width, offset=offset)
            frames[file_name] = flat.reshape(n_frames, width)
        start = sum(line.samples_per_frame for line in lines[:i] if line.file_name == file_name)
        samples.append(frames[file_name][:, start : start + lines[i].samples_per_frame].reshape(-1))
    return samples


def to_signals(
    lines: Sequence[SignalLine],
    samples: Sequence[npt.NDArray[np.integer]],
    rate_hz: float,
    renames: Mapping[str, str] = _NO_RENAMES,
) -> Signals:
    """Raw samples in the order of their file -> leads, aligned and without their baseline."""
    leads = source_leads([line.name for line in lines], renames)
    mv_per_count_L = np.array([line.mv_per_count() for line in lines])
    counts_LT = np.stack([sample_T.astype(np.int64) for sample_T in samples])
    valid_LT = np.ones(counts_LT.shape, bool)
    for line, count_T, valid_T in zip(lines, counts_LT, valid_LT, strict=True):
        bits = FORMATS[line.format][1]
        if bits is not None:
            valid_T[:] = count_T != -(1 << (bits - 1))
        count_T -= line.baseline
        lag = min(line.skew * line.samples_per_frame, len(count_T))
        if lag:
            for array in (count_T, valid_T):
                array[:-lag] = array[lag:].copy()
            valid_T[-lag:] = False  # the file ends before the lagging signal does
    return Signals(leads, counts_LT, valid_LT, mv_per_count_L, rate_hz)


def check_sums(lines: Sequence[SignalLine], samples: Sequence[npt.NDArray[np.integer]]) -> None:
    """Raises InputError where a header's checksum is not that of the samples (in the order of their file)."""
    for line, sample_T in zip(lines, samples, strict=True):
        found = int(sample_T.sum(dtype=np.int64)) % 65_536
        if line.checksum is not None and line.checksum % 65_536 != found:
            raise InputError(
                f"checksum of signal {line.name!r}: the header says {line.checksum % 65_536}, "
                f"the data give {found}; the data are damaged"
            )


def join(pieces: Sequence[tuple[int, Signals | None]], frame_rate_hz: float) -> Signals:
    """Segments, (frames, signals or None for a gap), one after the other. A missing lead is invalid there."""
    present = [signals for _, signals in pieces if signals is not None]
    if not present:
        raise InputError("no segment with samples; at least one is needed")
    rates_hz = sorted({signals.rate_hz for signals in present})
    if len(rates_hz) > 1:
        raise InputError(f"segments of {rates_hz[0]:g} Hz and {rates_hz[1]:g} Hz; one rate is needed")
    scales: dict[str, float] = {}
    for signals in present:
        for lead, scale in zip(signals.leads, signals.mv_per_count_L.tolist(), strict=True):
            if scales.setdefault(lead, scale) != scale:
                raise InputError(f"lead {lead} has {scales[lead]:g} and {scale:g} mV per count; one gain is needed")
    leads = tuple(scales)
    per_frame = round(rates_hz[0] / frame_rate_hz)
    counts_LT = np.zeros((len(leads), per_frame * sum(n_frames for n_frames, _ in pieces)), np.int64)
    valid_LT = np.zeros(counts_LT.shape, bool)
    start = 0
    for n_frames, piece in pieces:
        stop = start + per_frame * n_frames
        if piece is not None:
            rows = [leads.index(lead) for lead in piece.leads]
            counts_LT[rows, start:stop] = piece.counts_LT
            valid_LT[rows, start:stop] = piece.valid_LT
        start = stop
    return Signals(leads, counts_LT, valid_LT, np.array(list(scales.values())), rates_hz[0])


def fill_invalid(signals: Signals, max_fraction: float) -> tuple[npt.NDArray[np.int64], int]:
    """-> (counts with invalid samples interpolated along the lead, how many they are).

    Raises InputError for a lead of which more than ``max_fraction``, or all, is invalid.
    """
    n_samples = signals.valid_LT.shape[1]
    n_invalid_L = n_samples - signals.valid_LT.sum(axis=1)
    filled_LT = signals.counts_LT.copy()
    for i in np.flatnonzero(n_invalid_L):
        if n_invalid_L[i] > max_fraction * n_samples or n_invalid_L[i] == n_samples:
            raise InputError(
                f"lead {signals.leads[i]}: {n_invalid_L[i]} of {n_samples} samples are marked invalid; "
                f"at most {max_fraction:.3%} may be"
            )
        valid_T = signals.valid_LT[i]
        at = np.flatnonzero(~valid_T)
        filled_LT[i, at] = np.rint(np.interp(at, np.flatnonzero(valid_T), signals.counts_LT[i, valid_T]))
    return filled_LT, int(n_invalid_L.sum())
