"""How the leads of a record stand to each other: scaled one by one, or as Einthoven's and Goldberger's equations say.

Shape suffixes: L leads, P probed samples, T samples, Q equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.record import moments

Floats = npt.NDArray[np.float64]

_EQUATION_MISSED = 0.25  # of the largest lead of the equation
_SAME_SCALE = 2e-3  # equal standard deviations of all samples
_PROBED_ALIKE = 2.5  # what a few samples make of equal ones
_ALIKE = 0.25  # of offsets: what the medians of leads differ by
_NEAR_POWER = 1 / 16
_EXACT = 1e-6  # what float32 makes of a 1

_EQUATIONS: tuple[dict[str, float], ...] = (
    {"I": 1, "III": 1, "II": -1},
    {"aVR": 1, "I": 0.5, "II": 0.5},
    {"aVL": 1, "I": -0.5, "III": 0.5},
    {"aVF": 1, "II": -0.5, "III": -0.5},
)
_EQUATION_NAMES = ("I + III = II", "aVR = -(I + II)/2", "aVL = (I - III)/2", "aVF = (II + III)/2")


def scaled_to_1(low_mv_L: Floats, high_mv_L: Floats) -> str:
    """How leads with these extremes were each brought between fixed numbers; "" where they were not.

    A single lead that reaches from 0 or -1 to 1 was; that its largest number is 1 says too little.
    """
    for low in (0, -1):
        if _is_exactly(high_mv_L, 1) and _is_exactly(low_mv_L, low):
            return f"from {low} to 1"
    peak_mv_L = np.maximum(high_mv_L, -low_mv_L)
    return "each reaches exactly 1 or -1" if len(peak_mv_L) > 1 and _is_exactly(peak_mv_L, 1) else ""


def reaches(largest: float, number: float) -> bool:
    """Whether the largest number is that number, but for what float32 makes of it."""
    return number > 0 and abs(largest / number - 1) < _EXACT


def _is_exactly(value_L: Floats, number: int) -> bool:
    return bool((np.abs(value_L - number) < _EXACT).all())


def scaled_by_deviation(values_LT: npt.NDArray[Any], mv_per_value_L: Floats, centred_mv_LP: Floats, kept_L: Any) -> str:
    """Which standard deviation all kept leads have alike; "" where they have several.

    All samples are read only where the probed ones, ``centred_mv_LP``, leave it open.
    """
    probed_mv_L = deviation(centred_mv_LP)[kept_L]
    alike = len(probed_mv_L) >= 3 and probed_mv_L.max() < _PROBED_ALIKE * probed_mv_L.min()
    near_1 = probed_mv_L.max() < _PROBED_ALIKE and probed_mv_L.min() > 1 / _PROBED_ALIKE
    if not (alike or near_1):
        return ""
    mean_L, deviation_L = moments(values_LT)
    mean_mv_L, deviation_mv_L = ((of_L * mv_per_value_L)[kept_L] for of_L in (mean_L, deviation_L))
    same = np.ptp(deviation_mv_L) < _SAME_SCALE * deviation_mv_L.max()
    is_1 = np.abs(deviation_mv_L - 1).max() < _SAME_SCALE and np.abs(mean_mv_L).max() < _SAME_SCALE
    if is_1 or (same and len(deviation_mv_L) >= 3):
        return f"each deviates by {deviation_mv_L.mean():.3g} mV"
    return ""


def alike(median_L: Floats) -> bool:
    """Whether numbers have one sign and differ little from each other, against what they are."""
    return bool(np.ptp(median_L) < _ALIKE * np.abs(median_L).min())


def near_power_of_two(median_L: Floats) -> bool:
    """Whether all are near one and the same power of two, the middle of a converter of so many bits."""
    power_L = 2.0 ** np.rint(np.log2(np.maximum(median_L, 1.0)))
    return bool(np.ptp(power_L) == 0 and (np.abs(median_L - power_L) < _NEAR_POWER * power_L).all())


def missed_equations(centred_mv_LP: Floats, leads: Sequence[str], flat_L: npt.NDArray[np.bool_]) -> str:
    """Which of Einthoven's and Goldberger's equations do not hold, and by how much; "" where all do."""
    matrix_QL, uses_QL, names = _equations(tuple(leads), tuple(flat_L.tolist()))
    if not names:
        return ""
    missed_mv_Q = deviation(matrix_QL @ centred_mv_LP)
    missed_Q = missed_mv_Q / (uses_QL * deviation(centred_mv_LP)).max(axis=1)
    at = np.flatnonzero(missed_Q > _EQUATION_MISSED).tolist()
    return ", ".join(f"{names[q]} missed by {missed_mv_Q[q]:.2g} mV" for q in at)


def deviation(values_LP: Floats) -> Floats:
    """Standard deviation along each row: a third of np.std's time."""
    mean_L = values_LP.mean(axis=1)
    variance_L = np.einsum("lp,lp->l", values_LP, values_LP) / values_LP.shape[1] - mean_L * mean_L
    deviation_L: Floats = np.sqrt(np.maximum(variance_L, 0.0))
    return deviation_L


@lru_cache(maxsize=64)
def _equations(leads: tuple[str, ...], flat: tuple[bool, ...]) -> tuple[Floats, npt.NDArray[np.bool_], list[str]]:
    """Coefficients of the equations between leads that have a signal, which leads they use, and how they read."""
    there = {lead: row for row, (lead, is_flat) in enumerate(zip(leads, flat, strict=True)) if not is_flat}
    rows, names = [], []
    for equation, name in zip(_EQUATIONS, _EQUATION_NAMES, strict=True):
        if equation.keys() <= there.keys():
            row_L = np.zeros(len(leads))
            for lead, coefficient in equation.items():
                row_L[there[lead]] = coefficient
            rows.append(row_L)
            names.append(name)
    matrix_QL = np.array(rows).reshape(len(rows), len(leads))
    return matrix_QL, matrix_QL != 0, names
