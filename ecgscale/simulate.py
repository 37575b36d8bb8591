"""Synthetic, labelled 12-lead ECGs with patients, rhythms and noise: data that needs no download.

The model, in mV, s and Hz. A heart is a dipole that moves in the Frank directions x (left), y (down) and z
(to the back), as in McSharry et al. (2003) and Sameni et al. (2007). P, QRS and T are sums of Gaussians in
time, each with a direction. I, II and V1 to V6 see the dipole through Dower's matrix (Dower et al. 1980),
the other four leads follow from I and II. A *patient* has own waves, axis, thorax, conduction times, heart
rate and recorder. A *session* moves electrodes and heart rate a little, and draws beats and noise. Heart
rate and amplitudes vary with respiration; QT follows RR by the cube root (Fridericia 1920). Noise arises at
the nine electrodes, as in a real recorder, so Einthoven's and Goldberger's laws hold for it too; only a
lead that comes loose breaks them.

What this is not: a physiological model. Numbers without a citation were chosen so that the tracings look
right and the classes overlap, as clinical ones do: blocks may be incomplete, sinus rhythm may hold atrial
premature beats, and the label names one rhythm only. A result on these recordings shows that a pipeline
learns, no more.

Shape suffixes: B beats, W waves, P parameters of a wave, X directions of the dipole, K samples of a window,
C the 8 measured channels, E electrodes, F frequencies, N knots, L leads, T samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, timedelta
from math import ceil, pi

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.noise import electrode_noise, seen_by_channels
from ecgscale.record import Floats, Record

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rng = np.random.Generator


@dataclass(frozen=True)
class Rhythm:
    """A class: its SNOMED CT code in the PhysioNet/CinC Challenge 2021 and its mean ventricular rates."""

    snomed: str
    rate_bpm: tuple[float, float]
    otherwise: str | None = None  # what its patients show in sessions without it; None: it never leaves


# The names are those of the challenge's table of scored diagnoses.
RHYTHMS = {
    "sinus rhythm": Rhythm("426783006", (60, 100), otherwise="sinus bradycardia"),
    "sinus bradycardia": Rhythm("426177001", (40, 60), otherwise="sinus rhythm"),
    "atrial fibrillation": Rhythm("164889003", (60, 140), otherwise="sinus rhythm"),
    "atrial flutter": Rhythm("164890007", (60, 165), otherwise="atrial fibrillation"),
    "1st degree av block": Rhythm("270492004", (52, 92)),
    "complete left bundle branch block": Rhythm("733534002", (55, 100)),
    "complete right bundle branch block": Rhythm("713427006", (55, 100)),
    "premature ventricular contractions": Rhythm("427172004", (60, 95), otherwise="sinus rhythm"),
}
_OTHERWISE_PROBABILITY = 0.15

# What I, II, V1..V6 see of x, y and z (Dower et al. 1980).
_DOWER_CX = np.array(
    [
        [0.632, 0.235, -0.515, 0.044, 0.882, 1.213, 1.125, 0.831],
        [-0.235, 1.066, 0.157, 0.164, 0.098, 0.127, 0.127, 0.076],
        [0.059, -0.132, -0.917, -1.387, -1.277, -0.601, -0.086, 0.230],
    ]
).T

# One wave per row: centre and width (standard deviation) in ms, then x, y, z in mV.
# P counts from the onset of P, QRS from the R peak, T from the end of T.
_P_WP = np.array([[38, 15, 0.03, 0.085, -0.05], [66, 17, 0.065, 0.06, 0.045]])
_SEPTUM_P, _WALL_P = [-22, 7, -0.12, -0.04, -0.20], [0, 10, 0.95, 0.70, 0.42]
_QRS_WP = np.array([_SEPTUM_P, _WALL_P, [22, 10, -0.05, -0.12, 0.42], [40, 12, 0, 0, 0]])
_T_WP = np.array([[-145, 48, 0.10, 0.08, -0.08], [-85, 35, 0.24, 0.19, -0.19]])
_LEFT_BLOCK_QRS_WP = np.array(
    [[-20, 13, 0.40, 0.20, 0.35], [20, 18, 0.55, 0.25, 0.65], [62, 20, 0.60, 0.05, 0.55], [40, 12, 0, 0, 0]]
)
_LEFT_BLOCK_T_WP = np.array([[-165, 60, -0.14, 0.0, -0.26], [-85, 40, -0.26, -0.05, -0.28]])
_RIGHT_BLOCK_QRS_WP = np.array([_SEPTUM_P, _WALL_P, [22, 10, 0.05, -0.05, 0.25], [58, 17, -0.42, -0.05, -0.52]])
_RIGHT_BLOCK_T_WP = np.array([[-145, 48, 0.12, 0.08, 0.06], [-85, 35, 0.26, 0.18, 0.10]])
_PVC_QRS_WP = np.array([[-15, 22, 0.65, 0.55, 0.70], [38, 27, 0.55, 0.45, 0.80]])
_PVC_T_WP = np.array([[-60, 55, -0.25, -0.2, -0.3], [0, 42, -0.25, -0.2, -0.3]])
_QRS_ONSET_S = -0.04
_FIBRILLATION_FX = np.array([[-0.3, 0.6, -0.8], [0.2, 0.7, -0.4]])
_FLUTTER_X1 = np.array([[-0.1], [-0.95], [-0.3]])
_FLUTTER_RATIOS = ((4,), (4,), (3,), (2,), (2, 4), (3, 4), (2, 3, 4))  # flutter waves per ventricular beat
_FIRST_DAY = date(2015, 1, 1)


@dataclass(frozen=True)
class _Patient:
    condition: str
    age: int
    sex: str
    first_day: int  # days after _FIRST_DAY
    mains_hz: float
    count_mv: float  # resolution of the recorder
    respiration_hz: float
    rate_quantile: float  # where the heart rate stands between the bounds of a rhythm
    pr_s: float
    qtc_s: float
    atrial_mv: float  # size of fibrillatory and flutter waves
    p_WP: Array
    qrs_WP: Array
    t_WP: Array
    pvc_qrs_WP: Array
    pvc_t_WP: Array
    leads_CX: Array


def _generator(seed: int, purpose: int, high: int, low: int) -> Rng:
    """Streams that never meet: the counter's first word counts draws, the others name the stream."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, low, high, purpose]))


