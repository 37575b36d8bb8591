"""What an ECG is here: canonical leads, millivolts, hertz, int16 counts.

Millivolts are those of the ECG: the constant offset of an electrode, up to 300 mV in a recorder that is coupled to DC,
says nothing about the heart, and where int16 could not hold it beside the ECG's microvolts, it is taken off and kept
apart.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS

MIN_RATE_HZ = 20.0  # below, a QRS complex of 100 ms has less than two samples
MAX_RATE_HZ = 100_000.0  # the fastest ECG recorders sample at some 10 kHz
MAX_VALUES = 1 << 29  # leads x samples of one record: 12 leads, 24 hours, 500 Hz

_MV_PER_UNIT = {"v": 1000.0, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}
_MV_PER_UNIT |= {"volt": 1000.0, "millivolt": 1.0, "microvolt": 1e-3, "nanovolt": 1e-6}
_INT16_MAX = 32767
_ELECTRODE_MV = 1.0  # of a lead's median: less is the ECG's own, in counts so fine that they do not fit
DEFAULT_SCALE_MV = 1e-3  # 1 µV per count: ±32.767 mV, finer than any clinical recorder
_PIECE = 1 << 18  # samples of a lead that are worked on at once, so that a day's recording needs little beyond itself
_WHOLE_NUMBER = re.compile(
    r"0x(?P<hex>[0-9a-f]{1,16})|\+?(?:(?P<digits>[0-9]+|[0-9]{1,3}(?:_[0-9]{3})+)"
    r"|(?P<scientific>[0-9]{1,20}(?:\.[0-9]{1,20})?e\+?[0-9]{1,2}))"
)
_LEADING_ZEROS = re.compile("(?<![0-9])0+(?=[0-9])")

Counts = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]  # (L, T), or L times (T,), which need not lie side by side


def mv_per_unit(unit: str) -> float:
    """Millivolts per physical unit: V, mV, uV, µV, nV or their words, in any case; raises InputError for others."""
    folded = unit.strip().casefold()
    scale = _MV_PER_UNIT.get(folded.removesuffix("s") if folded.endswith("volts") else folded)
    if scale is None:
        raise InputError(f"unknown unit {unit!r}; known are V, mV, uV and nV")
    return scale


class Remark(NamedTuple):
    """Something about a record that is no reason to reject it, and that nobody should have to find out for himself."""

    kind: str
    """Words that end "7 records: ", and are the same for all records: they are counted by it."""
    detail: str = ""
    """What it is in this record, such as the leads."""


@dataclass(frozen=True, eq=False)
class Record:
    """One ECG recording: int16 counts with the millivolts that one count is worth.

    Value in mV = ``scale_L[:, None] * signal_LT``, without the constant ``offset_mv``. Leads stand in canonical order;
    the ones that the recording lacks are absent, not zero.
    """

    name: str  # unique within the data set: the path below its folder, without suffix
    signal_LT: Counts
    scale_L: Floats  # mV per count
    rate_hz: float
    leads: tuple[str, ...]
    patient: str | None = None  # None: unknown, and then shared with no other record
    labels: dict[str, list[str]] = field(default_factory=dict)  # []: known to have none; absent: nothing is known
    metadata: dict[str, str] = field(default_factory=dict)  # age, sex and whatever else the source said
    invalid_samples: int = 0  # samples that the source marked as invalid and that were interpolated
    offset_mv: dict[str, float] = field(default_factory=dict)  # lead -> what was taken off; int16 could not hold it
    remarks: tuple[Remark, ...] = ()  # what ingest counts, and lists in remarks.csv
    notes: dict[str, int] = field(default_factory=dict)  # what was done to labels and ids -> how often; not stored
    patient_key: str = ""  # the column or the key of a header that names the patient; not stored

    def __post_init__(self) -> None:
        assert self.signal_LT.dtype == np.int16
        assert self.signal_LT.ndim == 2
        assert self.scale_L.shape == (len(self.leads),) == self.signal_LT.shape[:1]
        assert self.leads == tuple(sorted(self.leads, key=LEADS.index))

    @classmethod
    def of(
        cls,
        name: str,
        fitted: Fitted,
        rate_hz: float,
        leads: tuple[str, ...],
        *,
        remarks: tuple[Remark, ...] = (),
        **known: Any,
    ) -> Record:
        """A record of leads that were brought into int16, with remarks on what that took."""
        return cls(
            name,
            fitted.signal_LT,
            fitted.scale_L,
            rate_hz,
            leads,
            offset_mv=fitted.offsets(leads),
            remarks=(*remarks, *fitted.remarks(leads)),
            **known,
        )

    @property
    def n_samples(self) -> int:
        return int(self.signal_LT.shape[1])

    @property
    def duration_s(self) -> float:
        return self.n_samples / self.rate_hz

    def millivolts(self) -> Floats:
        """(L, T) float32 in mV, without ``offset_mv``."""
        return self.signal_LT.astype(np.float32) * self.scale_L[:, None]

    def resampled(self, rate_hz: float) -> Record:
        """The same recording at another rate, by polyphase filtering; itself where the rate is already right.

        Raises InputError where it would have more than MAX_VALUES values.
        """
        if rate_hz == self.rate_hz:
            return self
        n_leads, n_samples = self.signal_LT.shape
        if n_leads * n_samples * rate_hz / self.rate_hz > MAX_VALUES:
            raise InputError(
                f"{n_samples} samples of {n_leads} leads at {self.rate_hz:g} Hz; at {rate_hz:g} Hz there would be more "
                f"than {MAX_VALUES} values; cut it into shorter recordings"
            )
        up, down = ratio_of_rates(self.rate_hz, rate_hz)
        if up == down:  # 500.001 Hz
            return replace(self, rate_hz=rate_hz)
        signal_LT = np.empty((n_leads, -(-n_samples * up // down)), np.int16)
        columns = []
        at_once = max(1, _PIECE // max(1, n_samples))
        for first in range(0, n_leads, at_once):
            rows = slice(first, first + at_once)
            mv_LT = self.signal_LT[rows].astype(np.float32)
            mv_LT *= self.scale_L[rows, None]
            part = quantise(resample_millivolts(mv_LT, self.rate_hz, rate_hz))
            signal_LT[rows] = part.signal_LT
            columns.append(part[1:])
        fitted = Fitted(signal_LT, *(np.concatenate(column) for column in zip(*columns, strict=True)))
        more_mv = fitted.offsets(self.leads)
        return replace(
            self,
            signal_LT=signal_LT,
            scale_L=fitted.scale_L,
            rate_hz=rate_hz,
            offset_mv=self.offset_mv | {lead: mv + self.offset_mv.get(lead, 0.0) for lead, mv in more_mv.items()},
            remarks=tuple(dict.fromkeys((*self.remarks, *fitted.remarks(self.leads)))),
        )


OFFSET = "an electrode's offset was taken off, since int16 cannot hold it beside an ECG (JSON: offset_mv)"
COARSE = "leads span more than int16 holds in steps of 1 µV, so their steps are coarser (JSON: scale_mv)"


class Fitted(NamedTuple):
    """Leads in int16: value in mV = ``scale_L[:, None] * signal_LT + offset_mv_L[:, None]``."""

    signal_LT: Counts
    scale_L: Floats  # mV per count
    offset_mv_L: npt.NDArray[np.float64]  # what was taken off a lead to make it fit; 0 where it did
    coarse_L: npt.NDArray[np.bool_]  # whether a count had to become more than 1 µV, and more than in the source

    def offsets(self, leads: Sequence[str]) -> dict[str, float]:
        """Lead -> mV that were taken off, of the leads that did not fit."""
        return {lead: mv for lead, mv in zip(leads, self.offset_mv_L.tolist(), strict=True) if mv}

    def remarks(self, leads: Sequence[str]) -> tuple[Remark, ...]:
        offset = ", ".join(
            f"{lead} {mv:.3g} mV" for lead, mv in self.offsets(leads).items() if abs(mv) >= _ELECTRODE_MV
        )
        coarse = ", ".join(
            f"{lead} {1000 * scale:.3g} µV"
            for lead, scale, is_coarse in zip(leads, self.scale_L, self.coarse_L, strict=True)
            if is_coarse
        )
        kinds = ((OFFSET, offset), (COARSE, coarse))
        return tuple(Remark(kind, detail) for kind, detail in kinds if detail)


def check_rate(rate_hz: float, name: str = "sampling rate") -> None:
    """Raises InputError, which begins with ``name``, for a sample rate that no ECG has."""
    if MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        return
    is_period = rate_hz > 0 and MIN_RATE_HZ <= 1 / rate_hz <= 10_000
    period = f" (a period in seconds? Then it is {1 / rate_hz:g} Hz)" if is_period else ""
    raise InputError(f"{name} {rate_hz:g} Hz{period}; an ECG has {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g} Hz")


def pieces(n_samples: int) -> Iterator[slice]:
    """Consecutive parts of a lead, to be worked on one at a time."""
    return (slice(first, min(first + _PIECE, n_samples)) for first in range(0, n_samples, _PIECE))


def moments(values_LT: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of each lead, without a copy of all of it."""
    n = values_LT.shape[1]
    mean_L1 = sum(values_LT[:, piece].sum(axis=1, dtype=np.float64) for piece in pieces(n))[:, None] / n
    squares_L = np.zeros(len(values_LT))
    for piece in pieces(n):
        centred_LT = values_LT[:, piece] - mean_L1
        squares_L += np.square(centred_LT, out=centred_LT).sum(axis=1)
    return mean_L1[:, 0], np.sqrt(squares_L / n)


