"""Leads, units, counts and resampling of a recording."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.errors import InputError
from ecgscale.record import (
    Record,
    fit_counts,
    mv_per_unit,
    patient_code,
    quantise,
    resample_millivolts,
)


@pytest.mark.parametrize(
    ("unit", "mv"),
    [("mV", 1), ("MV", 1), ("V", 1000), ("uV", 1e-3), ("µV", 1e-3), ("μV", 1e-3), (" nV", 1e-6)],
)
def test_units(unit: str, mv: float) -> None:
    assert mv_per_unit(unit) == mv


@pytest.mark.parametrize("unit", ["", "NU", "mmHg", "kV"])
def test_other_units_are_refused(unit: str) -> None:
    with pytest.raises(InputError, match="unknown unit"):
        mv_per_unit(unit)


counts = st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20)


@given(counts)
def test_counts_are_kept_where_they_fit_and_never_clipped(values: list[int]) -> None:
    counts_LT = np.array([values, [0] * len(values)])
    signal_LT, scale_L = fit_counts(counts_LT, np.array([0.5, 1.0]))
    assert signal_LT.dtype == np.int16
    assert scale_L.dtype == np.float32
    peak = max(map(abs, values))
    if peak <= 32767:
        np.testing.assert_array_equal(signal_LT[0], values)
        assert scale_L[0] == 0.5
    restored_T = signal_LT[0].astype(np.float64) * scale_L[0]
    np.testing.assert_allclose(restored_T, np.array(values) * 0.5, atol=0.5 * max(1, peak) / 32767, rtol=1e-6)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_quantising_errs_by_half_a_count(values_mv: list[float]) -> None:
    signal_LT, scale_L = quantise(np.array([values_mv]))
    peak_mv = max(map(abs, values_mv))
    assert scale_L[0] == pytest.approx(max(1e-3, peak_mv / 32767))
    np.testing.assert_allclose(signal_LT[0] * np.float64(scale_L[0]), values_mv, atol=0.51 * scale_L[0], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantising_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        quantise(np.array([[0.0, value]]))


def sine_record(rate_hz: float, duration_s: float = 4.0) -> Record:
    time_s_T = np.arange(round(duration_s * rate_hz)) / rate_hz
    signal_mv_LT = np.stack([np.sin(2 * np.pi * 3 * time_s_T), 20 + np.cos(2 * np.pi * 7 * time_s_T)])
    signal_LT, scale_L = quantise(signal_mv_LT)
    return Record("r", signal_LT, scale_L, rate_hz, ("I", "V1"), patient="p", labels={"a": ["b"]})


@pytest.mark.parametrize(("from_hz", "to_hz"), [(500, 250), (250, 500), (360, 500), (257, 500), (1000, 500)])
def test_resampling_keeps_what_the_lower_rate_can_hold(from_hz: float, to_hz: float) -> None:
    resampled = sine_record(from_hz).resampled(to_hz)
    expected = sine_record(to_hz)
    assert resampled.rate_hz == to_hz
    assert resampled.n_samples == expected.n_samples
    assert resampled.duration_s == 4.0
    assert (resampled.patient, resampled.labels) == ("p", {"a": ["b"]})
    inner = slice(int(0.2 * to_hz), -int(0.2 * to_hz))
    error_mv_LT = resampled.millivolts()[:, inner] - expected.millivolts()[:, inner]
    assert np.abs(error_mv_LT).max() < 0.003


def test_resampling_makes_no_step_at_the_ends_of_an_offset() -> None:
    flat_mv_LT = np.full((1, 1000), 20.0, np.float32)
    np.testing.assert_allclose(resample_millivolts(flat_mv_LT, 500.0, 250.0), 20.0, rtol=1e-5)


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    record = sine_record(500)
    assert record.resampled(500) is record


def test_rates_without_a_ratio_are_refused() -> None:
    with pytest.raises(InputError, match=r"from 500 Hz to 499\.9\d* Hz"):
        sine_record(500).resampled(499.9901)


def test_patients_are_told_apart() -> None:
    codes = [
        patient_code("a", "1", "x"),
        patient_code("b", "1", "x"),
        patient_code("a", "2", "x"),
        patient_code("a", None, "x"),
        patient_code("a", None, "y"),
        patient_code("a", "x", "x"),
    ]
    assert len(set(codes)) == len(codes)
    assert patient_code("a", "1", "y") == codes[0]
    assert all(0 <= code < 2**63 for code in codes)