def _personal(table_WP: Array, size: float, rng: Rng) -> Array:
    """One patient's version of a wave: own duration, amplitudes and directions."""
    personal_WP = table_WP.copy()
    personal_WP[:, :2] *= np.exp(rng.normal(0.0, 0.1))
    personal_WP[:, 2:] *= np.exp(rng.normal(0.0, size, (len(table_WP), 1)))
    personal_WP[:, 2:] += rng.normal(0.0, 0.1 * np.abs(table_WP[:, 2:]).max(), (len(table_WP), 3))
    return personal_WP


def _conduction(condition: str, rng: Rng) -> tuple[Array, Array, float]:
    """QRS, T and how far a bundle branch is blocked: completely, or in part in some who lack that label."""
    right = condition == "complete right bundle branch block"
    complete = right or condition == "complete left bundle branch block"
    right = right or (not complete and rng.random() < 0.5)
    block = rng.uniform(0.6, 1.05) if complete else rng.uniform(0.1, 0.55) * (rng.random() < 0.35)
    qrs_WP, t_WP = (_RIGHT_BLOCK_QRS_WP, _RIGHT_BLOCK_T_WP) if right else (_LEFT_BLOCK_QRS_WP, _LEFT_BLOCK_T_WP)
    return _QRS_WP + block * (qrs_WP - _QRS_WP), _T_WP + block * (t_WP - _T_WP), block


def _thorax(rng: Rng) -> Array:
    """(C, X) what this patient's leads see: Dower's matrix, a heart turned by an own axis, an own build."""
    frontal, horizontal = rng.normal(0.0, 0.4), rng.normal(0.0, 0.25)
    cos_f, sin_f, cos_h, sin_h = np.cos(frontal), np.sin(frontal), np.cos(horizontal), np.sin(horizontal)
    turn_frontal_XX = np.array([[cos_f, -sin_f, 0], [sin_f, cos_f, 0], [0, 0, 1]])
    turn_horizontal_XX = np.array([[cos_h, 0, -sin_h], [0, 1, 0], [sin_h, 0, cos_h]])
    build_C1 = np.exp(rng.normal(0.0, 0.12, (8, 1)))
    turned_CX: Array = _DOWER_CX @ turn_frontal_XX @ turn_horizontal_XX
    return turned_CX * build_C1 + rng.normal(0.0, 0.06, (8, 3))


