"""Synthetic, labelled 12-lead ECGs with patients, rhythms and noise: data that needs no download.

The model, in mV, seconds and Hz. A heart is a dipole that moves in the three Frank directions x (left), y (down)
and z (to the back), as in McSharry et al. (2003) and Sameni et al. (2007). P, QRS and T are sums of Gaussians in
time, each with a direction. The leads I, II and V1 to V6 see the dipole through Dower's matrix (Dower et al. 1980),
the other four follow from I and II. A *patient* has own waves, axes, thorax, conduction times, heart rate and
recorder. A *session* moves electrodes, posture and heart rate a little, and draws beats and noise. Heart rate
varies with respiration, QT follows RR by the cube root (Fridericia 1920). Noise arises at the nine electrodes, as
in a real recorder, so Einthoven's and Goldberger's laws hold for it too; only a lead that comes loose breaks them.

What this is not: a physiological model. Numbers without a citation were chosen so that the tracings look right and
the classes overlap when noisy, as clinical data do. A result on these recordings shows that a pipeline learns, not
that it would help a patient.

Shape suffixes: B beats, W waves, P the parameters of a wave, X directions of the dipole, K window samples,
C the 8 measured channels, E electrodes, F frequencies, L leads, T samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, timedelta
from math import ceil, isfinite, pi

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError
from ecgscale.record import LEADS, Record, fit_counts

Array = npt.NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True)
class Rhythm:
    """A class: its SNOMED CT code in the PhysioNet/CinC Challenge 2021 and its mean ventricular rates."""

    snomed: str
    rate_bpm: tuple[float, float]
    otherwise: str | None = None  # what a patient shows in sessions without this rhythm; None: chronic


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

# Dower et al. (1980): what the channels I, II, V1..V6 see of a dipole (x left, y down, z back).
_DOWER_CX = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)

# One wave per row: centre and width (standard deviation) in ms, then the dipole x, y, z in mV.
# P counts from the onset of P, QRS from the R peak, T from the end of T.
_P_WP = np.array([[38, 15, 0.03, 0.085, -0.05], [66, 17, 0.065, 0.06, 0.045]])
_QRS_WP = np.array(
    [
        [-22, 7, -0.12, -0.04, -0.20],
        [0, 10, 0.95, 0.70, 0.42],
        [22, 10, -0.05, -0.12, 0.42],
        [40, 12, 0, 0, 0],
    ]
)
_T_WP = np.array([[-145, 48, 0.10, 0.08, -0.08], [-85, 35, 0.24, 0.19, -0.19]])
_LEFT_BLOCK_QRS_WP = np.array(
    [[-20, 13, 0.40, 0.20, 0.35], [20, 18, 0.55, 0.25, 0.65], [62, 20, 0.60, 0.05, 0.55], [40, 12, 0, 0, 0]]
)
_LEFT_BLOCK_T_WP = np.array([[-165, 60, -0.14, 0.0, -0.26], [-85, 40, -0.26, -0.05, -0.28]])
_RIGHT_BLOCK_QRS_WP = np.array([*_QRS_WP[:2], [22, 10, 0.05, -0.05, 0.25], [58, 17, -0.42, -0.05, -0.52]])
_RIGHT_BLOCK_T_WP = np.array([[-145, 48, 0.12, 0.08, 0.06], [-85, 35, 0.26, 0.18, 0.10]])
_PVC_QRS_WP = np.array([[-15, 22, 0.65, 0.55, 0.70], [38, 27, 0.55, 0.45, 0.80]])
_PVC_T_WP = np.array([[-150, 55, -0.25, -0.2, -0.3], [-90, 42, -0.25, -0.2, -0.3]])
_QRS_ONSET_S = -0.04
_FIBRILLATION_AXES_FX = np.array([[-0.3, 0.6, -0.8], [0.2, 0.7, -0.4]])
_FLUTTER_AXIS_X = np.array([-0.1, -0.95, -0.3])
_FLUTTER_RATIOS = ((4,), (4,), (3,), (2,), (2, 4), (3, 4), (2, 3, 4))  # flutter waves per ventricular beat
_FIRST_DAY = date(2015, 1, 1)


@dataclass(frozen=True)
class _Patient:
    condition: str
    age: int
    female: bool
    first_day: int  # days after _FIRST_DAY
    mains_hz: float
    count_mv: float  # resolution of the recorder
    respiration_hz: float
    rate_quantile: float  # where the heart rate stands between the bounds of a rhythm
    pr_s: float
    qtc_s: float
    atrial_mv: float  # amplitude of fibrillatory and flutter waves
    p_WP: Array
    qrs_WP: Array
    t_WP: Array
    pvc_qrs_WP: Array
    pvc_t_WP: Array
    leads_CX: Array


def _generator(seed: int, purpose: int, high: int, low: int) -> Rng:
    """Streams that never meet: the counter's last word counts draws, the others name the stream."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, low, high, purpose]))


