"""What an ECG is here: canonical leads, millivolts, hertz, int16 counts.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# The lead sets of the PhysioNet/CinC Challenge 2021, and lead I alone.
LEAD_SETS = {
    12: LEADS,
    6: LEADS[:6],
    4: ("I", "II", "III", "V2"),
    3: ("I", "II", "V2"),
    2: ("I", "II"),
    1: ("I",),
}

_LEAD_BY_FOLDED_NAME = {lead.casefold(): lead for lead in LEADS}
_MV_PER_UNIT = {"v": 1000.0, "mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "nv": 1e-6}
_INT16_MAX = 32767
_DEFAULT_SCALE_MV = 1e-3  # 1 µV per count: ±32.767 mV, finer than any clinical recorder

Counts = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]


def canonical_lead(name: str) -> str:
    """``"ECG I"``, ``"AVR"``, ``"v1"`` -> ``"I"``, ``"aVR"``, ``"V1"``; raises InputError for any other name."""
    folded = name.strip().casefold()
    for prefix in ("ecg lead ", "ecg ", "lead "):
        folded = folded.removeprefix(prefix)
    lead = _LEAD_BY_FOLDED_NAME.get(folded.strip())
    if lead is None:
        raise InputError(f"unknown lead {name!r}; the twelve leads are {' '.join(LEADS)}")
    return lead


def canonical_leads(names: Sequence[str]) -> tuple[str, ...]:
    """The canonical name of each lead, in the order given; raises InputError for unknown or repeated leads."""
    leads = tuple(canonical_lead(name) for name in names)
    repeated = sorted({lead for lead in leads if leads.count(lead) > 1}, key=LEADS.index)
    if repeated:
        raise InputError(f"lead {repeated[0]} stands {leads.count(repeated[0])} times; each lead may stand once")
    return leads


def chosen_leads(names: Sequence[str]) -> tuple[str, ...]:
    """Leads named one by one, or all at once by the size of a set of the challenge (``["6"]``), in canonical order.

    Raises InputError for unknown or repeated leads.
    """
    if len(names) == 1 and names[0] in map(str, LEAD_SETS):
        return LEAD_SETS[int(names[0])]
    if len(names) > 1 and all(name in map(str, LEAD_SETS) for name in names):
        raise InputError(f"lead sets {','.join(names)}: give each apart: {' '.join(names)}")
    for name in names:
        if name.strip().casefold() not in _LEAD_BY_FOLDED_NAME:
            near = get_close_matches(name.casefold(), _LEAD_BY_FOLDED_NAME, 1, 0.4)
            hint = f"did you mean {_LEAD_BY_FOLDED_NAME[near[0]]}? Give" if near else "give"
            sets = ", ".join(map(str, LEAD_SETS))
            raise InputError(f"unknown lead {name!r}; {hint} leads such as I,II,V2, or one set alone: {sets}")
    return tuple(sorted(canonical_leads(names), key=LEADS.index))


def lead_set_name(leads: Sequence[str]) -> str:
    """``12`` for a set of the challenge, in canonical order, and ``II,V5`` for others."""
    return next((str(size) for size, known in LEAD_SETS.items() if known == tuple(leads)), ",".join(leads))


def mv_per_unit(unit: str) -> float:
    """Millivolts per physical unit, for V, mV, uV, µV and nV in any case; raises InputError for other units."""
    scale = _MV_PER_UNIT.get(unit.strip().casefold())
    if scale is None:
        raise InputError(f"unknown unit {unit!r}; known are V, mV, uV and nV")
    return scale


@dataclass(frozen=True, eq=False)
class Record:
    """One ECG recording: int16 counts with the millivolts that one count is worth.

    Value in mV = ``scale_L[:, None] * signal_LT``. Leads stand in canonical order; the ones that the recording
    lacks are absent, not zero.
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
    notes: dict[str, int] = field(
        default_factory=dict
    )  # what was done to labels and ids -> how often; it is not stored

    def __post_init__(self) -> None:
        assert self.signal_LT.dtype == np.int16
        assert self.signal_LT.ndim == 2
        assert self.scale_L.shape == (len(self.leads),) == self.signal_LT.shape[:1]
        assert self.leads == tuple(sorted(self.leads, key=LEADS.index))

    @property
    def n_samples(self) -> int:
        return int(self.signal_LT.shape[1])

    @property
    def duration_s(self) -> float:
        return self.n_samples / self.rate_hz

    def millivolts(self) -> Floats:
        """(L, T) float32 in mV."""
        return self.signal_LT.astype(np.float32) * self.scale_L[:, None]

    def resampled(self, rate_hz: float) -> Record:
        """The same recording at another rate, by polyphase filtering; itself where the rate is already right."""
        if rate_hz == self.rate_hz:
            return self
        resampled_mv_LT = resample_millivolts(self.millivolts(), self.rate_hz, rate_hz)
        signal_LT, scale_L = quantise(resampled_mv_LT)
        return replace(self, signal_LT=signal_LT, scale_L=scale_L, rate_hz=rate_hz)


