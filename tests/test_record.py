"""Leads, units, counts and resampling of a recording."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale import record as record_module
from ecgscale.errors import InputError
from ecgscale.record import (
    COARSE,
    OFFSET,
    Record,
    check_rate,
    fit_counts,
    id_hash,
    moments,
    mv_per_unit,
    patient_code,
    quantise,
    ratio_of_rates,
    resample_millivolts,
)


@pytest.mark.parametrize(
    ("unit", "mv"),
    [
        ("mV", 1),
        ("MV", 1),
        ("V", 1000),
        ("uV", 1e-3),
        ("µV", 1e-3),
        ("μV", 1e-3),
        (" nV", 1e-6),
        ("MicroVolts", 1e-3),
        ("volt", 1000),
    ],
)
def test_units(unit: str, mv: float) -> None:
    assert mv_per_unit(unit) == mv


@pytest.mark.parametrize("unit", ["", "NU", "mmHg", "kV", "vs", "mvs"])
def test_other_units_are_refused(unit: str) -> None:
    with pytest.raises(InputError, match="unknown unit"):
        mv_per_unit(unit)


counts = st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20)
MV_PER_COUNT = 5e-5  # of a recorder with 24 bits


@given(counts, st.integers(-(2**40), 2**40))
def test_counts_are_kept_where_they_fit_and_never_clipped(values: list[int], offset: int) -> None:
    counts_LT = np.array([values, [offset] * len(values)])
    fitted = fit_counts(counts_LT, np.array([0.5, 1.0]))
    assert fitted.signal_LT.dtype == np.int16
    assert fitted.scale_L.dtype == np.float32
    if max(map(abs, values)) <= 32767:
        np.testing.assert_array_equal(fitted.signal_LT[0], values)
        assert (fitted.scale_L[0], fitted.offset_mv_L[0]) == (0.5, 0)
    largest = np.abs(counts_LT[0] - round(float(np.median(counts_LT[0])))).max()
    assert fitted.coarse_L[0] == (largest > 32767)
    restored_T = fitted.signal_LT[0] * np.float64(fitted.scale_L[0]) + fitted.offset_mv_L[0]
    np.testing.assert_allclose(restored_T, counts_LT[0] * 0.5, atol=0.51 * fitted.scale_L[0], rtol=1e-6)
    # A constant is exact, whatever it is.
    assert fitted.signal_LT[1, 0] * np.float64(fitted.scale_L[1]) + fitted.offset_mv_L[1] == offset
    assert not fitted.coarse_L[1]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_quantising_errs_by_half_a_count(values_mv: list[float]) -> None:
    fitted = quantise(np.array([values_mv]))
    offset_mv = np.median(values_mv) if max(map(abs, values_mv)) > 32.767 else 0.0
    peak_mv = np.abs(np.array(values_mv) - offset_mv).max()
    assert fitted.offset_mv_L[0] == offset_mv
    assert fitted.scale_L[0] == pytest.approx(max(1e-3, peak_mv / 32767))
    assert fitted.coarse_L[0] == (peak_mv > 32.767)
    restored_T = fitted.signal_LT[0] * np.float64(fitted.scale_L[0]) + offset_mv
    np.testing.assert_allclose(restored_T, values_mv, atol=0.51 * fitted.scale_L[0], rtol=1e-6)


def heartbeats_mv(n_samples: int = 5000) -> np.ndarray:
    """A lead with R waves of 1.2 mV and P waves of 0.1 mV."""
    phase_T = np.arange(n_samples) % 400
    return 1.2 * np.exp(-(((phase_T - 150) / 6) ** 2)) + 0.1 * np.exp(-(((phase_T - 80) / 15) ** 2))


@pytest.mark.parametrize("offset_mv", [-300.0, 40.0, 300.0])
def test_an_electrode_offset_leaves_the_ecg_its_microvolts(offset_mv: float) -> None:
    ecg_mv_T = heartbeats_mv()
    counts_T = np.rint((ecg_mv_T + offset_mv) / MV_PER_COUNT).astype(np.int64)
    exact = fit_counts([counts_T, np.arange(5000)], np.array([MV_PER_COUNT, 1e-3]))
    rounded = quantise([ecg_mv_T + offset_mv, ecg_mv_T])
    for fitted in (exact, rounded):
        record = Record.of("r", fitted, 500.0, ("I", "II"))
        for same in (record, record.resampled(1000.0), record.resampled(250.0)):
            assert set(same.offset_mv) == {"I"}
            assert [remark.kind for remark in same.remarks] == [OFFSET]
            assert same.scale_L[0] <= 1e-3
            expected_mv_T = resample_millivolts(ecg_mv_T[None].astype(np.float32), 500.0, same.rate_hz)[0]
            shift_mv_T = same.millivolts()[0] + same.offset_mv["I"] - offset_mv - expected_mv_T
            assert np.abs(shift_mv_T)[100:-100].max() < 2e-3
    np.testing.assert_array_equal(exact.signal_LT[0].astype(int) + round(exact.offset_mv_L[0] / MV_PER_COUNT), counts_T)


def test_what_int16_cannot_hold_is_said() -> None:
    drift_mv_T = np.linspace(-190, 210, 5000) + heartbeats_mv()
    record = Record.of("r", quantise([drift_mv_T, heartbeats_mv()]), 500.0, ("V1", "V2"))
    assert [(remark.kind, remark.detail[:3]) for remark in record.remarks][1:] == [(COARSE, "V1 ")]
    assert record.scale_L[0] == pytest.approx(6.1e-3, rel=0.01)
    assert {remark.kind for remark in record.resampled(250.0).remarks} == {OFFSET, COARSE}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantising_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        quantise(np.array([[0.0, value]]))


def sine_record(rate_hz: float, duration_s: float = 4.0) -> Record:
    time_s_T = np.arange(round(duration_s * rate_hz)) / rate_hz
    signal_mv_LT = np.stack([np.sin(2 * np.pi * 3 * time_s_T), 20 + np.cos(2 * np.pi * 7 * time_s_T)])
    return Record.of("r", quantise(signal_mv_LT), rate_hz, ("I", "V1"), patient="p", labels={"a": ["b"]})


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
    same = sine_record(500)
    assert same.resampled(500) is same
    nearly = sine_record(500.001)
    np.testing.assert_array_equal(nearly.resampled(500).signal_LT, nearly.signal_LT)
    assert nearly.resampled(500).rate_hz == 500


@given(st.floats(20, 100_000), st.floats(1, 100_000))
def test_any_two_rates_have_a_ratio(from_hz: float, to_hz: float) -> None:
    up, down = ratio_of_rates(from_hz, to_hz)
    assert 1 <= min(up, down) <= max(up, down) <= 100_000
    assert abs(up / down * from_hz / to_hz - 1) <= 1e-5


@pytest.mark.parametrize(("from_hz", "to_hz"), [(249.889, 500), (333.333, 500), (128.2051282, 500), (499.9901, 500)])
def test_odd_rates_err_by_a_millionth(from_hz: float, to_hz: float) -> None:
    up, down = ratio_of_rates(from_hz, to_hz)
    assert abs(up / down * from_hz / to_hz - 1) <= 1.000001e-6  # that of 333.333 for 1000 / 3
    resampled, expected = sine_record(from_hz).resampled(to_hz), sine_record(to_hz)
    inner = slice(int(0.2 * to_hz), int(3.8 * to_hz))
    assert np.abs(resampled.millivolts()[:, inner] - expected.millivolts()[:, inner]).max() < 0.003


@pytest.mark.parametrize(("from_hz", "to_hz"), [(500, 250), (250, 500), (360, 500), (1000, 128)])
@pytest.mark.parametrize("n_samples", [40_000, 40_321])
def test_long_leads_are_resampled_in_pieces_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch, from_hz: float, to_hz: float, n_samples: int
) -> None:
    noise_mv_LT = np.random.default_rng(0).normal(5, 1, (3, n_samples)).cumsum(axis=1).astype(np.float32)
    drifting = Record.of("r", quantise(noise_mv_LT / 1000), from_hz, ("I", "II", "V1"))
    at_once_LT = resample_millivolts(drifting.millivolts(), from_hz, to_hz)
    whole = drifting.resampled(to_hz)
    monkeypatch.setattr(record_module, "_PIECE", 7001)
    np.testing.assert_allclose(resample_millivolts(drifting.millivolts(), from_hz, to_hz), at_once_LT, atol=1e-5)
    in_pieces = drifting.resampled(to_hz)
    assert in_pieces.signal_LT.shape == whole.signal_LT.shape
    np.testing.assert_allclose(in_pieces.scale_L, whole.scale_L, rtol=1e-6)
    assert np.abs(in_pieces.signal_LT.astype(int) - whole.signal_LT).max() <= 1


def test_what_would_not_fit_at_the_new_rate_is_refused() -> None:
    long = Record("r", np.zeros((1, 1 << 20), np.int16), np.ones(1, np.float32), 20.0, ("I",))
    with pytest.raises(InputError, match=r"1048576 samples of 1 leads at 20 Hz; at 20000 Hz"):
        long.resampled(20_000)


@pytest.mark.parametrize("rate_hz", [0, -1.0, 0.5, 19.9, 1e5 + 1, 1e-300, float("nan")])
def test_rates_of_no_ecg_are_refused(rate_hz: float) -> None:
    with pytest.raises(InputError, match=r"an ECG has 20 to 100000 Hz"):
        check_rate(rate_hz)
    check_rate(20)
    with pytest.raises(InputError, match=r"a period in seconds\? Then it is 500 Hz"):
        check_rate(0.002)


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


def test_ids_that_differ_in_case_or_leading_zeros_alone_have_one_hash() -> None:
    groups = [
        ["7", "007", "\uff17"],
        ["P-7", "p-007"],
        ["70"],
        ["0", "00"],
        ["1.07", "1.7"],
        ["P7"],
        ["\xe9", "E\u0301"],
    ]
    hashes = [{id_hash(one) for one in group} for group in groups]
    assert all(len(one) == 1 for one in hashes)
    assert len(set.union(*hashes)) == len(groups)
    assert id_hash(None) == 0
    assert all(0 < code < 2**64 for one in hashes for code in one)


@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
def test_moments_are_those_of_all_samples_at_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value_LT = (np.random.default_rng(0).normal(size=(3, 5000)) * 1000 + 4000).astype(dtype)
    mean_L, deviation_L = moments(value_LT)
    np.testing.assert_array_equal(mean_L, value_LT.mean(axis=1, dtype=np.float64))
    np.testing.assert_array_equal(deviation_L, value_LT.std(axis=1, dtype=np.float64))
    monkeypatch.setattr(record_module, "_PIECE", 777)
    for whole, by_pieces in zip((mean_L, deviation_L), moments(value_LT), strict=True):
        np.testing.assert_allclose(by_pieces, whole, rtol=1e-12)


def test_moments_of_a_long_recording_take_little_memory() -> None:
    signal_LT = np.ones((12, 4_000_000), np.int16)  # 96 MB, as float64 384 MB
    tracemalloc.start()
    moments(signal_LT)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 80 << 20