def _rotated(table_WP: Array, frontal: float, horizontal: float) -> Array:
    """The waves turned in the frontal (x, y) and the horizontal (x, z) plane, by radians."""
    rotated_WP = table_WP.copy()
    for angle, other in ((frontal, 3), (horizontal, 4)):
        x_W, o_W = rotated_WP[:, 2].copy(), rotated_WP[:, other].copy()
        rotated_WP[:, 2] = np.cos(angle) * x_W - np.sin(angle) * o_W
        rotated_WP[:, other] = np.sin(angle) * x_W + np.cos(angle) * o_W
    return rotated_WP


def _personal(table_WP: Array, rng: Rng, size: float, stretch: float) -> Array:
    """One patient's version of a wave: own amplitudes, duration and directions."""
    personal_WP = table_WP.copy()
    personal_WP[:, :2] *= np.exp(stretch * rng.standard_normal())
    personal_WP[:, 2:] *= np.exp(size * rng.standard_normal((len(table_WP), 1)))
    reach = np.abs(table_WP[:, 2:]).max()
    personal_WP[:, 2:] += 0.08 * reach * rng.standard_normal((len(table_WP), 3))
    return personal_WP


def _conduction(condition: str, rng: Rng) -> tuple[Array, Array, float]:
    """QRS, T and degree of the block of a bundle branch: complete, or incomplete in some without that label."""
    right = condition == "complete right bundle branch block"
    if right or condition == "complete left bundle branch block":
        block = rng.uniform(0.55, 1.1)
    else:
        right = bool(rng.random() < 0.5)
        block = rng.uniform(0.1, 0.55) if rng.random() < 0.3 else 0.0
    full_qrs_WP = _RIGHT_BLOCK_QRS_WP if right else _LEFT_BLOCK_QRS_WP
    full_t_WP = _RIGHT_BLOCK_T_WP if right else _LEFT_BLOCK_T_WP
    return _QRS_WP + block * (full_qrs_WP - _QRS_WP), _T_WP + block * (full_t_WP - _T_WP), block


