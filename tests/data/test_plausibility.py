"""What is no ECG is refused, what is odd about one is named, and good ones pass without a word."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ecgscale import record as record_module
from ecgscale.data.plausibility import (
    APART,
    BLANK,
    FLAT,
    LARGE,
    LOOSE,
    LOUD,
    REACHES_1,
    SCALED,
    SHORT,
    SMALL,
    STUCK,
    UNEQUAL,
    ZERO,
    UnlikelyUnitError,
    check_geometry,
    checked,
    judge,
    questions,
)
from ecgscale.data.sources import WfdbFolder
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import quantise
from ecgscale.simulate import Simulation

LIMB = LEADS[:6]


@pytest.fixture(scope="module")
def mv_LT() -> np.ndarray:
    """One recording of 10 s at 500 Hz."""
    simulation = Simulation(patients=1, records_per_patient=1, seed=3)
    return simulation.read(simulation.items()[0]).millivolts().astype(np.float64)


def kinds(values_LT: np.ndarray, mv_per_value=1.0, leads=LEADS, rate_hz=500.0) -> dict[str, str]:
    """Kind of each remark -> its detail."""
    return dict(checked(values_LT, mv_per_value, leads, rate_hz)[1])


def refusal(
    values_LT: np.ndarray, mv_per_value=1.0, leads=LEADS, error: type[Exception] = InputError, rate_hz=500.0
) -> str:
    with pytest.raises(InputError) as caught:
        checked(values_LT, mv_per_value, leads, rate_hz)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(mv_LT: np.ndarray, lead: str, value: object, where: object = slice(None)) -> np.ndarray:
    other_LT = mv_LT.copy()
    other_LT[LEADS.index(lead), where] = value
    return other_LT


# --- strips ---


@pytest.mark.parametrize("duration_s", [0.2, 0.4, 0.79])
def test_strips_shorter_than_a_beat_are_judged_but_for_what_a_missing_beat_explains(mv_LT, duration_s) -> None:
    n = int(500 * duration_s)
    for start in range(0, 5000 - n, 250):
        strip_LT = mv_LT[:, start : start + n]
        assert set(kinds(strip_LT)) <= {SHORT, FLAT}
        assert kinds(strip_LT)[SHORT] == f"{n / 500:.2g} s"
    r_wave = int(np.abs(mv_LT[1]).argmax())
    strip_LT = mv_LT[:, max(0, r_wave - n // 2) :][:, :n]
    assert LARGE in kinds(10 * strip_LT)
    assert "are they volts?" in refusal(strip_LT / 1000, error=UnlikelyUnitError)
    assert UNEQUAL in kinds(strip_LT[[1, 0, 5, 4, 3, 2]], leads=LIMB)


def test_a_strip_of_a_beat_is_judged_whole(mv_LT) -> None:
    strip_LT = mv_LT[:, :400]
    assert kinds(strip_LT) == {}
    assert SMALL in kinds(strip_LT / 10)
    assert SHORT not in kinds(strip_LT / 10)


# --- good ones ---


@pytest.mark.parametrize("dtype", ["f8", "f4", ">f4", "f2"])
@pytest.mark.parametrize("offset_mv", [0.0, -80.0, 300.0])
def test_an_ecg_passes_whatever_its_offset(mv_LT, dtype, offset_mv) -> None:
    offset_L1 = offset_mv * np.linspace(-1, 1, 12)[:, None]
    kept, remarks = checked((mv_LT + offset_L1 * (dtype != "f2")).astype(dtype), 1.0, LEADS, 500.0)
    assert (kept, remarks) == ([*range(12)], ())


def test_counts_of_several_scales_pass(mv_LT) -> None:
    fitted = quantise(mv_LT)
    assert kinds(fitted.signal_LT, fitted.scale_L) == {}
    coarse_L = np.linspace(1e-3, 9e-3, 12)
    assert kinds(np.rint(mv_LT / coarse_L[:, None]).astype(np.int32), coarse_L) == {}


@pytest.mark.parametrize("leads", [("I",), ("I", "II"), ("V1", "V2", "V3"), LIMB])
def test_few_leads_pass(mv_LT, leads) -> None:
    assert kinds(mv_LT[[LEADS.index(lead) for lead in leads]], leads=leads) == {}


def test_pacing_spikes_and_drift_pass(mv_LT) -> None:
    odd_LT = mv_LT.copy()
    odd_LT[6:, ::400] += 8.0
    odd_LT[8:] += 3 * np.sin(np.linspace(0, 9, mv_LT.shape[1]))
    assert kinds(odd_LT) == {}


def outcomes(source: WfdbFolder, items: list[str]) -> tuple[Counter[str], list[str]]:
    """How many records have each remark, and why others were refused."""
    counts: Counter[str] = Counter()
    reasons = []
    for item in items:
        try:
            counts.update(remark.kind for remark in source.read(item).remarks)
        except InputError as error:
            reasons.append(str(error))
    return counts, reasons


@pytest.mark.parametrize(("folder", "ignored", "marked"), [("cinc2021", (), 2), ("ecgid", ("ECG I filtered",), 0)])
def test_good_real_recordings_pass(shared_data: Path, folder: str, ignored: tuple[str, ...], marked: int) -> None:
    source = WfdbFolder(shared_data / folder, folder, ignore_leads=ignored)
    counts, reasons = outcomes(source, source.items())
    assert counts == Counter({FLAT: marked} if marked else {})
    assert all("checksum" in reason for reason in reasons)


def test_no_real_recording_is_lost_but_the_flat_ones(shared_data: Path) -> None:
    """Set A is of mixed quality: a tenth of it is loose, and in nearly all of it aVL and aVF are exchanged."""
    source = WfdbFolder(shared_data / "cinc2011_seta", "a")
    counts, reasons = outcomes(source, source.items()[:200])
    assert all("all leads stand still" in reason or "all samples are zero" in reason for reason in reasons)
    assert len(reasons) < 5
    assert counts[UNEQUAL] > 180
    assert 5 < counts[LOOSE] < 40
    assert 5 < counts[FLAT] < 40
    assert counts[LOUD] <= 2


# --- what is refused ---


@pytest.mark.parametrize("value", [0.0, 0.017, -80.0])
def test_standing_still(mv_LT, value) -> None:
    said = refusal(np.full_like(mv_LT, value))
    assert said == (
        "all samples are zero" if value == 0 else f"all leads stand still, at {value:g} mV; an ECG swings by about 1 mV"
    )


def test_volts(mv_LT) -> None:
    said = refusal(mv_LT / 1000, error=UnlikelyUnitError)
    assert "an ECG by about 1 mV: are they volts? Then give --unit V" in said
    assert kinds(mv_LT / 1000, 1000.0) == {}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_microvolts(mv_LT, share) -> None:
    """Of all leads or of some, floats or counts."""
    rows = slice(0, max(1, round(12 * share)))
    louder_LT = mv_LT.copy()
    louder_LT[rows] *= 1000 * 1.2 / np.abs(mv_LT).max(axis=1, keepdims=True)[rows]
    for values_LT in (louder_LT, np.rint(louder_LT).astype(np.int32)):
        assert "are they microvolts? Then give --unit uV" in refusal(values_LT, error=UnlikelyUnitError)


def test_volts_of_noise(mv_LT) -> None:
    noise_LT = np.random.default_rng(0).normal(size=mv_LT.shape) * 3e4
    assert "an ECG stays within" in refusal(noise_LT, error=UnlikelyUnitError)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("code", [-9999.0, 9.96921e36, -1e20, 1e9, -99999.0])
def test_codes_beyond_any_ecg(mv_LT, code, dtype) -> None:
    for where, n in ((7, 1), (slice(-90, None), 90)):
        said = refusal(changed(mv_LT.astype(dtype), "V2", code, where))
        assert said.startswith("lead V2 reaches ")
        assert f"{n} of 5000 samples stand there, most likely a code for missing ones" in said


@pytest.mark.parametrize(
    ("mv_per_value", "dtype", "code"),
    [(1.0, "f4", -999), (1e-3, "i4", -32768), (1e-3, "f8", -9999), (5e-3, "i2", -32768)],
)
def test_codes_within_reach_of_an_ecg(mv_LT, mv_per_value, dtype, code) -> None:
    values_LT = (mv_LT / mv_per_value).astype(dtype)
    assert kinds(values_LT, mv_per_value) == {}
    said = refusal(changed(values_LT, "aVF", code, slice(100, 103)), mv_per_value)
    assert said.startswith(f"lead aVF: 3 samples are {code}, far from all others")


def test_a_sample_that_happens_to_have_the_value_of_a_code(mv_LT) -> None:
    uv_LT = np.rint(mv_LT * 1000)
    row = uv_LT[1] - uv_LT[1].min() - 999  # its smallest is -999 µV, its neighbours are near
    assert kinds(np.stack([row]), 1e-3, ("II",)) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(mv_LT, value) -> None:
    assert "NaN or infinity" in refusal(changed(mv_LT, "I", value, 4321))


@pytest.mark.parametrize(
    ("n_samples", "rate_hz"), [(8, 500.0), (5000, 0.5), (99, 500.0), (12, 5000.0), (50, float("nan"))]
)
def test_impossible_geometry(n_samples, rate_hz) -> None:
    with pytest.raises(InputError, match=r"an ECG has (at least|20 to)"):
        check_geometry(n_samples, rate_hz)


@pytest.mark.parametrize(("n_samples", "rate_hz"), [(100, 500.0), (2500, 249.889), (3333, 333.333), (20 * 60, 20.0)])
def test_possible_geometry(n_samples, rate_hz) -> None:
    check_geometry(n_samples, rate_hz)


# --- what is named ---


@pytest.mark.parametrize("value", [0.0, 32.767, -80.0])
def test_flat_and_railed_leads_are_left_out(mv_LT, value) -> None:
    kept, remarks = checked(changed(mv_LT, "V3", value), 1.0, LEADS, 500.0)
    assert [LEADS[row] for row in kept] == [lead for lead in LEADS if lead != "V3"]
    assert remarks == ((FLAT, "V3"),)


def test_a_lead_of_rounding_is_flat(mv_LT) -> None:
    jitter_T = np.random.default_rng(1).integers(0, 3, mv_LT.shape[1]) * 5e-3
    assert kinds(changed(mv_LT, "V6", 4.0 + jitter_T)) == {FLAT: "V6"}


def test_a_flat_limb_lead_breaks_no_equation(mv_LT) -> None:
    assert kinds(changed(mv_LT, "II", 0.0)) == {FLAT: "II"}


@pytest.mark.parametrize("rail_mv", [3.2767, 15.0])
def test_leads_that_stand_still_for_a_part(mv_LT, rail_mv) -> None:
    half = kinds(changed(mv_LT, "V1", rail_mv, slice(1000, 3500)))
    assert half[STUCK] in ("V1 50%", "V1 51%")
    assert FLAT not in half
    assert STUCK not in kinds(changed(mv_LT, "V1", rail_mv, slice(1000, 1200)))


def test_clipped_leads(mv_LT) -> None:
    clipped_LT = mv_LT.copy()
    row = LEADS.index("V2")
    clipped_LT[row] = np.clip(20 * mv_LT[row], *np.quantile(20 * mv_LT[row], [0.1, 0.9]))
    assert list(kinds(clipped_LT)) == [STUCK]
    assert kinds(clipped_LT)[STUCK].startswith("V2 ")


def test_a_drawn_ecg_rests_at_its_extreme(mv_LT) -> None:
    drawn_LT = np.where(np.abs(mv_LT) < 0.2 * np.abs(mv_LT).max(axis=1, keepdims=True), 0.0, np.abs(mv_LT))
    assert STUCK not in kinds(drawn_LT)


def test_loose_electrodes(mv_LT) -> None:
    time_T = np.linspace(0, 10, mv_LT.shape[1])
    said = kinds(changed(mv_LT, "V5", mv_LT[10] + 60 * np.sin(time_T)))
    assert said[LOOSE].startswith("V5 ")
    assert said.keys() == {LOOSE, APART}


def test_leads_that_differ_a_thousandfold(mv_LT) -> None:
    louder_LT = mv_LT / np.abs(mv_LT).max() * 0.8
    louder_LT[3:6] *= 1000
    said = kinds(louder_LT)
    assert all(lead in said[APART] for lead in LEADS[3:6])
    assert "V1" not in said[APART]


def test_counts_taken_for_millivolts(mv_LT) -> None:
    assert set(kinds(np.rint(mv_LT * 200).astype(np.int16) // 2, 1.0)) >= {LOUD}


@pytest.mark.parametrize("leads", [("I",), ("I", "II"), LEADS])
def test_z_scores(mv_LT, leads) -> None:
    rows = [LEADS.index(lead) for lead in leads]
    z_LT = (mv_LT - mv_LT.mean(axis=1, keepdims=True))[rows] / mv_LT.std(axis=1, keepdims=True)[rows]
    assert kinds(z_LT, leads=leads) == {SCALED: "each deviates by 1 mV"}
    assert kinds(z_LT.astype("f4"), leads=leads) == {SCALED: "each deviates by 1 mV"}
    if len(leads) > 2:
        assert kinds(z_LT, 0.2, leads) == {SCALED: "each deviates by 0.2 mV"}


@pytest.mark.parametrize("low", [0, -1])
def test_leads_between_two_numbers(mv_LT, low) -> None:
    low_L1, high_L1 = mv_LT.min(axis=1, keepdims=True), mv_LT.max(axis=1, keepdims=True)
    assert kinds(low + (1 - low) * (mv_LT - low_L1) / (high_L1 - low_L1)) == {SCALED: f"from {low} to 1"}


@pytest.mark.parametrize(("one", "other"), [("aVR", "aVL"), ("aVL", "aVF"), ("I", "II"), ("III", "V1"), ("II", "aVR")])
def test_exchanged_leads(mv_LT, one, other) -> None:
    exchanged_LT = mv_LT.copy()
    rows = [LEADS.index(one), LEADS.index(other)]
    exchanged_LT[rows] = mv_LT[rows[::-1]]
    assert "missed by" in kinds(exchanged_LT)[UNEQUAL]


def test_leads_in_any_order_by_their_names(mv_LT) -> None:
    order = np.random.default_rng(2).permutation(12).tolist()
    leads = tuple(LEADS[i] for i in order)
    assert kinds(mv_LT[order], leads=leads) == {}
    assert kinds(mv_LT, leads=leads)[UNEQUAL]


def test_a_sign_that_was_changed(mv_LT) -> None:
    assert kinds(changed(mv_LT, "aVR", -mv_LT[3]))[UNEQUAL].startswith("aVR = -(I + II)/2 missed")


@pytest.mark.parametrize(
    ("dtype", "zero", "mv_per_count"), [("u2", 2048, 0.005), ("u2", 32768, 1e-3), ("i2", 1024, 1e-3), ("u1", 128, 0.05)]
)
def test_a_zero_that_is_in_the_counts_still(mv_LT, dtype, zero, mv_per_count) -> None:
    count_LT = np.rint(mv_LT / mv_per_count)
    detail = kinds((count_LT + zero).astype(dtype), mv_per_count)[ZERO]
    assert abs(float(detail.split()[1]) - zero * mv_per_count) < 0.3
    assert detail.endswith(" counts")
    assert ZERO in kinds((count_LT + zero) * mv_per_count), "of floats too"
    assert ZERO not in kinds(count_LT.astype("i4"), mv_per_count)
    assert (ZERO in kinds((count_LT[:1] + zero).astype(dtype), mv_per_count, ("I",))) == (zero * mv_per_count > 2)
    assert ZERO not in kinds((count_LT[:1] + 1.4 * zero).astype("i4"), mv_per_count, ("I",)), "an electrode's"
    assert "mend the ADC zero" in questions({ZERO: 10}, 10)[0]


def test_a_zero_of_leads_with_unequal_scales(mv_LT) -> None:
    scale_L = np.linspace(2e-3, 9e-3, 12)
    assert ZERO in kinds(np.rint(mv_LT / scale_L[:, None] + 2048).astype("i2"), scale_L)


def test_questions_are_of_most_records() -> None:
    assert questions({LOUD: 5, UNEQUAL: 6, FLAT: 10}, 10) == questions({UNEQUAL: 10}, 10)
    assert "--source-leads" in questions({UNEQUAL: 10}, 10)[0]
    assert questions({}, 0) == []


@pytest.mark.parametrize("leads", [("I",), ("II", "V5"), LEADS])
@pytest.mark.parametrize(("factor", "kind"), [(10, LARGE), (0.1, SMALL)])
def test_ten_times_as_much_or_a_tenth(mv_LT, leads, factor, kind) -> None:
    some_LT = mv_LT[[LEADS.index(lead) for lead in leads]]
    drift_T = 3 * np.sin(np.linspace(0, 9, mv_LT.shape[1]))
    assert kind in kinds(some_LT * factor, leads=leads)
    assert kind in kinds(np.rint(some_LT * factor * 1000).astype(np.int32), 1e-3, leads)
    assert {LARGE, SMALL}.isdisjoint(kinds(some_LT + drift_T, leads=leads))


def test_ten_times_as_much_is_seen_in_real_sets(shared_data: Path) -> None:
    source = WfdbFolder(shared_data / "cinc2021", "c")
    for item in source.items()[:20]:
        record = source.read(item)
        mv_LT = record.millivolts()
        assert LARGE in kinds(mv_LT * 10, leads=record.leads)
        assert SMALL in kinds(mv_LT / 10, leads=record.leads) or np.median(np.ptp(mv_LT, axis=1)) > 3


@pytest.mark.parametrize("seconds", [1.25, 2.0, 2.5, 3.0, 6.0])
def test_ten_times_as_much_is_seen_in_short_strips(mv_LT, shared_data: Path, seconds) -> None:
    source = WfdbFolder(shared_data / "cinc2021", "c")
    records = [source.read(item) for item in source.items()[:20]]
    for signal_LT, leads, rate_hz in [(mv_LT, LEADS, 500.0), *((r.millivolts(), r.leads, r.rate_hz) for r in records)]:
        n = round(seconds * rate_hz)
        for first in range(0, signal_LT.shape[1] - n, 2 * n):
            strip_LT = signal_LT[:, first : first + n]
            assert LARGE in kinds(strip_LT * 10, leads=leads, rate_hz=rate_hz)
            assert LARGE not in kinds(strip_LT, leads=leads, rate_hz=rate_hz)


def test_a_short_strip_is_not_called_small(mv_LT) -> None:
    for first in range(0, 3000, 500):
        assert SMALL not in kinds(mv_LT[:, first : first + 600])  # 1.2 s


@pytest.mark.parametrize("leads", [("I", "II"), LEADS])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_leads_whose_largest_number_is_1(mv_LT, leads, dtype) -> None:
    rows = [LEADS.index(lead) for lead in leads]
    peak_LT = (mv_LT / np.abs(mv_LT).max(axis=1, keepdims=True))[rows].astype(dtype)
    assert kinds(peak_LT, leads=leads) == {SCALED: "each reaches exactly 1 or -1"}
    assert SCALED not in kinds(1.001 * peak_LT, leads=leads)
    counts_LT = np.rint(peak_LT * 5000).astype(np.int16)
    assert kinds(counts_LT, 1 / 5000, leads) == {SCALED: "each reaches exactly 1 or -1"}


@pytest.mark.parametrize("leads", [("I",), LEADS])
def test_records_whose_largest_number_is_1(mv_LT, leads) -> None:
    some_LT = mv_LT[[LEADS.index(lead) for lead in leads]]
    unit_LT = some_LT / np.abs(some_LT).max()
    assert kinds(unit_LT, leads=leads) == {REACHES_1: ""}
    for dtype, full, mv_per_count in (
        ("i2", 32767, 1 / 32767),
        ("i2", 32767, 1e-4),
        ("i2", 1000, 1e-3),
        ("i4", 2**31 - 1, 1e-9),
    ):
        assert REACHES_1 in kinds(np.rint(unit_LT * full).astype(dtype), mv_per_count, leads)
        assert REACHES_1 not in kinds(np.rint(unit_LT * full * 0.99).astype(dtype), mv_per_count, leads)


@pytest.mark.parametrize(("dtype", "full"), [("i2", 32767), ("i4", 2**31 - 1), ("i1", 127)])
def test_leads_whose_largest_number_is_the_largest_of_their_type(mv_LT, dtype, full) -> None:
    peak_LT = mv_LT / np.abs(mv_LT).max(axis=1, keepdims=True)
    counts_LT = np.rint(peak_LT * full).astype(dtype)
    assert kinds(counts_LT, 3 / full)[SCALED] == "each reaches exactly 1 or -1"


def test_leads_of_nan_alone_are_absent(mv_LT) -> None:
    blank_LT = changed(changed(mv_LT, "aVF", np.nan), "V3", 4.0)
    kept, remarks = checked(blank_LT, 1.0, LEADS, 500.0)
    assert [LEADS[row] for row in kept] == [lead for lead in LEADS if lead not in ("aVF", "V3")]
    assert remarks == ((BLANK, "aVF"), (FLAT, "V3"))
    assert kinds(changed(mv_LT, "V6", np.nan) * 1000, np.full(12, 1e-3)) == {BLANK: "V6"}
    assert refusal(np.full_like(mv_LT, np.nan)) == "all samples are NaN"
    assert "NaN or infinity" in refusal(changed(changed(mv_LT, "I", np.nan), "II", np.nan, 4))


def test_long_records_are_judged_in_blocks(mv_LT, monkeypatch) -> None:
    z_LT = (mv_LT - mv_LT.mean(axis=1, keepdims=True)) / mv_LT.std(axis=1, keepdims=True)
    whole = judge(z_LT, 1.0, LEADS, 500.0)
    monkeypatch.setattr(record_module, "_PIECE", 777)
    assert judge(z_LT, 1.0, LEADS, 500.0) == whole