def _patient(seed: int, number: int) -> _Patient:
    # Each run of as many patients as there are rhythms holds every rhythm once, in an order of its own.
    block_number, place = divmod(number, len(RHYTHMS))
    condition = list(RHYTHMS)[_generator(seed, 0, 0, block_number).permutation(len(RHYTHMS))[place]]
    rng = _generator(seed, 1, 0, number)
    qrs_WP, t_WP, block = _conduction(condition, rng)
    female = rng.random() < 0.5
    # A focus in the right ventricle sends the dipole left and back, one in the left right and front.
    side, height = rng.choice([-1.0, 1.0], 2)
    focus_P = [1.0, 1.0, side, side * height, side]
    return _Patient(
        condition=condition,
        age=int(np.clip(rng.normal(61, 15), 18, 95)),
        sex="female" if female else "male",
        first_day=int(rng.integers(2000)),
        mains_hz=rng.choice([50.0, 60.0]),
        count_mv=rng.choice([1e-3, 2.5e-3, 4.88e-3]),
        respiration_hz=rng.uniform(0.18, 0.32),
        rate_quantile=rng.beta(1.4, 1.4),
        pr_s=rng.uniform(0.2, 0.29) if condition == "1st degree av block" else rng.uniform(0.13, 0.2),
        qtc_s=rng.normal(0.405 + 0.01 * female, 0.016) + 0.045 * block,
        atrial_mv=0.035 * np.exp(rng.normal(0.0, 0.35)),
        p_WP=_personal(_P_WP, 0.3, rng),
        qrs_WP=_personal(qrs_WP, 0.22, rng),
        t_WP=_personal(t_WP, 0.35, rng),
        pvc_qrs_WP=_personal(_PVC_QRS_WP * focus_P, 0.25, rng),
        pvc_t_WP=_personal(_PVC_T_WP * focus_P, 0.25, rng),
        leads_CX=_thorax(rng),
    )


def _flutter_hz(quantile: float) -> float:
    return 4.2 + 1.3 * quantile


def _beat_times(rhythm: str, quantile: float, respiration_hz: float, end_s: float, rng: Rng) -> Array:
    """R peaks (s) from at least one second before the recording to ``end_s``."""
    slowest, fastest = RHYTHMS[rhythm].rate_bpm
    rr_s = 60.0 / (slowest + (fastest - slowest) * quantile)
    n_beats = ceil(5.0 * (end_s + 4.0))  # enough at any rate
    if rhythm == "atrial fibrillation":
        shortest_s, spread_s = 0.26, rng.uniform(0.1, 0.24) * rr_s
        shape = ((rr_s - shortest_s) / spread_s) ** 2
        rr_B = shortest_s + rng.gamma(shape, (rr_s - shortest_s) / shape, n_beats)
    elif rhythm == "atrial flutter":
        ratio_B = rng.choice(_FLUTTER_RATIOS[rng.integers(len(_FLUTTER_RATIOS))], n_beats)
        rr_B = ratio_B / _flutter_hz(quantile) + rng.normal(0.0, 0.004, n_beats)
    else:
        breath_B = np.sin(2 * pi * respiration_hz * rr_s * np.arange(n_beats) + rng.uniform(0, 2 * pi))
        rr_B = rr_s * (1.0 + rng.uniform(0.005, 0.06) * breath_B + rng.normal(0.0, 0.015, n_beats))
    time_B: Array = np.cumsum(rr_B) - rr_B[0] - 1.0 - rr_s * rng.random()
    return time_B[time_B < end_s]


def _make_premature(time_B: Array, ventricular: bool, duration_s: float, rng: Rng) -> Bools:
    """Bring at least one beat inside the recording forward, in place, and say which.

    After a ventricular one the next keeps its time, a full compensatory pause; an atrial one resets the
    sinus node.
    """
    premature_B = np.zeros(len(time_B), dtype=bool)
    inside = np.flatnonzero((time_B > 0.6) & (time_B < duration_s - 0.6))[:: rng.integers(2, 4)]
    for beat in rng.choice(inside, min(len(inside), 1 + rng.poisson(0.1 * duration_s)), replace=False):
        premature_B[beat] = True
        early_s = rng.uniform(0.25, 0.42) * (time_B[beat] - time_B[beat - 1])
        time_B[beat] -= early_s
        if not ventricular:
            time_B[beat + 1 :] -= rng.uniform(0.3, 1.0) * early_s
    return premature_B