def _patient(seed: int, number: int) -> _Patient:
    names = list(RHYTHMS)
    # Each run of as many patients as there are classes holds every class once, in an order of its own.
    block, place = divmod(number, len(names))
    condition = names[_generator(seed, 0, 0, block).permutation(len(names))[place]]
    rng = _generator(seed, 1, 0, number)
    first_degree = condition == "1st degree av block"
    qrs_WP, t_WP, block = _conduction(condition, rng)
    frontal, horizontal = rng.normal(0.0, 0.45), rng.normal(0.0, 0.3)
    female = bool(rng.random() < 0.5)
    # A focus in the right ventricle sends the dipole left and back, one in the left ventricle right and front.
    focus_X = rng.choice([-1.0, 1.0]) * np.array([1.0, rng.choice([-1.0, 1.0]), 1.0])
    focus_P = np.concatenate([[1.0, 1.0], focus_X])
    return _Patient(
        condition=condition,
        age=int(np.clip(rng.normal(61, 15), 18, 95)),
        female=female,
        first_day=int(rng.integers(2000)),
        mains_hz=float(rng.choice([50.0, 60.0])),
        count_mv=float(rng.choice([1e-3, 2.5e-3, 4.88e-3])),
        respiration_hz=rng.uniform(0.18, 0.32),
        rate_quantile=rng.beta(1.4, 1.4),
        pr_s=rng.uniform(0.2, 0.29) if first_degree else rng.uniform(0.13, 0.2),
        qtc_s=rng.normal(0.405 + 0.01 * female, 0.016) + 0.045 * block,
        atrial_mv=0.035 * np.exp(rng.normal(0.0, 0.35)),
        p_WP=_rotated(_personal(_P_WP, rng, 0.3, 0.1), 0.4 * frontal, 0.4 * horizontal),
        qrs_WP=_rotated(_personal(qrs_WP, rng, 0.22, 0.1), frontal, horizontal),
        t_WP=_rotated(_personal(t_WP, rng, 0.35, 0.1), 0.7 * frontal, 0.7 * horizontal),
        pvc_qrs_WP=_personal(_PVC_QRS_WP * focus_P, rng, 0.25, 0.1),
        pvc_t_WP=_personal(_PVC_T_WP * focus_P, rng, 0.25, 0.1),
        leads_CX=_DOWER_CX * np.exp(rng.normal(0.0, 0.12, (8, 1))) + rng.normal(0.0, 0.06, (8, 3)),
    )


def _beat_times(rhythm: str, quantile: float, respiration_hz: float, end_s: float, rng: Rng) -> Array:
    """Times of the R peaks from about one second before the recording to ``end_s``."""
    slowest, fastest = RHYTHMS[rhythm].rate_bpm
    rr_s = 60.0 / (slowest + (fastest - slowest) * quantile)
    n_beats = ceil(2.0 * (end_s + 3.0) / min(rr_s, 0.5))
    if rhythm == "atrial fibrillation":
        shortest_s, spread_s = 0.26, rng.uniform(0.1, 0.24) * rr_s
        shape = ((rr_s - shortest_s) / spread_s) ** 2
        rr_B = shortest_s + rng.gamma(shape, (rr_s - shortest_s) / shape, n_beats)
    elif rhythm == "atrial flutter":
        ratio_B = rng.choice(_FLUTTER_RATIOS[rng.integers(len(_FLUTTER_RATIOS))], n_beats)
        rr_B = ratio_B / _flutter_hz(quantile) + 0.004 * rng.standard_normal(n_beats)
    else:
        breath_B = np.sin(2 * pi * respiration_hz * rr_s * np.arange(n_beats) + rng.uniform(0, 2 * pi))
        rr_B = rr_s * (1.0 + rng.uniform(0.005, 0.06) * breath_B + 0.015 * rng.standard_normal(n_beats))
    time_B: Array = np.cumsum(rr_B) - 1.0 - rr_s * (1.0 + rng.random())
    return time_B[time_B < end_s]


def _flutter_hz(quantile: float) -> float:
    return 4.2 + 1.3 * quantile


