"""Are the synthetic recordings pure functions of their name, and do they show what their labels say?

Shape suffixes: L leads, T samples, B beats.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from datetime import date
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import Record
from ecgscale.simulate import RHYTHMS, Simulation

NAMES = list(RHYTHMS)
Floats = npt.NDArray[np.float64]


@cache
def clean_records() -> list[Record]:
    data = Simulation(patients=96, noise=0.0)
    return [data.read(item) for item in data.items()]


def of_rhythm(rhythm: str) -> list[Record]:
    return [record for record in clean_records() if record.labels["rhythm"] == [rhythm]]


def digest(record: Record) -> str:
    return hashlib.sha256(record.signal_LT.tobytes() + record.scale_L.tobytes()).hexdigest()


def steepness(record: Record) -> Floats:
    """(T,) mV/s over all leads, smooth over 20 ms: high in QRS, low in P and T."""
    slope_LT = np.gradient(record.millivolts(), 1 / record.rate_hz, axis=1)
    return uniform_filter1d(np.sqrt((slope_LT**2).mean(axis=0)), round(0.02 * record.rate_hz))


def r_peaks(record: Record) -> npt.NDArray[np.int64]:
    steep_T = uniform_filter1d(steepness(record), round(0.06 * record.rate_hz))
    found, _ = find_peaks(steep_T, height=0.3 * steep_T.max(), distance=round(0.27 * record.rate_hz))
    return np.asarray(found, dtype=np.int64)


def rr_intervals_s(record: Record) -> Floats:
    return np.diff(r_peaks(record)) / record.rate_hz


def median_beat(record: Record) -> Floats:
    """(L * 0.6 s,) the typical beat without its mean level."""
    before, after = round(0.2 * record.rate_hz), round(0.4 * record.rate_hz)
    inside = [r for r in r_peaks(record) if before <= r < record.n_samples - after]
    signal_LT = record.millivolts().astype(np.float64)
    beat_LT = np.median([signal_LT[:, r - before : r + after] for r in inside], axis=0)
    return np.asarray(beat_LT - beat_LT.mean(axis=1, keepdims=True)).ravel()


def qrs_width_ms(record: Record) -> float:
    """Median length of the stretch around R that is steeper than a tenth of the steepest."""
    steep_T, widths = steepness(record), []
    reach = round(0.12 * record.rate_hz)
    for r in r_peaks(record):
        window = steep_T[max(0, r - reach) : r + reach]
        above = np.flatnonzero(window > 0.1 * window.max())
        widths.append((above[-1] - above[0]) / record.rate_hz * 1000)
    return float(np.median(widths))


def test_items_are_sorted_unique_and_complete() -> None:
    items = Simulation(patients=12, records_per_patient=3).items()
    assert items == sorted(set(items))
    assert len(items) == 36
    assert items[0] == "p00000/s00"
    assert items[-1] == "p00011/s02"


def test_a_record_is_what_ingest_expects() -> None:
    data = Simulation(patients=3, duration_s=7.3, rate_hz=250.0)
    record = data.read("p00002/s01")
    assert (record.name, record.patient, record.leads) == ("p00002/s01", "p00002", LEADS)
    assert record.signal_LT.shape == (12, 1825)
    assert record.rate_hz == 250.0
    assert record.labels["Dx"] == [RHYTHMS[record.labels["rhythm"][0]].snomed]
    assert 18 <= int(record.metadata["age"]) <= 95
    assert record.metadata["sex"] in ("female", "male")
    assert date.fromisoformat(record.metadata["session"]) > date.fromisoformat(
        data.read("p00002/s00").metadata["session"]
    )
    assert 1e-3 <= record.scale_L[0] <= 5e-3
    assert np.abs(record.millivolts()).max() < 15


def test_age_and_sex_belong_to_the_patient() -> None:
    data = Simulation(patients=5, records_per_patient=3)
    for patient in range(5):
        sessions = [data.read(f"p{patient:05d}/s{session:02d}") for session in range(3)]
        assert len({(record.metadata["age"], record.metadata["sex"]) for record in sessions}) == 1


def test_same_bits_in_any_order_and_any_size_of_the_data_set() -> None:
    small, large = Simulation(patients=9), Simulation(patients=5000, records_per_patient=7)
    digests = {item: digest(small.read(item)) for item in small.items()}
    assert len(set(digests.values())) == len(digests)
    assert {item: digest(large.read(item)) for item in reversed(small.items())} == digests


def test_same_bits_in_another_process() -> None:
    program = (
        "import hashlib; from ecgscale.simulate import Simulation\n"
        "for patient in (7, 2):\n"
        "    record = Simulation(seed=3).read(f'p{patient:05d}/s01')\n"
        "    print(hashlib.sha256(record.signal_LT.tobytes() + record.scale_L.tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = [digest(Simulation(seed=3).read(f"p{patient:05d}/s01")) for patient in (7, 2)]
    assert there.stdout.split() == here


def test_another_seed_is_other_patients() -> None:
    assert digest(Simulation(seed=1).read("p00000/s00")) != digest(Simulation(seed=2).read("p00000/s00"))


def einthoven_goldberger_error(record: Record) -> float:
    """The largest departure from the laws of the limb leads, in counts."""
    one, two, three, avr, avl, avf = record.signal_LT[:6].astype(np.float64)
    laws = (three - (two - one), avr + (one + two) / 2, avl - (one - two / 2), avf - (two - one / 2))
    return max(float(np.abs(law).max()) for law in laws)


def test_limb_leads_obey_einthoven_and_goldberger_within_quantisation() -> None:
    # Each of three roundings is off by at most half a count.
    assert max(einthoven_goldberger_error(record) for record in clean_records()) <= 1.5


def test_noise_obeys_the_laws_too_but_for_loose_leads() -> None:
    data = Simulation(patients=50)
    errors = [einthoven_goldberger_error(data.read(item)) for item in data.items()]
    assert np.mean([error <= 1.5 for error in errors]) > 0.9


def test_noise_scales_and_leaves_the_heart_alone() -> None:
    clean, quiet, loud = (Simulation(noise=noise).read("p00004/s00") for noise in (0.0, 0.5, 1.0))
    half_LT = quiet.millivolts() - clean.millivolts()
    whole_LT = loud.millivolts() - clean.millivolts()
    np.testing.assert_allclose(2 * half_LT, whole_LT, atol=3 * float(clean.scale_L[0]))
    assert whole_LT.std() > 0.01


@pytest.mark.parametrize("rhythm", NAMES)
def test_heart_rate_is_the_rhythms(rhythm: str) -> None:
    slowest, fastest = RHYTHMS[rhythm].rate_bpm
    rates = np.array([60 / rr_intervals_s(record).mean() for record in of_rhythm(rhythm)])
    assert len(rates) >= 10
    assert slowest <= np.median(rates) <= fastest
    # Ten seconds of an irregular rhythm, or a missed beat, may stray from the mean.
    assert np.mean((rates > 0.95 * slowest) & (rates < 1.05 * fastest)) >= 0.9


def test_atrial_fibrillation_is_irregular_and_sinus_rhythm_is_not() -> None:
    def variation(rhythm: str) -> Floats:
        intervals = [rr_intervals_s(record) for record in of_rhythm(rhythm)]
        return np.array([rr.std() / rr.mean() for rr in intervals])

    fibrillation, sinus = variation("atrial fibrillation"), variation("sinus rhythm")
    assert np.median(fibrillation) > 0.1
    assert np.median(sinus) < 0.06
    assert np.quantile(fibrillation, 0.25) > np.quantile(sinus, 0.75)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bundle_branch_block_widens_qrs(side: str) -> None:
    block = [qrs_width_ms(record) for record in of_rhythm(f"complete {side} bundle branch block")]
    sinus = [qrs_width_ms(record) for record in of_rhythm("sinus rhythm")]
    assert np.median(block) > np.median(sinus) + 25
    assert np.quantile(block, 0.1) > np.median(sinus)


def test_right_bundle_branch_block_ends_upright_in_v1_and_left_does_not() -> None:
    v1 = LEADS.index("V1")

    def late_mv(rhythm: str) -> float:
        levels = []
        for record in of_rhythm(rhythm):
            beat_LT = median_beat(record).reshape(12, -1)
            r = round(0.2 * record.rate_hz)
            levels.append(beat_LT[v1, r + 10 : r + 40].max() - beat_LT[v1, 10:40].mean())
        return float(np.median(levels))

    assert late_mv("complete right bundle branch block") > 0.15
    assert late_mv("complete right bundle branch block") > late_mv("sinus rhythm") + 0.1


def test_ventricular_premature_beats_come_early_and_a_pause_follows() -> None:
    paused = []
    records = of_rhythm("premature ventricular contractions")
    for record in records:
        rr_B = rr_intervals_s(record) / np.median(rr_intervals_s(record))
        early_B = (rr_B[:-1] < 0.88) & (np.abs(rr_B[:-1] + rr_B[1:] - 2) < 0.25)
        unseen_B = np.abs(rr_B - 2) < 0.25  # wide beats are not steep: the simple detector passes over some
        paused.append(early_B.any() or unseen_B.any())
    assert np.mean(paused) >= 0.9


def test_sessions_of_a_patient_are_more_alike_than_patients() -> None:
    # Patients of one rhythm: the rhythm itself must not be what tells them apart.
    records = [record for record in clean_records() if record.labels["rhythm"][0] in NAMES[:2]]
    first = {record.patient: record for record in records if record.name.endswith("s00")}
    second = {record.patient: record for record in records if record.name.endswith("s01")}
    shared = sorted(patient for patient in first if patient in second and patient is not None)
    assert len(shared) >= 15
    n = len(shared)
    beats = [median_beat(part[patient]) for part in (first, second) for patient in shared]
    correlation = np.asarray(np.corrcoef(beats))[:n, n:]
    other = correlation[~np.eye(n, dtype=bool)]
    assert np.median(np.diag(correlation)) > np.median(other) + 0.1
    assert np.mean(correlation.argmax(axis=1) == np.arange(n)) > 0.8


def test_every_rhythm_is_in_every_small_part_and_the_whole_is_balanced() -> None:
    data = Simulation(patients=160, records_per_patient=2, duration_s=5.0, rate_hz=100.0)
    rhythm = {item: data.read(item).labels["rhythm"][0] for item in data.items()}
    counts = Counter(rhythm.values())
    assert set(counts) == set(RHYTHMS)
    assert max(counts.values()) < 2.2 * min(counts.values())
    for residue in range(4):  # 40 patients each, as a split by a hash would take them
        part = {value for item, value in rhythm.items() if int(item[1:6]) % 4 == residue}
        assert part == set(RHYTHMS)


def test_chronic_rhythms_stay_and_others_come_and_go() -> None:
    data = Simulation(patients=64, records_per_patient=4, duration_s=5.0, rate_hz=100.0)
    of_patient: dict[str, set[str]] = {}
    for item in data.items():
        of_patient.setdefault(item[:6], set()).add(data.read(item).labels["rhythm"][0])
    chronic = {name for name, rhythm in RHYTHMS.items() if rhythm.otherwise is None}
    assert all(len(rhythms) == 1 for rhythms in of_patient.values() if rhythms & chronic)
    assert any(len(rhythms) == 2 for rhythms in of_patient.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", ""),
        ("patients", 0),
        ("patients", 2.5),
        ("records_per_patient", 0),
        ("records_per_patient", True),
        ("seed", -1),
        ("seed", 2**64),
        ("duration_s", 1.0),
        ("duration_s", float("nan")),
        ("rate_hz", 0.0),
        ("rate_hz", "fast"),
        ("noise", -0.1),
        ("noise", float("inf")),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{field} is "):
        Simulation(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "item", ["p00003/s00", "p00000/s02", "p0/s0", "p000000/s00", "", "p00000", "p00000/s00\n", "p٠٠٠٠٠/s00"]
)
def test_an_item_that_is_not_there_is_named(item: str) -> None:
    with pytest.raises(InputError, match=r"no item .* from p00000/s00 to p00002/s01"):
        Simulation(patients=3).read(item)


@pytest.mark.parametrize("rate_hz", [100.0, 360.0, 1000.0])
def test_any_duration_and_rate(rate_hz: float) -> None:
    data = Simulation(patients=8, records_per_patient=1, duration_s=5.0, rate_hz=rate_hz, noise=100.0)
    for item in data.items():
        assert data.read(item).duration_s == 5.0