def resample_millivolts(signal_mv_LT: Floats, from_hz: float, to_hz: float) -> Floats:
    """Polyphase resampling along time. The ends are continued by a line so that an offset leaves no step there."""
    ratio = (Fraction(to_hz) / Fraction(from_hz)).limit_denominator(1000)
    if ratio == 0 or abs(float(ratio) * from_hz / to_hz - 1) > 1e-6:
        raise InputError(f"cannot resample from {from_hz:g} Hz to {to_hz:g} Hz: no ratio of whole numbers up to 1000")
    if ratio == 1:
        return signal_mv_LT
    # The filter's branches sum to 1 only to within 5e-4, so an offset of 20 mV would come out with a 10 µV ripple.
    offset_L1 = signal_mv_LT.mean(axis=1, keepdims=True, dtype=np.float64)
    centred_LT = signal_mv_LT - offset_L1
    from scipy.signal import resample_poly  # imports slowly, and training never resamples

    resampled = resample_poly(centred_LT, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    return np.asarray(resampled + offset_L1, np.float32)


def quantise(signal_mv_LT: npt.NDArray[np.floating]) -> tuple[Counts, Floats]:
    """mV -> (int16 counts (L, T), mV per count (L,)): 1 µV per count, coarser for a lead that would not fit.

    Raises InputError for NaN or infinity.
    """
    if not np.isfinite(signal_mv_LT).all():
        raise InputError("the signal holds NaN or infinity; all samples must be finite millivolts")
    peak_L = np.abs(signal_mv_LT).max(axis=1, initial=0.0)
    scale_L = np.maximum(_DEFAULT_SCALE_MV, peak_L / _INT16_MAX).astype(np.float32)
    counts_LT = np.rint(signal_mv_LT / scale_L[:, None].astype(np.float64))
    return np.clip(counts_LT, -_INT16_MAX, _INT16_MAX).astype(np.int16), scale_L  # clip: float32 rounding of the peak


def fit_counts(counts_LT: npt.NDArray[np.integer], scale_L: npt.NDArray[np.floating]) -> tuple[Counts, Floats]:
    """Baseline-free counts of any width -> int16 with mV per count.

    Exact where a lead fits into int16. A lead that does not is requantised to the coarser scale at which it does.
    """
    peak_L = np.abs(counts_LT.astype(np.int64)).max(axis=1, initial=0)
    coarser_L = np.maximum(1.0, peak_L / _INT16_MAX)
    scaled_LT = np.where((coarser_L == 1.0)[:, None], counts_LT, np.rint(counts_LT / coarser_L[:, None]))
    return scaled_LT.astype(np.int16), (scale_L * coarser_L).astype(np.float32)


def in_canonical_order(leads: Sequence[str]) -> list[int]:
    """Positions that bring canonical lead names into canonical order."""
    return sorted(range(len(leads)), key=lambda i: LEADS.index(leads[i]))


def patient_code(dataset: str, patient: str | None, record_name: str) -> int:
    """A 63-bit number that stands for (data set, patient); for an unknown patient it is unique to the record."""
    person = f"patient\0{dataset}\0{patient}" if patient is not None else f"record\0{dataset}\0{record_name}"
    return int.from_bytes(hashlib.blake2b(person.encode(), digest_size=8).digest(), "little") >> 1