# --- int16 ---


def quantise(value_LT: Rows, mv_per_value: float = 1.0) -> Fitted:
    """Real numbers, of each lead (T,), and the mV that a 1 is worth -> int16 counts of 1 µV.

    A lead beyond ±32.767 mV loses its median first, which is an electrode's offset and no ECG, and gets coarser counts
    only where it still does not fit. Raises InputError for NaN or infinity.
    """
    n_leads, n_samples = len(value_LT), len(value_LT[0])
    fitted = _room(n_leads, n_samples, np.full(n_leads, DEFAULT_SCALE_MV))
    for i, value_T in enumerate(value_LT):
        low_mv, high_mv = _range_mv(value_T, mv_per_value)
        offset_mv = electrode_offset(value_T, mv_per_value)
        peak_mv = max(high_mv - offset_mv, offset_mv - low_mv)
        scale = np.float32(max(DEFAULT_SCALE_MV, peak_mv / _INT16_MAX))
        for piece in pieces(n_samples):
            count_T = np.rint((value_T[piece].astype(np.float64) * mv_per_value - offset_mv) / np.float64(scale))
            # clip: float32 rounding of the scale
            fitted.signal_LT[i, piece] = np.clip(count_T, -_INT16_MAX, _INT16_MAX)
        fitted.scale_L[i], fitted.offset_mv_L[i] = scale, offset_mv
        fitted.coarse_L[i] = peak_mv > _INT16_MAX * DEFAULT_SCALE_MV
    return fitted


