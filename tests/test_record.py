"""Leads, units, counts and resampling of a recording."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.errors import InputError
from ecgscale.record import (
    LEAD_SETS,
    Record,
    canonical_lead,
    canonical_leads,
    chosen_leads,
    fit_counts,
    in_canonical_order,
    mv_per_unit,
    patient_code,
    quantise,
    resample_millivolts,
    resampling_ratio,
)


@pytest.mark.parametrize(
    ("name", "lead"),
    [("I", "I"), ("ECG I", "I"), (" avr ", "aVR"), ("AVL", "aVL"), ("Lead II", "II"), ("ecg lead v6", "V6")],
)
def test_lead_names(name: str, lead: str) -> None:
    assert canonical_lead(name) == lead


@pytest.mark.parametrize("name", ["", "ECG", "V7", "V1R", "IV", "MLII", "ECG I filtered", "I\0"])
def test_other_leads_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match="unknown lead") as caught:
        canonical_lead(name)
    assert repr(name) in str(caught.value)


def test_repeated_leads_are_refused() -> None:
    assert canonical_leads(["v1", "I"]) == ("V1", "I")
    with pytest.raises(InputError, match="V1 stands 2 times"):
        canonical_leads(["V1", "I", "ECG v1"])


def test_leads_are_chosen_by_name_or_as_a_set() -> None:
    assert chosen_leads([]) == ()
    assert chosen_leads(["v2", "I", "AVR"]) == ("I", "aVR", "V2")
    for size, leads in LEAD_SETS.items():
        assert chosen_leads([str(size)]) == leads


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["I", "V7"], "unknown lead 'V7'; did you mean V"),
        (["aVX"], "unknown lead 'aVX'; did you mean aV"),
        (["5"], "one set alone: 12, 6, 4, 3, 2, 1"),
        (["I", "6"], "unknown lead '6'"),
        (["I", "I"], "lead I stands 2 times"),
    ],
)
def test_wrong_choices_of_leads_are_refused_in_one_line(names, said) -> None:
    with pytest.raises(InputError) as caught:
        chosen_leads(names)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lead_sets_are_in_canonical_order() -> None:
    for size, leads in LEAD_SETS.items():
        assert len(leads) == size
        assert in_canonical_order(leads) == list(range(size))
    assert in_canonical_order(["V2", "I", "aVF"]) == [1, 2, 0]


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


@pytest.mark.parametrize("from_hz", [249.889, 333.333, 1000 / 3, 977.5171, 128.0001])
def test_odd_rates_are_resampled(from_hz: float) -> None:
    resampled = sine_record(from_hz).resampled(500.0)
    time_T = np.arange(resampled.n_samples) / 500
    assert abs(resampled.n_samples - 2000) <= 2
    inner = slice(100, -100)
    expected_mv_T = sine_record(50_000.0).millivolts()[0, np.rint(time_T[inner] * 50_000).astype(int)]
    assert np.abs(resampled.millivolts()[0, inner] - expected_mv_T).max() < 0.01


@pytest.mark.parametrize(
    ("from_hz", "to_hz", "n_samples", "ratio"),
    [
        (333.333, 500, 3333, (3, 2)),
        (500, 499.9901, 2000, (1, 1)),
        (360, 500, 10**9, (25, 18)),
        (1e5, 500, 9, (1, 200)),
    ],
)
def test_the_simplest_ratio_is_taken(from_hz, to_hz, n_samples, ratio) -> None:
    assert resampling_ratio(from_hz, to_hz, n_samples) == Fraction(*ratio)


def test_rates_without_a_ratio_are_refused() -> None:
    with pytest.raises(InputError, match=r"cannot resample 43200000 samples from 500 Hz to 500\.0\d* Hz"):
        resampling_ratio(500, 500.0025, 43_200_000)


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
