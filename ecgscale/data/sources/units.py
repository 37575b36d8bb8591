"""Numbers in files that do not say their unit -> a record in mV.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError
from ecgscale.record import Fitted, fit_counts, in_canonical_order, mv_per_unit, quantise

_UNIT = re.compile(r"(\d+\.?\d*(?:[eE][-+]?\d{1,2})?)?\s*([^\W\d]+)")


def parse_unit(text: str) -> float:
    """Millivolts per 1: ``"mV"`` -> 1.0, ``"0.5mV"`` -> 0.5, ``"1e-4V"`` -> 0.1; raises InputError for others."""
    matched = _UNIT.fullmatch(text.strip())
    if matched is None or float(matched[1] or 1) == 0:
        raise InputError(f"unit {text!r}: give V, mV or uV, or a multiple such as 0.5mV")
    return float(matched[1] or 1) * mv_per_unit(matched[2])


def to_counts(
    values_LT: npt.NDArray[np.generic], leads: Sequence[str], mv_per_value: float
) -> tuple[Fitted, tuple[str, ...]]:
    """Floats or integers of leads in any order -> (int16 counts, leads), in canonical order.

    Raises InputError for NaN, infinity and a signal that is zero throughout.
    """
    order = in_canonical_order(leads)
    if not values_LT.any():
        raise InputError("all samples are zero")
    value_LT = [values_LT[i] for i in order]  # views
    if values_LT.dtype.kind in "iu":
        fitted = fit_counts(value_LT, np.full(len(leads), mv_per_value))
    else:
        fitted = quantise(value_LT, mv_per_value)
    return fitted, tuple(leads[i] for i in order)
