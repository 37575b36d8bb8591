"""What the numbers of an ECG can be: asked of every record before it is rounded to int16.

Offsets do not count: electrodes are tens, at most 300 mV apart, so all is measured from a lead's median. The thresholds
were set on 2,934 real records (CinC 2011 set A, CinC 2021, PTB-XL, ECG-ID):

- Good leads swing by 0.1 to 12 mV and deviate from their median by 0.003 to 1.2 mV in the median. 1 V is four times
  what the loosest electrode did, and what no amplifier takes; 0.02 mV from top to bottom is a fifth of the flattest.
- Loose electrodes swing by 20 to 180 mV. They are kept and named, as are leads that stand still for a quarter of the
  record (one of 1,993 good records), or lie at their own extreme for a twentieth of it (none: up to 2.1 %).
- The median lead swings by 0.4 mV or more, and in an eighth of the record, where the baseline has no time to drift, by
  2.3 mV at most in good records, in parts of 1.25 s of shorter ones in 99 of 100; medians of five sets are 1.1 to 1.7,
  and 0.65 to 1.06 mV. A tenth of the one, or ten times the other, is another unit. Strips of less than 0.8 s may hold
  no QRS complex: at 0.2 s half of the good ones swing by less than 0.3 mV, at 0.6 s a tenth, at 0.8 s 1 to 3 of 100.
- I + III = II and Goldberger's equations hold to 1.7 % of the largest lead where a recorder or a filter has rounded,
  and to 4 % where electrodes were loose; leads in a wrong order miss by 50 to 150 %.

Only the extremes are taken of all samples; all else is judged by _PROBED of each lead, so that the check costs a tenth
of what packing the record costs. Shape suffixes: L leads, P probed samples, T samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.data.proportions import (
    alike,
    missed_equations,
    near_power_of_two,
    reaches,
    scaled_by_deviation,
    scaled_to_1,
)
from ecgscale.errors import InputError
from ecgscale.record import Record, Remark, check_rate

MIN_DURATION_S = 0.2  # of one beat at 300 a minute

_BEYOND_MV = 1000.0  # from the median: no ECG
_BEYOND_LOUD_MV = 250.0  # likewise, where most leads are loud: more than electrodes do, and as microvolts look
_LOOSE_MV = 20.0  # from the median: a loose electrode
_FLAT_MV = 0.02  # from top to bottom: nothing is recorded
_LOUD_MV = 3.0  # median deviation of the median lead: microvolts, or counts
_STILL = 0.25
_CLIPPED, _CLIPPED_MV = 0.05, 0.3  # of leads that swing by so much: a few levels have no extreme to speak of
_CLIPPED_FAR = 0.25  # of the swing, from the median
# Offsets that three leads share, of which two limb leads with one electrode would not; of fewer, powers of two alone.
_SHARED_MV, _SHARED_BY, _FEW_SHARED_MV = 0.9, 3, 1.9
_APART = 30.0  # between the deviations of leads next to each other, sorted by it
_QUIET_MV = 0.005  # a deviation below it is rounding
_SMALL_MV = 0.3  # swing of the median lead
_LARGE_MV, _PARTS = 2.5, 8  # likewise, in the median of so many parts of the record
_PART_S = 1.25  # at least: a beat at 48 a minute
_BEAT_S = 0.8  # in a shorter strip there may be no QRS complex

_PROBED = 256

# What files without a way to say "missing" say instead, in whatever unit; those beyond 1 V need no list.
_CODES = frozenset((-999.0, 999.0, -9999.0, 9999.0, -99999.0, 99999.0, -32768.0))

FLAT = "leads without a signal are left out as absent"
BLANK = "leads without any valid sample (all NaN, or all marked invalid) are left out as absent"
LOUD = "deviates from the median as microvolts or counts do, if taken for millivolts"
LARGE = f"most leads swing by more than {_LARGE_MV:g} mV, an ECG by about 1 mV"
SHORT = f"shorter than {_BEAT_S:g} s: a beat may be missing, so a unit ten times too small does not show"
SMALL = f"most leads swing by less than {_SMALL_MV:g} mV, an ECG by about 1 mV"
LOOSE = f"leads beyond {_LOOSE_MV:g} mV from their median, as of loose electrodes"
STUCK = "leads that stand still or are clipped for a part of the record"
APART = "leads far louder or quieter than the others, as of loose electrodes or in another unit"
ZERO = "all leads share an offset, as of counts whose zero was not taken off; electrodes' offsets differ"
SCALED = "leads that were scaled one by one, such as z-scores: no millivolts"
REACHES_1 = (
    "the largest number is exactly 1 mV, or the largest of its integer type, as of records that were scaled one by "
    "one: no millivolts then"
)
UNEQUAL = "I + III = II, aVR = -(I + II)/2 or their like do not hold: leads out of order, or not recorded together"

_SCALED_THEN = "Then no unit makes them millivolts: train with data.normalisation=zscore"

# Of a whole set: what to ask, where it is the kind of most of its records.
_QUESTIONS = {
    LOUD: "are they microvolts or counts? Then give --unit uV, or --mv-per-count of integers; with WFDB, mend the gain",
    LARGE: "is their unit a tenth, 0.1 mV (1e-4 V) instead of 1 mV? Then give --unit 0.1mV, or a tenth of "
    f"--mv-per-count of integers; with WFDB, mend the gain. Or are they z-scores? {_SCALED_THEN}",
    SMALL: "is their unit tenfold, 10 mV instead of 1 mV? Then give --unit 10mV, or ten times --mv-per-count of "
    "integers; with WFDB, mend the gain",
    ZERO: "is it the middle of the converter, such as 2048 or 32768 of unsigned integers? Then take it off the numbers "
    "first; with WFDB, mend the ADC zero in the header",
    SCALED: f"are they z-scores, or was the largest number of each lead made 1? {_SCALED_THEN}",
    REACHES_1: f"was each record divided by its largest number? {_SCALED_THEN}",
    UNEQUAL: "is the order of the leads another? Then name them by --source-leads (.npy), --leads (index) or "
    "--rename-leads (WFDB)",
}


class UnlikelyUnitError(InputError):
    """No ECG in the unit that its numbers are taken for, but one in another."""


class Verdict(NamedTuple):
    """What is to be thought of a record's numbers."""

    refusal: InputError | None
    """Why they are no ECG; None: they may be one."""
    empty: tuple[int, ...]
    """Rows without a signal, or without any valid sample."""
    remarks: tuple[Remark, ...]