def electrode_offset(value_T: npt.NDArray[Any], mv_per_value: float = 1.0) -> float:
    """mV that are taken off a lead which counts of 1 µV cannot hold: its median; 0 where they can.

    Raises InputError for NaN or infinity.
    """
    low_mv, high_mv = _range_mv(value_T, mv_per_value)
    if max(-low_mv, high_mv) <= _INT16_MAX * DEFAULT_SCALE_MV:
        return 0.0
    return float(np.median(value_T)) * mv_per_value


def _range_mv(value_T: npt.NDArray[Any], mv_per_value: float) -> tuple[float, float]:
    low_mv, high_mv = float(value_T.min()) * mv_per_value, float(value_T.max()) * mv_per_value
    if not math.isfinite(high_mv - low_mv):
        raise InputError("the signal holds NaN or infinity; all samples must be finite millivolts")
    return low_mv, high_mv


def fit_counts(count_LT: Rows, scale_L: npt.NDArray[np.floating]) -> Fitted:
    """Baseline-free counts of any width, of each lead (T,), and mV per count -> int16.

    Exact where a lead fits, and where it does once its median, an electrode's offset, is taken off. A lead that does
    not fit then either is requantised to the coarser scale at which it does.
    """
    fitted = _room(len(count_LT), len(count_LT[0]), scale_L)
    for i, count_T in enumerate(count_LT):
        low, high = int(count_T.min()), int(count_T.max())
        if max(-low, high) <= _INT16_MAX:
            fitted.signal_LT[i] = count_T
            continue
        offset = round(float(np.median(count_T)))
        coarser = max(1.0, max(high - offset, offset - low) / _INT16_MAX)
        for piece in pieces(len(count_T)):
            centred_T = count_T[piece].astype(np.int64) - offset
            fitted.signal_LT[i, piece] = centred_T if coarser == 1 else np.rint(centred_T / coarser)
        fitted.offset_mv_L[i] = offset * scale_L[i]
        fitted.scale_L[i] = scale_L[i] * coarser
        fitted.coarse_L[i] = coarser > 1 and scale_L[i] * coarser > DEFAULT_SCALE_MV
    return fitted


def _room(n_leads: int, n_samples: int, scale_L: npt.NDArray[np.floating]) -> Fitted:
    signal_LT = np.empty((n_leads, n_samples), np.int16)
    return Fitted(signal_LT, scale_L.astype(np.float32), np.zeros(n_leads), np.zeros(n_leads, bool))


# --- resampling ---