def _wave_train(anchor_B: Array, table_WP: Array, gain_BX: Array, n_samples: int, rate_hz: float) -> Array:
    """(X, T) dipole in mV: every wave of the table at every anchor (s), evaluated on windows of ±4 widths."""
    centre_BW = anchor_B[:, None] + table_WP[:, 0] / 1000
    width_W = table_WP[:, 1] / 1000
    reach = ceil(4 * width_W.max() * rate_hz)
    sample_BWK = np.rint(centre_BW * rate_hz).astype(np.int64)[..., None] + np.arange(-reach, reach + 1)
    gauss_BWK = np.exp(-0.5 * ((sample_BWK / rate_hz - centre_BW[..., None]) / width_W[:, None]) ** 2)
    size_XBW = (gain_BX[:, None, :] * table_WP[:, 2:]).transpose(2, 0, 1)
    # Places 0 and T + 1 collect what lies outside of the recording.
    place = (np.clip(sample_BWK, -1, n_samples) + 1).ravel()
    waves = [(gauss_BWK * size_BW[..., None]).ravel() for size_BW in size_XBW]
    return np.stack([np.bincount(place, wave, n_samples + 2)[1:-1] for wave in waves])


def _atrial_waves(rhythm: str, size_mv: float, flutter_hz: float, time_T: Array, rng: Rng) -> Array:
    """(X, T) dipole in mV of flutter, a sawtooth from time 0 on, or fibrillation, wandering 4.5 to 8 Hz."""
    if rhythm == "atrial flutter":
        turn_T = 2 * pi * flutter_hz * time_T
        return 1.6 * size_mv * _FLUTTER_X1 * (np.sin(turn_T) + np.sin(2 * turn_T) / 2 + np.sin(3 * turn_T) / 3)
    slow_hz, phase = rng.uniform(0.1, 0.6, (2, 2, 1)), rng.uniform(0, 2 * pi, (2, 2, 1))
    drift_FT, swell_FT = np.sin(2 * pi * slow_hz * time_T + phase)
    turn_FT = 2 * pi * rng.uniform(4.5, 8.0, (2, 1)) * time_T + 3.0 * drift_FT
    wave_FT = (1.0 + 0.5 * swell_FT) * (np.sin(turn_FT) + 0.35 * np.sin(2 * turn_FT))
    fibrillation_XT: Array = size_mv * np.einsum("FX,FT->XT", _FIBRILLATION_FX, wave_FT)
    return fibrillation_XT


def _dipole(rhythm: str, patient: _Patient, time_T: Array, rate_hz: float, rng: Rng) -> Array:
    """(X, T) in mV: what the heart does in one session."""
    n_samples, duration_s = len(time_T), len(time_T) / rate_hz
    quantile = float(np.clip(patient.rate_quantile + rng.normal(0.0, 0.1), 0.0, 1.0))
    beat_B = _beat_times(rhythm, quantile, patient.respiration_hz, duration_s + 1.0, rng)
    atria_beat = rhythm not in ("atrial fibrillation", "atrial flutter")
    ectopic_B = np.zeros(len(beat_B), dtype=bool)
    if rhythm == "premature ventricular contractions":
        ectopic_B = _make_premature(beat_B, True, duration_s, rng)
    elif atria_beat and rng.random() < 0.2:  # so that an early beat alone does not give the class away
        _make_premature(beat_B, False, duration_s, rng)

    breath_B1 = np.sin(2 * pi * patient.respiration_hz * beat_B + rng.uniform(0, 2 * pi))[:, None]
    gain_BX = 1.0 + rng.normal(0.0, 0.06, 3) * breath_B1 + rng.normal(0.0, 0.02, (len(beat_B), 3))
    rr_B = np.diff(beat_B, prepend=2 * beat_B[0] - beat_B[1])
    # QT follows a change of heart rate slowly: half of it is given by the mean interval.
    t_end_B = beat_B + _QRS_ONSET_S + patient.qtc_s * np.cbrt(0.5 * (rr_B + rr_B.mean()))
    trains = [
        (beat_B, patient.qrs_WP, ~ectopic_B),
        (t_end_B, patient.t_WP, ~ectopic_B),
        (beat_B, patient.pvc_qrs_WP, ectopic_B),
        (t_end_B, patient.pvc_t_WP, ectopic_B),
        (beat_B + _QRS_ONSET_S - patient.pr_s, patient.p_WP, ~ectopic_B & atria_beat),
    ]
    dipole_XT = np.zeros((3, n_samples))
    for anchor_B, table_WP, here_B in trains:
        if here_B.any():
            dipole_XT += _wave_train(anchor_B[here_B], table_WP, gain_BX[here_B], n_samples, rate_hz)
    if not atria_beat:
        dipole_XT += _atrial_waves(rhythm, patient.atrial_mv, _flutter_hz(quantile), time_T - beat_B[0], rng)
    return dipole_XT