def check_geometry(n_samples: int, rate_hz: float) -> None:
    """Raises InputError for a rate or a duration that no ECG has."""
    check_rate(rate_hz)
    if n_samples < MIN_DURATION_S * rate_hz:
        raise InputError(
            f"{n_samples} samples at {rate_hz:g} Hz are {1e3 * n_samples / rate_hz:.3g} ms; "
            f"an ECG has at least {1e3 * MIN_DURATION_S:g} ms: is the rate right, are leads and samples exchanged?"
        )


def questions(records_of: Mapping[str, int], records: int) -> list[str]:
    """What to ask of a whole set, by how many of its records have a remark of each kind."""
    return [question for kind, question in _QUESTIONS.items() if 2 * records_of.get(kind, 0) > records]


def checked(
    values_LT: npt.NDArray[Any], mv_per_value_L: npt.ArrayLike, leads: Sequence[str], rate_hz: float
) -> tuple[list[int], tuple[Remark, ...]]:
    """Rows that hold a signal, in their order, and what is odd about them; raises InputError for what is no ECG.

    Arguments as of ``judge``.
    """
    verdict = judge(values_LT, mv_per_value_L, leads, rate_hz)
    if verdict.refusal:
        raise verdict.refusal
    kept = [row for row in range(len(leads)) if row not in verdict.empty]
    return kept, verdict.remarks