def resample_millivolts(signal_mv_LT: Floats, from_hz: float, to_hz: float) -> Floats:
    """Polyphase resampling along time. The ends are continued by a line so that an offset leaves no step there.

    The time axis errs by 1e-6 at most where a ratio of whole numbers up to 100,000 comes so near, and by 1e-5 always:
    quartzes of recorders err by 2e-5 and more. Long leads are resampled piece by piece, to the same values.
    """
    up, down = ratio_of_rates(from_hz, to_hz)
    if up == down:
        return signal_mv_LT
    # The filter's branches sum to 1 only to within 5e-4, so an offset of 20 mV would come out with a 10 µV ripple.
    offset_L1 = signal_mv_LT.mean(axis=1, keepdims=True, dtype=np.float64)
    n_leads, n_samples = signal_mv_LT.shape
    if n_samples <= _PIECE:
        return np.asarray(_polyphase(signal_mv_LT - offset_L1, up, down, "line") + offset_L1, np.float32)
    resampled_LT = np.empty((n_leads, -(-n_samples * up // down)), np.float32)
    for mv_T, offset, resampled_T in zip(signal_mv_LT, offset_L1[:, 0], resampled_LT, strict=True):
        _resample_long(mv_T, float(offset), up, down, resampled_T)
    return resampled_LT


def ratio_of_rates(from_hz: float, to_hz: float) -> tuple[int, int]:
    """(up, down) whole numbers for resampling, as simple as the error of the time axis allows (resample_millivolts).

    Raises InputError where there are none: one rate is more than 100,000 times the other.
    """
    exact = Fraction(to_hz) / Fraction(from_hz)
    smaller = min(exact, 1 / exact)
    for largest in (1000, 10_000, 100_000):  # the filter has 20 taps for each
        ratio = smaller.limit_denominator(largest)
        if abs(ratio / smaller - 1) <= 1e-6:
            break
    if not ratio:
        raise InputError(
            f"cannot resample from {from_hz:g} Hz to {to_hz:g} Hz, more than 100,000 times as much; give nearer rates"
        )
    down_and_up = ratio.denominator, ratio.numerator
    return down_and_up if exact > 1 else down_and_up[::-1]


@functools.lru_cache(maxsize=8)
def _low_pass(larger: int) -> npt.NDArray[np.float64]:
    """scipy's own filter for resampling; it would design it anew for every call."""
    from scipy.signal import firwin  # imports slowly, and training never resamples

    taps: npt.NDArray[np.float64] = firwin(20 * larger + 1, 1 / larger, window=("kaiser", 5.0))
    return taps


def _polyphase(signal_LT: npt.NDArray[np.float64], up: int, down: int, ends: str) -> npt.NDArray[np.float64]:
    from scipy.signal import resample_poly

    taps: Any = _low_pass(max(up, down))  # scipy's stubs know no array here
    kind: Any = ends
    return resample_poly(signal_LT, up, down, axis=-1, window=taps, padtype=kind)


def _resample_long(mv_T: Floats, offset: float, up: int, down: int, resampled_T: Floats) -> None:
    """Pieces with as much of their neighbours as the filter reaches; at the ends, of the line through both."""
    halo = down * -(-(10 * max(up, down) // up + 1) // down)  # whole periods, so that all pieces meet the same phases
    step = down * max(1, _PIECE // down)
    n_samples = len(mv_T)
    first_mv, slope = float(mv_T[0]) - offset, (float(mv_T[-1]) - float(mv_T[0])) / (n_samples - 1)
    for begin in range(0, n_samples, step):
        low, high = begin - halo, begin + step + halo
        inside_T = mv_T[max(0, low) : high] - np.float64(offset)
        before_T = first_mv + slope * np.arange(low, min(0, high))
        behind_T = first_mv + slope * np.arange(max(n_samples, low), max(n_samples, high))
        piece_T = np.concatenate([before_T, inside_T, behind_T])
        out_T = resampled_T[begin // down * up : (begin + step) // down * up]
        skipped = halo // down * up
        out_T[:] = _polyphase(piece_T, up, down, "constant")[skipped : skipped + len(out_T)] + offset


def patient_code(dataset: str, patient: str | None, record_name: str) -> int:
    """A 63-bit number that stands for (data set, patient); for an unknown patient it is unique to the record."""
    person = f"patient\0{dataset}\0{patient}" if patient is not None else f"record\0{dataset}\0{record_name}"
    return _hash_63(person)


def id_hash(patient: str | None) -> int:
    """A number that stands for a patient's id alone, whatever its case and the form of its numbers.

    ``P-007`` and ``p-7`` have one, and so have ``1000``, ``+1000``, ``1e3``, ``0x3E8`` and ``1_000``, in data sets of
    any name: they may be one person, which no program can know. 0 for an unknown patient.
    """
    if patient is None:
        return 0
    folded = _without_form(unicodedata.normalize("NFKC", patient).casefold())
    return 1 + _hash_63(f"id\0{_LEADING_ZEROS.sub('', folded)}")


def _without_form(text: str) -> str:
    """A whole number by its digits alone; any other text as it is."""
    if (form := _WHOLE_NUMBER.fullmatch(text)) is None:
        return text
    if form["hex"]:
        return str(int(form["hex"], 16))
    if form["digits"]:
        return form["digits"].replace("_", "")
    number = Fraction(form["scientific"])
    return str(number) if number.denominator == 1 else text


def _hash_63(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
