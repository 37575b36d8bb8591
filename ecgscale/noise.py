"""What electrodes add to an ECG: muscle, baseline wander, moving skin, mains, motion steps and offsets.

Shape suffixes: E the 9 electrodes RA, LA, LL, V1..V6, F frequencies, N knots, T samples.
"""

from __future__ import annotations

from math import pi

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Rng = np.random.Generator


def electrode_noise(time_T: Array, respiration_hz: float, mains_hz: float, rng: Rng) -> Floats:
    """(E, T) potentials in mV at RA, LA, LL, V1..V6: muscle, wander, skin, mains, motion and offsets."""
    n_samples, duration_s = len(time_T), float(time_T[-1])
    severity = np.exp(rng.normal(0.0, 0.6))
    burst_T = np.full(n_samples, 0.012 * severity)
    for _ in range(rng.poisson(0.08 * duration_s)):
        since_T = (time_T - rng.uniform(0, duration_s)) / rng.uniform(0.15, 0.6)
        burst_T += 0.036 * severity * np.exp(-0.5 * since_T**2)
    # float32 and in place: fresh pages for large temporaries cost more than the arithmetic.
    noise_ET = rng.standard_normal((9, n_samples), dtype=np.float32)
    noise_ET[:, 1:] -= 0.5 * noise_ET[:, :-1]
    noise_ET *= burst_T.astype(np.float32)
    noise_ET *= np.exp(rng.normal(0.0, 0.4, (9, 1))).astype(np.float32)

    knot_N = np.arange(0.0, duration_s + 0.1, 0.05)
    hz_F1 = np.array([respiration_hz, *rng.uniform(0.05, 0.5, 3)])[:, None]
    wander_FN = np.sin(2 * pi * hz_F1 * knot_N + rng.uniform(0, 2 * pi, (4, 1)))
    slow_EN = rng.normal(0.0, 0.042 * severity, (9, 4)) @ wander_FN
    # What moving skin adds lies in the band of P, T and fibrillatory waves: no filter takes it out.
    slow_EN += rng.normal(0.0, 0.045 * severity, slow_EN.shape)
    if rng.random() < 0.3:
        slow_EN += rng.normal(0.0, 0.2, (9, 1))  # half-cell potentials
    # The mains frequency drifts by tens of mHz within half a minute.
    mains_T = 2 * pi * mains_hz * time_T + 1.5 * np.sin(0.2 * time_T + rng.uniform(0, 2 * pi))
    sin_T, cos_T = np.sin(mains_T), np.cos(mains_T)
    hum_E2 = rng.normal(0.0, 0.006 * severity, (9, 2))
    for noise_T, slow_N, (hum_sin, hum_cos) in zip(noise_ET, slow_EN, hum_E2, strict=True):
        noise_T += np.interp(time_T, knot_N, slow_N) + hum_sin * sin_T + hum_cos * cos_T

    if rng.random() < 0.2:  # an electrode moves: a step that the recorder's high-pass lets decay
        since_T = time_T - rng.uniform(0, duration_s)
        decay_T = np.exp(-np.maximum(since_T, 0) / rng.uniform(0.2, 1.5))
        noise_ET[rng.integers(9)] += rng.normal(0.0, 0.5) * decay_T * (since_T > 0)
    return noise_ET


def seen_by_channels(electrode_ET: Floats) -> Floats:
    """RA, LA, LL, V1..V6 -> I, II, V1..V6, in the same memory; V against Wilson's central terminal."""
    electrode_ET[3:] -= electrode_ET[:3].mean(axis=0)
    electrode_ET[1:3] -= electrode_ET[0]
    return electrode_ET[1:]