def plausible(record: Record, shown: Path | str) -> Record:
    """The record without leads that hold no signal, and with remarks on what else is odd.

    For records whose counts are the recorder's but for offsets, and were searched for codes before those were taken
    off (see check_codes); floats are judged before they are rounded. Raises InputError, which begins with ``shown``,
    for what is no ECG.
    """
    try:
        check_geometry(record.n_samples, record.rate_hz)
        kept, remarks = checked(record.signal_LT, record.scale_L, record.leads, record.rate_hz)
    except InputError as error:
        raise type(error)(f"{shown}: {error}") from error
    record = replace(record, remarks=(*record.remarks, *remarks))
    if len(kept) == len(record.leads):
        return record
    leads = tuple(record.leads[row] for row in kept)
    offset_mv = {lead: mv for lead, mv in record.offset_mv.items() if lead in leads}
    signal_LT, scale_L = record.signal_LT[kept], record.scale_L[kept]
    return replace(record, signal_LT=signal_LT, scale_L=scale_L, leads=leads, offset_mv=offset_mv)


def check_codes(count_T: npt.NDArray[np.integer], baseline: int, lead: str) -> None:
    """Raises InputError where counts of any width hold a code for missing samples, with the baseline or without it.

    Asked before an offset is taken off and counts are rounded, which would make any number of a code.
    """
    extremes = float(count_T.min()), float(count_T.max())
    for offset in {0, baseline}:
        if code := code_in(count_T, extremes, offset):
            raise InputError(f"lead {lead}: {code}")


def code_in(values_T: npt.NDArray[Any], extremes: tuple[float, float], offset: int = 0) -> str | None:
    """What is to be said of an extreme that, plus ``offset``, is a code for missing samples, far from all others."""
    for extreme in extremes:
        if extreme + offset not in _CODES:
            continue
        others = values_T[values_T != values_T.dtype.type(extreme)].astype(np.float64)
        if len(others) and np.abs(others - extreme).min() > np.ptp(others):
            return (
                f"{len(values_T) - len(others)} samples are {extreme + offset:g}, far from all others and most likely "
                "a code for missing ones; interpolate them or leave the record out"
            )
    return None


def judge(values_LT: npt.NDArray[Any], mv_per_value_L: npt.ArrayLike, leads: Sequence[str], rate_hz: float) -> Verdict:
    """Whether numbers can be those of an ECG.

    Args:
        values_LT: integers or floats as the source has them, offsets included.
        mv_per_value_L: what a 1 is worth, one number or one for each lead.
        leads: canonical names, one for each row.
        rate_hz: samples in a second.

    A row of NaN alone is a lead that was not recorded. Raises InputError for other NaN and for infinity.
    """
    mv_per_value_L1 = np.full((len(leads), 1), 1.0)
    mv_per_value_L1[:, 0] *= mv_per_value_L
    if blank := _blank_rows(values_LT):
        return _judged_without(blank, values_LT, mv_per_value_L1[:, 0], leads, rate_hz)
    low_L, high_L = values_LT.min(axis=1).astype(np.float64), values_LT.max(axis=1).astype(np.float64)
    if not (np.isfinite(low_L).all() and np.isfinite(high_L).all()):
        raise InputError("the signal holds NaN or infinity; all samples must be finite millivolts")
    swing_mv_L = (high_L - low_L) * mv_per_value_L1[:, 0]
    flat_L = swing_mv_L < _FLAT_MV
    if flat_L.all():
        return Verdict(_nothing(low_L, swing_mv_L, mv_per_value_L1[:, 0]), tuple(range(len(leads))), ())
    numbers = _Numbers(values_LT, mv_per_value_L1, leads, low_L, high_L, flat_L, rate_hz)
    refusal = numbers.beyond() or numbers.code()
    if refusal:
        return Verdict(refusal, (), ())
    remarks = (
        numbers.flat(),
        numbers.short(),
        numbers.loud(),
        numbers.loose(),
        numbers.apart(),
        numbers.stuck(),
        numbers.zero(),
        *numbers.relations(),
    )
    return Verdict(
        None, tuple(np.flatnonzero(flat_L).tolist()), tuple(remark for remark in remarks if remark is not None)
    )


def _blank_rows(values_LT: npt.NDArray[Any]) -> list[int]:
    """Rows that hold nothing but NaN."""
    if values_LT.dtype.kind != "f":
        return []
    return [row for row in np.flatnonzero(np.isnan(values_LT[:, 0])).tolist() if np.isnan(values_LT[row]).all()]


