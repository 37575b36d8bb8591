"""Samples of a WFDB record: from raw samples to counts in canonical leads.

Leads are handled one by one and, where they are long, piece by piece: a day of twelve leads must not need several
times its size. Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ecgscale.data.wfdb_formats import FORMATS, Integers
from ecgscale.data.wfdb_header import SignalLine
from ecgscale.errors import InputError
from ecgscale.lead_names import source_leads
from ecgscale.record import pieces

UNSUMMED = "WFDB headers with 0 for every checksum, as of programs that leave them out: damage is not noticed"

LONGER = "data files hold more samples than their headers say: the rest is left out; is the number of signals right?"

_NO_RENAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class Signals:
    """Leads of a record or a segment."""

    leads: tuple[str, ...]  # canonical names, in the order of the header
    counts_L: list[Integers]  # of each lead (T,), baseline subtracted, in the narrowest of int16, int32 and int64
    valid_L: list[npt.NDArray[np.bool_] | None]  # of each lead (T,); None: all samples are valid
    mv_per_count_L: npt.NDArray[np.float64]
    baseline_L: list[int]  # that was subtracted; of segments the first one's
    rate_hz: float
    unsummed: bool = False  # the header has zeros for checksums, in a segment at least
    longer: str = ""  # which data file holds more than the header says; "": none


def by_file(lines: Sequence[SignalLine]) -> dict[str, list[SignalLine]]:
    """Signals by data file; raises InputError where those of one file do not stand together."""
    groups: dict[str, list[SignalLine]] = {}
    previous = None
    for line in lines:
        if line.file_name in groups and line.file_name != previous:
            # They would be taken for neighbours, and mixed up.
            raise InputError(f"signals of {line.file_name} do not stand together; a file's signals must")
        groups.setdefault(line.file_name, []).append(line)
        previous = line.file_name
    return groups


def to_signals(
    lines: Sequence[SignalLine],
    samples: list[Integers],
    rate_hz: float,
    renames: Mapping[str, str] = _NO_RENAMES,
) -> Signals:
    """Raw samples in the order of their file -> leads, aligned and without their baseline.

    ``samples`` is used up: its arrays are changed in place.
    """
    leads = source_leads([line.name for line in lines], renames)
    mv_per_count_L = np.array([line.mv_per_count() for line in lines])
    counts_L: list[Integers] = []
    valid_L: list[npt.NDArray[np.bool_] | None] = []
    samples.reverse()
    for line in lines:
        sample_T = samples.pop()
        valid_T = _valid(sample_T, FORMATS[line.format].bits)
        count_T = _minus(sample_T, line.baseline)
        if lag := min(line.skew * line.samples_per_frame, len(count_T)):
            valid_T = np.ones(len(count_T), bool) if valid_T is None else valid_T
            for array in (count_T, valid_T):
                array[:-lag] = array[lag:].copy()
            valid_T[-lag:] = False  # the file ends before the lagging signal does
        counts_L.append(count_T)
        valid_L.append(valid_T)
    baseline_L = [line.baseline for line in lines]
    return Signals(leads, counts_L, valid_L, mv_per_count_L, baseline_L, rate_hz)


def _valid(sample_T: Integers, bits: int | None) -> npt.NDArray[np.bool_] | None:
    """Which samples are not the format's mark of an invalid one; these get a valid sample's value, to fit its type."""
    if bits is None:
        return None
    invalid_T = sample_T == -(1 << (bits - 1))
    if not invalid_T.any():
        return None
    valid_T: npt.NDArray[np.bool_] = ~invalid_T
    sample_T[invalid_T] = sample_T[valid_T.argmax()] if valid_T.any() else 0
    return valid_T


def _minus(sample_T: Integers, baseline: int) -> Integers:
    """In place where the difference fits."""
    if not baseline:
        return sample_T
    low, high = int(sample_T.min(initial=0)) - baseline, int(sample_T.max(initial=0)) - baseline
    dtype = _narrowest(low, high)
    difference_T = sample_T if dtype == sample_T.dtype else np.empty(sample_T.shape, dtype)
    for piece in pieces(len(sample_T)):
        difference_T[piece] = sample_T[piece].astype(np.int64) - baseline
    return difference_T


def _narrowest(low: int, high: int) -> np.dtype[np.integer]:
    kinds: tuple[type[np.integer], ...] = (np.int16, np.int32)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.int64)


def check_sums(lines: Sequence[SignalLine], samples: Sequence[Integers]) -> bool:
    """Whether a header's checksums say anything of the samples (in the order of their file).

    They do not where all are 0 and those of the samples are not: some programs leave them out so. Raises InputError
    where one is not that of the samples.
    """
    sums = [int(sample_T.sum(dtype=np.int64)) % 65_536 for sample_T in samples]
    if any(sums) and all(line.checksum == 0 for line in lines):
        return False
    for line, of_samples in zip(lines, sums, strict=True):
        if line.checksum is not None and line.checksum % 65_536 != of_samples:
            raise InputError(
                f"checksum of signal {line.name!r}: the header says {line.checksum % 65_536}, "
                f"the data give {of_samples}; the data are damaged"
            )
    return True


def join(segments: list[tuple[int, Signals | None]], frame_rate_hz: float) -> Signals:
    """Segments, (frames, signals or None for a gap), one after the other. A missing lead is invalid there.

    ``segments`` is used up, so that not all of it is held twice.
    """
    present = [signals for _, signals in segments if signals is not None]
    if not present:
        raise InputError("no segment with samples; at least one is needed")
    rates_hz = sorted({signals.rate_hz for signals in present})
    if len(rates_hz) > 1:
        raise InputError(f"segments of {rates_hz[0]:g} Hz and {rates_hz[1]:g} Hz; one rate is needed")
    scales: dict[str, float] = {}
    baselines: dict[str, int] = {}
    dtypes: dict[str, np.dtype[np.integer]] = {}
    for signals in present:
        for lead, scale, count_T in zip(signals.leads, signals.mv_per_count_L.tolist(), signals.counts_L, strict=True):
            if scales.setdefault(lead, scale) != scale:
                raise InputError(f"lead {lead} has {scales[lead]:g} and {scale:g} mV per count; one gain is needed")
            dtypes[lead] = np.promote_types(dtypes.get(lead, np.dtype(np.int16)), count_T.dtype)
        baselines = dict(zip(signals.leads, signals.baseline_L, strict=True)) | baselines
    per_frame = round(rates_hz[0] / frame_rate_hz)
    n_samples = per_frame * sum(n_frames for n_frames, _ in segments)
    counts = {lead: np.zeros(n_samples, dtypes[lead]) for lead in scales}
    valid = {lead: np.zeros(n_samples, bool) for lead in scales}
    unsummed = any(signals.unsummed for signals in present)
    longer = next((signals.longer for signals in present if signals.longer), "")
    del signals, present
    segments.reverse()
    start = 0
    while segments:
        n_frames, part = segments.pop()
        stop = start + per_frame * n_frames
        if part is not None:
            for lead, count_T, valid_T in zip(part.leads, part.counts_L, part.valid_L, strict=True):
                counts[lead][start:stop] = count_T
                valid[lead][start:stop] = True if valid_T is None else valid_T
        start = stop
    return Signals(
        tuple(scales),
        [*counts.values()],
        [*valid.values()],
        np.array([*scales.values()]),
        [baselines[lead] for lead in scales],
        rates_hz[0],
        unsummed,
        longer,
    )


def without_blank(signals: Signals) -> tuple[Signals, tuple[str, ...]]:
    """Without the leads of which no sample is valid, and their names; raises InputError where that is every lead."""
    recorded = [i for i, valid_T in enumerate(signals.valid_L) if valid_T is None or valid_T.any()]
    if len(recorded) == len(signals.leads):
        return signals, ()
    if not recorded:
        raise InputError("all samples of all leads are marked invalid")
    kept = replace(
        signals,
        leads=tuple(signals.leads[i] for i in recorded),
        counts_L=[signals.counts_L[i] for i in recorded],
        valid_L=[signals.valid_L[i] for i in recorded],
        mv_per_count_L=signals.mv_per_count_L[recorded],
        baseline_L=[signals.baseline_L[i] for i in recorded],
    )
    return kept, tuple(lead for i, lead in enumerate(signals.leads) if i not in recorded)


def fill_invalid(signals: Signals, max_fraction: float) -> int:
    """Interpolate invalid samples along their lead, in place; returns how many they are.

    Raises InputError for a lead of which more than ``max_fraction`` is invalid. Each lead has a valid sample (see
    without_blank).
    """
    n_invalid = 0
    for lead, count_T, valid_T in zip(signals.leads, signals.counts_L, signals.valid_L, strict=True):
        if valid_T is None:
            continue
        n = valid_T.size - int(np.count_nonzero(valid_T))
        if n > max_fraction * valid_T.size:
            raise InputError(
                f"lead {lead}: {n} of {valid_T.size} samples are marked invalid; at most {max_fraction:.3%} may be"
            )
        if n:
            _interpolate(count_T, valid_T)
        n_invalid += n
    return n_invalid


def _interpolate(count_T: Integers, valid_T: npt.NDArray[np.bool_]) -> None:
    """A line between the valid neighbours of each gap; at the ends, the nearest valid sample goes on."""
    at = np.flatnonzero(~valid_T)
    begins = np.diff(at, prepend=-2) > 1
    gap = np.cumsum(begins) - 1
    ends = np.append(np.flatnonzero(begins)[1:], at.size) - 1
    before, behind = at[begins][gap] - 1, at[ends][gap] + 1
    before, behind = np.where(before < 0, behind, before), np.where(behind == valid_T.size, before, behind)
    from_count, to_count = count_T[before].astype(np.float64), count_T[behind].astype(np.float64)
    slope = (to_count - from_count) / np.maximum(behind - before, 1)
    count_T[at] = np.rint(from_count + slope * (at - before))