def _twelve_leads(channel_CT: Array) -> Floats:
    """I, II, V1..V6 -> the twelve leads, by Einthoven's and Goldberger's laws."""
    one_T, two_T = channel_CT[:2]
    augmented = [-(one_T + two_T) / 2, one_T - two_T / 2, two_T - one_T / 2]
    lead_LT = [one_T, two_T, two_T - one_T, *augmented, *channel_CT[2:]]
    return np.stack(lead_LT, dtype=np.float32, casting="same_kind")


@dataclass(frozen=True)
class Simulation:
    """A data set of synthetic recordings, one item per session of a patient.

    ``read`` is a pure function of ``seed``, ``duration_s``, ``rate_hz``, ``noise`` and the item: the order,
    the process and the number of patients or sessions change nothing. Raises InputError for a field out of
    range.
    """

    dataset: str = "simulated"
    patients: int = 400
    records_per_patient: int = 2
    seed: int = 0
    duration_s: float = 10.0
    rate_hz: float = 500.0
    noise: float = 1.0  # scales all noise; 0 leaves the beats' own variability and the quantisation

    def __post_init__(self) -> None:
        if not self.dataset:
            raise InputError("dataset is empty; give the data set a name")
        for name, least, most in (
            ("patients", 1, 10**8),
            ("records_per_patient", 1, 1000),
            ("seed", 0, 2**64 - 1),
            ("duration_s", 5.0, 3600.0),
            ("rate_hz", 100.0, 4000.0),
            ("noise", 0.0, 100.0),
        ):
            value, whole = getattr(self, name), isinstance(least, int)
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not (number and least <= value <= most):
                kind = "a whole number" if whole else "a number"
                raise InputError(f"{name} is {value!r}; it must be {kind} between {least} and {most}")

    def items(self) -> list[str]:
        """Sorted names, ``"p00017/s01"``: patients and sessions count from 0."""
        patients, sessions = range(self.patients), range(self.records_per_patient)
        return sorted(f"p{patient:05d}/s{session:02d}" for patient in patients for session in sessions)

    def read(self, item: str) -> Record:
        """The recording of one item; raises InputError for an item that the data set does not hold."""
        number, session = self._parse(item)
        patient, rng = _patient(self.seed, number), _generator(self.seed, 2, number, session)
        otherwise = RHYTHMS[patient.condition].otherwise
        absent = otherwise is not None and rng.random() < _OTHERWISE_PROBABILITY
        rhythm = otherwise if otherwise is not None and absent else patient.condition
        day = _FIRST_DAY + timedelta(days=patient.first_day + 30 * session + int(rng.integers(30)))

        leads_CX = patient.leads_CX * np.exp(rng.normal(0.0, 0.05))
        leads_CX[2:] += rng.normal(0.0, 0.06, (6, 3))  # no electrode sticks twice at the same place
        time_T = np.arange(round(self.duration_s * self.rate_hz)) / self.rate_hz
        channel_CT = np.einsum("CX,XT->CT", leads_CX, _dipole(rhythm, patient, time_T, self.rate_hz, rng))
        if self.noise:
            electrode_ET = electrode_noise(time_T, patient.respiration_hz, patient.mains_hz, rng)
            channel_CT += self.noise * seen_by_channels(electrode_ET)
        channel_CT /= patient.count_mv
        count_LT = _twelve_leads(channel_CT)
        if rng.random() < 0.04 * self.noise:  # a lead comes loose, at once or on the way
            start = int(rng.integers(2) * rng.integers(len(time_T)))
            count_LT[rng.integers(len(LEADS)), start:] = 0.0
        np.rint(count_LT, out=count_LT)
        np.clip(count_LT, -32767, 32767, out=count_LT)  # the recorder saturates, at 32 mV or more
        return Record(
            name=item,
            signal_LT=count_LT.astype(np.int16),
            scale_L=np.full(len(LEADS), patient.count_mv, dtype=np.float32),
            rate_hz=float(self.rate_hz),
            leads=LEADS,
            patient=item.split("/")[0],
            labels={"rhythm": [rhythm], "Dx": [RHYTHMS[rhythm].snomed]},
            metadata={"age": str(patient.age), "sex": patient.sex, "session": day.isoformat()},
        )

    def _parse(self, item: str) -> tuple[int, int]:
        match = re.fullmatch(r"p([0-9]{5,})/s([0-9]{2,})", item)
        number, session = (int(digits) for digits in match.groups()) if match else (-1, -1)
        canonical = item == f"p{number:05d}/s{session:02d}"
        if not (canonical and number < self.patients and session < self.records_per_patient):
            last = f"p{self.patients - 1:05d}/s{self.records_per_patient - 1:02d}"
            raise InputError(f"no item {item!r} in {self.dataset}; the items run from p00000/s00 to {last}")
        return number, session