def _judged_without(
    blank: Sequence[int],
    values_LT: npt.NDArray[Any],
    mv_per_value_L: npt.NDArray[np.float64],
    leads: Sequence[str],
    rate_hz: float,
) -> Verdict:
    """The verdict on the other rows, and a remark on the blank ones."""
    rows = [row for row in range(len(leads)) if row not in blank]
    if not rows:
        return Verdict(InputError("all samples are NaN"), tuple(blank), ())
    verdict = judge(values_LT[rows], mv_per_value_L[rows], [leads[row] for row in rows], rate_hz)
    empty = sorted((*blank, *(rows[i] for i in verdict.empty)))
    return verdict._replace(
        empty=tuple(empty), remarks=(absent_remark([leads[row] for row in blank]), *verdict.remarks)
    )


def absent_remark(leads: Sequence[str]) -> Remark:
    """On leads that hold no valid sample."""
    return Remark(BLANK, ", ".join(leads))


def _nothing(
    low_L: npt.NDArray[np.float64], swing_mv_L: npt.NDArray[np.float64], mv_per_value_L: npt.NDArray[np.float64]
) -> InputError:
    """What to say where there is nothing in any lead."""
    if swing_mv_L.any():
        return UnlikelyUnitError(
            f"no lead swings by more than {swing_mv_L.max():.2g} mV from top to bottom, an ECG by about 1 mV: "
            "are they volts? Then give --unit V (with WFDB, mend the gain in the header)"
        )
    if not low_L.any():
        return InputError("all samples are zero")
    at_mv = ", ".join(f"{mv:g}" for mv in sorted(set(np.round(low_L * mv_per_value_L, 3).tolist()))[:3])
    return InputError(f"all leads stand still, at {at_mv} mV; an ECG swings by about 1 mV")


