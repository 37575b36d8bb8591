"""Numbers in files that do not say their unit -> a record in mV.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.data.plausibility import check_geometry, checked
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import Fitted, Remark, fit_counts, mv_per_unit, quantise

_UNIT = re.compile(r"(\d+\.?\d*(?:[eE][-+]?\d{1,2})?)?\s*([^\W\d]+)")


def parse_unit(text: str) -> float:
    """Millivolts per 1: ``"mV"`` -> 1.0, ``"0.5mV"`` -> 0.5, ``"1e-4V"`` -> 0.1; raises InputError for others."""
    matched = _UNIT.fullmatch(text.strip())
    if matched is None or float(matched[1] or 1) == 0:
        raise InputError(f"unit {text!r}: give V, mV or uV, or a multiple such as 0.5mV")
    return float(matched[1] or 1) * mv_per_unit(matched[2])


def mv_per_value(dtype: np.dtype[Any], unit: str | None, mv_per_count: float | None) -> float:
    """Millivolts per 1 of an array of that type; ``unit`` is that of floats, mV where nothing is said.

    Raises InputError for what is no number, for integers of no unit, and for floats of which only counts are said.
    """
    if dtype.kind == "f":
        if unit is None and mv_per_count is not None:
            raise InputError(
                f"floats ({dtype}) take --unit, such as {mv_per_count:g}mV; --mv-per-count is for integers "
                "(in Python, unit and mv_per_count)"
            )
        return parse_unit(unit or "mV")
    if dtype.kind not in "iu":
        raise InputError(f"of type {dtype}; floats or integers are needed")
    if mv_per_count is None:
        raise InputError(f"integers ({dtype}) say no unit; give --mv-per-count (in Python, mv_per_count)")
    return mv_per_count


class Signal(NamedTuple):
    """Leads in canonical order, without those that hold no signal or nothing but NaN."""

    fitted: Fitted
    leads: tuple[str, ...]
    remarks: tuple[Remark, ...]


def to_signal(values_LT: npt.NDArray[np.generic], leads: Sequence[str], mv_per_value: float, rate_hz: float) -> Signal:
    """Floats or integers of leads in any order -> counts.

    Raises InputError for NaN in a lead that has numbers too, infinity, a rate or a duration that no ECG has, and for
    values that are no ECG's: see ``plausibility``.
    """
    check_geometry(values_LT.shape[1], rate_hz)
    values_LT = np.ascontiguousarray(values_LT)  # along a transposed array everything takes several times as long
    rows, remarks = checked(values_LT, mv_per_value, leads, rate_hz)
    order = sorted(rows, key=lambda row: LEADS.index(leads[row]))
    value_LT = [values_LT[row] for row in order]  # views
    if values_LT.dtype.kind in "iu":
        fitted = fit_counts(value_LT, np.full(len(order), mv_per_value))
    else:
        fitted = quantise(value_LT, mv_per_value)
    return Signal(fitted, tuple(leads[row] for row in order), remarks)