def _make_premature(time_B: Array, ventricular: bool, duration_s: float, rng: Rng) -> npt.NDArray[np.bool_]:
    """Bring some beats forward, in place, and say which.

    After a ventricular one the next keeps its time, a full compensatory pause; an atrial one resets the sinus node.
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
    # Places 0 and T + 1 collect what lies outside of the recording.
    place_N = (np.clip(sample_BWK, -1, n_samples) + 1).ravel()
    vector_BWX = gain_BX[:, None, :] * table_WP[:, 2:]
    dipole_XT = [
        np.bincount(place_N, (gauss_BWK * vector_BWX[..., axis, None]).ravel(), n_samples + 2)[1:-1]
        for axis in range(3)
    ]
    return np.stack(dipole_XT)


def _atrial_waves(
    rhythm: str, patient: _Patient, quantile: float, start_s: float, time_T: Array, rng: Rng
) -> Array:
    """(X, T) dipole in mV of fibrillation (wandering 4.5 to 8 Hz) or flutter (a sawtooth in step with the beats)."""
    if rhythm == "atrial flutter":
        angle_T = 2 * pi * _flutter_hz(quantile) * (time_T - start_s)
        saw_T = sum(np.sin(k * angle_T) / k for k in (1, 2, 3))
        return 1.6 * patient.atrial_mv * _FLUTTER_AXIS_X[:, None] * saw_T
    hz_F1 = rng.uniform(4.5, 8.0, (2, 1))
    drift_FT = np.sin(2 * pi * rng.uniform(0.2, 0.7, (2, 1)) * time_T + rng.uniform(0, 2 * pi, (2, 1)))
    swell_FT = np.sin(2 * pi * rng.uniform(0.1, 0.5, (2, 1)) * time_T + rng.uniform(0, 2 * pi, (2, 1)))
    angle_FT = 2 * pi * hz_F1 * time_T + 3.0 * drift_FT
    wave_FT = (1.0 + 0.5 * swell_FT) * (np.sin(angle_FT) + 0.35 * np.sin(2 * angle_FT))
    fibrillation_XT: Array = patient.atrial_mv * np.einsum("FX,FT->XT", _FIBRILLATION_AXES_FX, wave_FT)
    return fibrillation_XT


def _dipole(rhythm: str, patient: _Patient, time_T: Array, rate_hz: float, rng: Rng) -> Array:
    """(X, T) in mV: one session of this heart."""
    n_samples, duration_s = len(time_T), len(time_T) / rate_hz
    quantile = float(np.clip(patient.rate_quantile + 0.1 * rng.standard_normal(), 0.0, 1.0))
    beat_B = _beat_times(rhythm, quantile, patient.respiration_hz, duration_s + 1.0, rng)
    premature_B = np.zeros(len(beat_B), dtype=bool)
    atrial = rhythm in ("atrial fibrillation", "atrial flutter")
    if rhythm == "premature ventricular contractions":
        premature_B = _make_premature(beat_B, True, duration_s, rng)
    elif (
        not atrial and rng.random() < 0.2
    ):  # narrow premature beats, so that an early beat alone tells nothing
        _make_premature(beat_B, False, duration_s, rng)
    breath_B = np.sin(2 * pi * patient.respiration_hz * beat_B + rng.uniform(0, 2 * pi))
    depth_X = rng.normal(0.0, 0.06, 3)  # respiration turns and scales the heart
    gain_BX = 1.0 + depth_X * breath_B[:, None] + 0.02 * rng.standard_normal((len(beat_B), 3))

    rr_B = np.diff(beat_B, prepend=2 * beat_B[0] - beat_B[1])
    # The ventricle remembers: QT follows this beat's interval only in part.
    t_end_B = beat_B + _QRS_ONSET_S + patient.qtc_s * np.cbrt(0.5 * (rr_B + rr_B.mean()))
    p_B = beat_B + _QRS_ONSET_S - patient.pr_s
    trains = [
        (beat_B, patient.qrs_WP, ~premature_B),
        (t_end_B, patient.t_WP, ~premature_B),
        (beat_B, patient.pvc_qrs_WP, premature_B),
        (t_end_B + 0.09, patient.pvc_t_WP, premature_B),
    ]
    if not atrial:
        trains.append((p_B, patient.p_WP, ~premature_B))
    dipole_XT = np.zeros((3, n_samples))
    for anchor_B, table_WP, here_B in trains:
        if here_B.any():
            dipole_XT += _wave_train(anchor_B[here_B], table_WP, gain_BX[here_B], n_samples, rate_hz)
    if atrial:
        dipole_XT += _atrial_waves(rhythm, patient, quantile, float(beat_B[0]), time_T, rng)
    return dipole_XT


def _electrode_noise(patient: _Patient, time_T: Array, rng: Rng) -> Array:
    """(9, T) potentials in mV at RA, LA, LL, V1..V6: wander, mains, muscle, offsets and electrode motion."""
    n_samples, duration_s = len(time_T), float(time_T[-1])
    severity = np.exp(rng.normal(0.0, 0.6))
    hz_F1 = np.array([patient.respiration_hz, *rng.uniform(0.05, 0.5, 3)])[:, None]
    wander_FT = np.sin(2 * pi * hz_F1 * time_T + rng.uniform(0, 2 * pi, (4, 1)))
    # The mains frequency drifts by some 10 mHz over tens of seconds.
    mains_T = 2 * pi * patient.mains_hz * time_T + 1.5 * np.sin(
        2 * pi * 0.03 * time_T + rng.uniform(0, 2 * pi)
    )
    slow_FT = np.stack([*wander_FT, np.sin(mains_T), np.cos(mains_T), np.sin(3 * mains_T)])
    size_F = severity * np.array([0.05, 0.04, 0.04, 0.04, 0.006, 0.006, 0.002])
    noise_ET: Array = np.einsum("EF,FT->ET", size_F * rng.standard_normal((9, 7)), slow_FT)

    # What moving skin adds lies in the band of P, T and fibrillatory waves: no filter takes it out.
    knot_s = np.arange(0.0, duration_s + 0.1, 0.05)
    skin_ET = np.stack(
        [np.interp(time_T, knot_s, knot_N) for knot_N in rng.standard_normal((9, len(knot_s)))]
    )
    noise_ET += 0.035 * severity * skin_ET

    burst_E = np.exp(rng.normal(0.0, 0.4, (9, 1)))
    burst_T = np.full(n_samples, 1.0)
    for _ in range(rng.poisson(0.08 * duration_s)):
        burst_T += 3.0 * np.exp(-0.5 * ((time_T - rng.uniform(0, duration_s)) / rng.uniform(0.15, 0.6)) ** 2)
    white_ET = rng.standard_normal((9, n_samples + 1), dtype=np.float32)
    noise_ET += 0.012 * severity * burst_E * burst_T * (white_ET[:, 1:] - 0.5 * white_ET[:, :-1])

    if rng.random() < 0.2:  # an electrode moves: a step that the recorder's high-pass lets decay
        since_T = time_T - rng.uniform(0, duration_s)
        step_T = np.where(since_T > 0, np.exp(-np.maximum(since_T, 0) / rng.uniform(0.2, 1.5)), 0.0)
        noise_ET[rng.integers(9)] += rng.normal(0.0, 0.5) * step_T
    if rng.random() < 0.3:  # half-cell potentials
        noise_ET += rng.normal(0.0, 0.2, (9, 1))
    return noise_ET


def _seen_by_channels(electrode_ET: Array) -> Array:
    """RA, LA, LL, V1..V6 -> I, II, V1..V6; the chest leads against Wilson's central terminal."""
    right_arm_T, left_arm_T, leg_T = electrode_ET[:3]
    wilson_T = (right_arm_T + left_arm_T + leg_T) / 3
    return np.stack([left_arm_T - right_arm_T, leg_T - right_arm_T, *(electrode_ET[3:] - wilson_T)])