class _Numbers:
    """The numbers of a record in which some lead has a signal."""

    def __init__(
        self,
        values_LT: npt.NDArray[Any],
        mv_per_value_L1: npt.NDArray[np.float64],
        leads: Sequence[str],
        low_L: npt.NDArray[np.float64],
        high_L: npt.NDArray[np.float64],
        flat_L: npt.NDArray[np.bool_],
        rate_hz: float,
    ) -> None:
        self.duration_s = values_LT.shape[1] / rate_hz
        self.values_LT, self.mv_per_value_L, self.leads = values_LT, mv_per_value_L1[:, 0], leads
        self.low_L, self.high_L, self.flat_L = low_L, high_L, flat_L
        self.step = max(1, values_LT.shape[1] // _PROBED)
        self.probed_LP = values_LT[:, :: self.step]
        probed_mv_LP = self.probed_LP * mv_per_value_L1
        self.median_mv_L = _median(probed_mv_LP)
        self.centred_mv_LP = probed_mv_LP - self.median_mv_L[:, None]
        self.deviation_mv_L = _median(np.abs(self.centred_mv_LP))
        self.sorted_mv_L = np.sort(self.deviation_mv_L[~flat_L])
        self.typical_mv = self._of_median_lead(self.deviation_mv_L)
        self.swing_mv_L = (high_L - low_L) * self.mv_per_value_L
        self.peak_mv_L = np.maximum(
            high_L * self.mv_per_value_L - self.median_mv_L, self.median_mv_L - low_L * self.mv_per_value_L
        )

    def beyond(self) -> InputError | None:
        limit_mv = _BEYOND_MV if self.typical_mv <= _LOUD_MV else _BEYOND_LOUD_MV
        if (self.peak_mv_L <= limit_mv).all():
            return None
        row = int(self.peak_mv_L.argmax())
        below = self.low_L[row] * self.mv_per_value_L[row] == self.median_mv_L[row] - self.peak_mv_L[row]
        extreme = (self.low_L if below else self.high_L)[row]
        said = (
            f"lead {self.leads[row]} reaches {extreme * self.mv_per_value_L[row]:.6g} mV, "
            f"{self.peak_mv_L[row]:.4g} mV from its median; an ECG stays within {limit_mv:g} mV"
        )
        if self.deviation_mv_L[row] > _LOUD_MV:
            return UnlikelyUnitError(
                f"{said}: are they microvolts? Then give --unit uV (integers: --mv-per-count; WFDB: mend the gain)"
            )
        n = np.count_nonzero(self.values_LT[row] == self.values_LT.dtype.type(extreme))
        return InputError(
            f"{said}: {n} of {self.values_LT.shape[1]} samples stand there, most likely a code for missing ones; "
            "interpolate them or leave the record out"
        )

    def code(self) -> InputError | None:
        """Whether a number far from all others stands for missing samples."""
        for row in np.flatnonzero(~self.flat_L).tolist():
            code = code_in(self.values_LT[row], (self.low_L[row], self.high_L[row]))
            if code is not None:
                return InputError(f"lead {self.leads[row]}: {code}")
        return None

    def flat(self) -> Remark | None:
        return self._remark(FLAT, self.flat_L)

    def short(self) -> Remark | None:
        return Remark(SHORT, f"{self.duration_s:.2g} s") if self.duration_s < _BEAT_S else None

    def loud(self) -> Remark | None:
        return Remark(LOUD, f"by {self.typical_mv:.3g} mV") if self.typical_mv > _LOUD_MV else None

    def loose(self) -> Remark | None:
        return self._remark(LOOSE, self.peak_mv_L > _LOOSE_MV, lambda row: f" {self.peak_mv_L[row]:.0f} mV")

    def apart(self) -> Remark | None:
        """The quieter or the louder leads, whichever are fewer."""
        sorted_mv_L = np.maximum(self.sorted_mv_L, _QUIET_MV)
        if sorted_mv_L[-1] < _APART * sorted_mv_L[0]:
            return None
        ratio_L = sorted_mv_L[1:] / sorted_mv_L[:-1]
        n_quiet = int(ratio_L.argmax()) + 1
        if ratio_L[n_quiet - 1] < _APART:
            return None
        quiet_L = self.deviation_mv_L <= sorted_mv_L[n_quiet - 1]
        fewer_L = (quiet_L if 2 * n_quiet <= len(sorted_mv_L) else ~quiet_L) & ~self.flat_L
        return self._remark(APART, fewer_L, lambda row: f" by {self.deviation_mv_L[row]:.2g} mV")

    def stuck(self) -> Remark | None:
        """Leads that stand still in one stretch, or that lie at their own extreme again and again."""
        share_L = np.zeros(len(self.leads))
        for extreme_L in (self.low_L, self.high_L):
            at_extreme_L = _share(self.probed_LP == extreme_L[:, None], _CLIPPED)
            # A drawn ECG without noise rests at its own extreme.
            far_L = np.abs(extreme_L * self.mv_per_value_L - self.median_mv_L) > _CLIPPED_FAR * self.swing_mv_L
            share_L = np.maximum(share_L, at_extreme_L * (far_L & (self.swing_mv_L > _CLIPPED_MV)))
        alike_LP = self.probed_LP[:, 1:] == self.probed_LP[:, :-1]
        for row in np.flatnonzero(_share(alike_LP, _STILL)).tolist():
            still = self._still(row, alike_LP[row])
            share_L[row] = max(share_L[row], still if still >= _STILL else 0.0)
        return self._remark(STUCK, (share_L > 0) & ~self.flat_L, lambda row: f" {share_L[row]:.0%}")

    def zero(self) -> Remark | None:
        """A zero of the counts that is in the numbers still, in mV or, of leads with unequal scales, in counts."""
        kept_L = ~self.flat_L
        median_mv_L, is_count = self.median_mv_L[kept_L], self.values_LT.dtype.kind != "f"
        if self.typical_mv > _LOUD_MV or np.abs(median_mv_L).min() < _SHARED_MV:
            return None
        median_L = median_mv_L / self.mv_per_value_L[kept_L]
        if len(median_L) < _SHARED_BY:
            is_zero = is_count and np.abs(median_mv_L).min() > _FEW_SHARED_MV and near_power_of_two(median_L)
        else:
            is_zero = alike(median_mv_L) or (is_count and alike(median_L))
        middle = len(median_L) // 2
        counts = f", {np.sort(median_L)[middle]:.0f} counts" if is_count else ""
        return Remark(ZERO, f"by {np.sort(median_mv_L)[middle]:.3g} mV{counts}") if is_zero else None

    def _still(self, row: int, alike_P: npt.NDArray[np.bool_]) -> float:
        """Share of the longest stretch in which nothing moves; 0 where something does between the probed samples."""
        ends_P = np.flatnonzero(np.concatenate(([True], ~alike_P, [True])))
        lengths = np.diff(ends_P)
        first = int(lengths.argmax())
        stretch_T = self.values_LT[row, ends_P[first] * self.step : (ends_P[first + 1] - 1) * self.step + 1]
        return float(lengths[first] / len(alike_P)) if stretch_T.min() == stretch_T.max() else 0.0

    def relations(self) -> list[Remark]:
        """How the leads stand to each other and to 1 mV. Those that were scaled fit no equation and have no unit."""
        kept_L = ~self.flat_L
        low_mv_L, high_mv_L = ((of_L * self.mv_per_value_L)[kept_L] for of_L in (self.low_L, self.high_L))
        deviations = (self.values_LT, self.mv_per_value_L, self.centred_mv_LP, kept_L)
        scaled = scaled_to_1(low_mv_L, high_mv_L)
        if not scaled and (full_mv := self._full_scale_mv()):
            scaled = scaled_to_1(low_mv_L / full_mv, high_mv_L / full_mv)
        if scaled := scaled or scaled_by_deviation(*deviations):
            return [Remark(SCALED, scaled)]
        missed = missed_equations(self.centred_mv_LP, self.leads, self.flat_L)
        remarks = [Remark(UNEQUAL, missed)] if missed else []
        largest = max(high_mv_L.max(), -low_mv_L.min())
        if reaches(largest, 1) or reaches(largest, self._full_scale_mv()):
            remarks.append(Remark(REACHES_1))
        elif self.typical_mv <= _LOUD_MV:
            remarks += self._tenfold()
        return remarks

    def _full_scale_mv(self) -> float:
        """What the largest number of an integer type is worth; 0 for floats and for leads of unequal scales."""
        if self.values_LT.dtype.kind == "f" or np.ptp(self.mv_per_value_L):
            return 0.0
        return float(np.iinfo(self.values_LT.dtype).max * self.mv_per_value_L[0])

    def _tenfold(self) -> list[Remark]:
        """Whether beats are much smaller or larger than any, in most leads and most of the time."""
        swing_mv = self._of_median_lead(self.swing_mv_L)
        if swing_mv < _SMALL_MV and self.duration_s >= _BEAT_S:
            return [Remark(SMALL, f"by {swing_mv:.2g} mV")]
        parts = min(_PARTS, max(1, int(self.duration_s / _PART_S)))
        n = self.probed_LP.shape[1] // parts
        parts_LSP = self.centred_mv_LP[:, : n * parts].reshape(len(self.leads), parts, n)
        swing_mv = self._of_median_lead(_median(np.ptp(parts_LSP, axis=2))) if n else 0.0
        return [Remark(LARGE, f"by {swing_mv:.2g} mV")] if swing_mv > _LARGE_MV else []

    def _of_median_lead(self, of_L: npt.NDArray[np.float64]) -> float:
        sorted_L = np.sort(of_L[~self.flat_L])
        return float(sorted_L[(len(sorted_L) - 1) // 2])

    def _remark(
        self, kind: str, of_L: npt.NDArray[np.bool_], detail: Callable[[int], str] = lambda row: ""
    ) -> Remark | None:
        if not of_L.any():
            return None
        rows = np.flatnonzero(of_L).tolist()
        details = ", ".join(self.leads[row] + detail(row) for row in rows)
        return Remark(kind, details)


def _median(values_LP: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The upper one of two: a fifth of np.median's time."""
    middle = values_LP.shape[1] // 2
    return np.partition(values_LP, middle, axis=1)[:, middle]


def _share(true_LP: npt.NDArray[np.bool_], least: float) -> npt.NDArray[np.float64]:
    """Share of each row that is true, 0 where it is below ``least``."""
    n = true_LP.shape[1]
    if np.count_nonzero(true_LP) < least * n:  # in all rows together, which is counted much faster
        return np.zeros(len(true_LP))
    share_L = np.count_nonzero(true_LP, axis=1) / n
    return np.where(share_L >= least, share_L, 0.0)