def _twelve_leads(channel_CT: Array) -> Array:
    """I, II, V1..V6 -> the twelve leads, by Einthoven's and Goldberger's laws."""
    one_T, two_T = channel_CT[:2]
    limb_LT = [one_T, two_T, two_T - one_T, -(one_T + two_T) / 2, one_T - two_T / 2, two_T - one_T / 2]
    return np.stack([*limb_LT, *channel_CT[2:]])


@dataclass(frozen=True)
class Simulation:
    """A data set of synthetic recordings, one item per session of a patient.

    ``read`` is a pure function of ``seed``, ``duration_s``, ``rate_hz``, ``noise`` and the item: the order of
    reading, the process and the number of patients or sessions change nothing. Raises InputError for a field that
    is out of range.
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
        bounds: dict[str, tuple[float, float]] = {
            "patients": (1, 100_000_000),
            "records_per_patient": (1, 1000),
            "seed": (0, 2**64 - 1),
            "duration_s": (5.0, 86400.0),
            "rate_hz": (100.0, 4000.0),
            "noise": (0.0, 100.0),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            whole = name in ("patients", "records_per_patient", "seed")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise InputError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
            if not (isfinite(value) and least <= value <= most):
                raise InputError(f"{name} is {value!r}; it must lie between {least:g} and {most:g}")

    def items(self) -> list[str]:
        """Sorted names, ``"p00017/s01"``: patients and sessions count from 0."""
        patients, sessions = range(self.patients), range(self.records_per_patient)
        return sorted(f"p{patient:05d}/s{session:02d}" for patient in patients for session in sessions)

    def read(self, item: str) -> Record:
        """The recording of one item; raises InputError for an item that the data set does not hold."""
        number, session = self._parse(item)
        patient = _patient(self.seed, number)
        rng = _generator(self.seed, 2, number, session)
        rhythm = patient.condition
        otherwise = RHYTHMS[rhythm].otherwise
        if otherwise is not None and rng.random() < _OTHERWISE_PROBABILITY:
            rhythm = otherwise
        time_T = np.arange(round(self.duration_s * self.rate_hz)) / self.rate_hz
        leads_CX = patient.leads_CX * np.exp(rng.normal(0.0, 0.05))
        leads_CX[2:] += rng.normal(0.0, 0.06, (6, 3))  # chest electrodes never stick twice at the same place
        channel_CT = np.einsum("CX,XT->CT", leads_CX, _dipole(rhythm, patient, time_T, self.rate_hz, rng))
        day = _FIRST_DAY + timedelta(days=patient.first_day + 30 * session + int(rng.integers(30)))
        if self.noise:
            channel_CT += self.noise * _seen_by_channels(_electrode_noise(patient, time_T, rng))
        signal_LT = _twelve_leads(channel_CT)
        if rng.random() < 0.04 * self.noise:  # a lead comes loose, at once or on the way
            signal_LT[rng.integers(len(LEADS)), int(rng.integers(len(time_T))) * int(rng.integers(2)) :] = 0.0
        counts_LT = np.rint(signal_LT * (1 / patient.count_mv)).astype(np.int64)
        fitted_LT, scale_L = fit_counts(counts_LT, np.full(len(LEADS), patient.count_mv))
        return Record(
            name=item,
            signal_LT=fitted_LT,
            scale_L=scale_L,
            rate_hz=float(self.rate_hz),
            leads=LEADS,
            patient=item.split("/")[0],
            labels={"rhythm": [rhythm], "Dx": [RHYTHMS[rhythm].snomed]},
            metadata={
                "age": str(patient.age),
                "sex": "female" if patient.female else "male",
                "session": day.isoformat(),
            },
        )

    def _parse(self, item: str) -> tuple[int, int]:
        match = re.fullmatch(r"p(\d{5,})/s(\d{2,})", item)
        number, session = (int(digits) for digits in match.groups()) if match else (-1, -1)
        held = 0 <= number < self.patients and 0 <= session < self.records_per_patient
        if not held or item != f"p{number:05d}/s{session:02d}":
            last = f"p{self.patients - 1:05d}/s{self.records_per_patient - 1:02d}"
            raise InputError(f"no item {item!r} in {self.dataset}; the items go from p00000/s00 to {last}")
        return number, session
