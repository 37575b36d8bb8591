"""Tars of the webdataset library: what was put in is read, exactly; what cannot be read exactly is refused by name."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset import ShardWriter

from ecgscale import cli
from ecgscale.data.foreign import Rules, common_order
from ecgscale.data.indexing import index_folder
from ecgscale.data.ingest import ingest
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.downstream import build_task, task_config
from ecgscale.errors import InputError, MachineError
from ecgscale.inspection import summarise, verify_dataset
from ecgscale.lead_names import LEADS
from ecgscale.simulate import Simulation
from in_memory import Records

MIMIC = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")
ALL_TRAIN = IngestOptions(validation_fraction=0)
SOME_LEADS = st.sets(st.sampled_from(LEADS), min_size=1)
ABOUT = {"rate_hz": 100, "leads": LEADS, "mv_per_count": 0.001, "patient": "p"}


def counts(seed: int, leads: int = 12, samples: int = 700) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32768, 32768, (leads, samples), np.int16)


def write_tars(folder: Path, samples: list[dict], per_tar: int = 4) -> Path:
    """By webdataset's own writer and encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / "part-%03d.tar"), maxcount=per_tar, verbose=0) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"s{i:03d}"} | sample)
    return folder


def index(folder: Path, options: IngestOptions = ALL_TRAIN, workers: int = 1, **rules: object) -> ShardSet:
    index_folder(folder, Rules(**rules), options, workers=workers)
    return ShardSet.open(folder)


def refused(folder: Path, *culprits: str, **rules: object) -> str:
    """The one line with which it is refused, by names. The folder stays as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError) as caught:
        index(folder, **rules)
    text = str(caught.value)
    assert "\n" not in text
    for culprit in (str(folder), *culprits):
        assert culprit in text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return text


def in_canonical_order(signal: np.ndarray, leads: tuple[str, ...]) -> np.ndarray:
    return signal[[leads.index(lead) for lead in LEADS if lead in leads]]


# --- what was put in comes out ---


def test_a_set_of_the_webdataset_library_is_a_data_set(tmp_path, capsys) -> None:
    samples = [
        {
            "npy": counts(i, samples=600 + i),
            "json": {"fs": 100, "sig_name": MIMIC, "gain": 200.0, "subject_id": i // 2, "dx": ["SR", "AF"][i % 2 :]},
        }
        for i in range(10)
    ]
    folder = write_tars(tmp_path / "mimic", samples)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["index", str(folder), "--label-keys", "dx", "--workers=2", "--validation-fraction=0.3"]) == 0
    assert "10 records at 100 Hz in 3 tars" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    shards = ShardSet.open(folder)
    for i, sample in enumerate(samples):
        record = shards.record(i)
        np.testing.assert_array_equal(record.signal_LT, in_canonical_order(sample["npy"], MIMIC))
        assert record.leads == LEADS
        assert record.name == f"part-{i // 4:03d}/s{i:03d}"
        assert (record.rate_hz, record.patient, record.labels) == (100, str(i // 2), {"dx": ["SR", "AF"][i % 2 :]})
        np.testing.assert_array_equal(record.scale_L, np.full(12, 1 / 200, np.float32))
    split, patient = shards.column("split"), shards.column("patient")
    assert len(set(patient.tolist())) == 5
    assert all(len(set(split[patient == one].tolist())) == 1 for one in patient)
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["inspect", str(folder)]) == 0
    assert "AF 10, SR 5" in capsys.readouterr().out
    assert cli.main(["index", str(folder)]) == 2
    assert "holds a data set already" in capsys.readouterr().err
    task = build_task(task_config(label="dx", classes=["SR", "AF"])).label(shards, splits=["train"])
    np.testing.assert_array_equal(task.target_RC[:, 0], [1, 0] * 5)


def test_what_is_no_ecg_is_counted_and_named(tmp_path, capsys) -> None:
    simulation = Simulation(patients=6, records_per_patient=1, seed=4)
    samples = []
    for item in simulation.items():
        record = simulation.read(item)
        said = {"rate_hz": 500, "leads": LEADS, "scale_mv": record.scale_L.tolist()}
        samples.append({"npy": record.signal_LT.copy(), "json": said})
    samples[1]["json"] |= {"scale_mv": [1.0] * 12}
    samples[2]["npy"][:] = 7
    samples[3]["npy"][4] = 0
    samples[5]["npy"][[0, 8]] = samples[5]["npy"][[8, 0]]
    folder = write_tars(tmp_path / "mixed", samples, per_tar=2)
    assert cli.main(["index", str(folder), "--workers=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    unequal = "I + III = II, aVR = -(I + II)/2 or their like do not hold: leads out of order, or not recorded together"
    assert lines[1:] == [
        f"{folder}: 1 records: no ECG by their scale; is mv_per_count or gain right?; part-000/s001",
        f"{folder}: 1 records: no ECG: nothing moves, codes for missing samples, or shorter than a beat; part-001/s002",
        f"{folder}: 1 records: leads without a signal; part-001/s003",
        f"{folder}: 1 records: {unequal}; part-002/s005",
        f"{folder}: 6 records at 500 Hz in 3 tars",
    ]
    counts = json.loads((folder / "manifest.json").read_text())["sources"][0]["remarked"]
    assert counts[unequal] == {"records": 1, "first": ["part-002/s005"]}
    assert cli.main(["verify", str(folder)]) == 0
    assert f"remarked    {unequal}: 1" in summarise(str(folder))


@pytest.mark.parametrize(
    ("about", "scale_mv"),
    [
        ({"gain": 200, "units": "mV", "baseline": [0] * 12}, 0.005),
        ({"gain": 0.2, "units": ["uV"] * 12, "adc_zero": 0}, 0.005),
        ({"adc_gain": [200.0] * 12, "Unit": "mV", "baseline": "second visit"}, 0.005),
        ({"gain": 200, "unit": "ICU", "baseline": True}, 0.005),
        ({"gain": 0.2, "units": "µV", "scale_mv": 0.005, "baseline": 0, "adc_zero": 1024}, 0.005),
    ],
)
def test_units_of_a_gain(tmp_path, about: dict, scale_mv: float) -> None:
    samples = [{"npy": counts(0), "json": {"rate_hz": 100, "patient": "p"} | about}]
    record = index(write_tars(tmp_path / "set", samples)).record(0)
    np.testing.assert_array_equal(record.scale_L, np.full(12, scale_mv, np.float32))


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"gain": 200, "baseline": 1024}, "its baseline is 1024, so that 0 mV is not the count 0; subtract it"),
        ({"gain": 200, "Baseline": [0] * 11 + [7]}, "its Baseline is [0, 0"),
        ({"gain": 200, "adc_zero": -3.5}, "its adc_zero is -3.5"),
        ({"gain": 200, "units": "counts"}, "its units are counts; write mV, uV or V, once or for each of 12 rows"),
        ({"gain": 200, "units": ["mV"] * 11}, "its units are ['mV', "),
        ({"gain": 200, "units": "mV", "unit": "uV"}, "it says units 'mV' and unit 'uV'; leave one out"),
        ({"gain": 200, "units": "uV", "scale_mv": 0.005}, "and a gain of 200 counts per uV, which is another"),
        ({"gain": 200, "adc_gain": 100}, "it says gain '200' and adc_gain '100'"),
    ],
)
def test_units_and_zeros_that_cannot_be_used(tmp_path, about: dict, reason: str) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": {"rate_hz": 100, "patient": "p"} | about}])
    assert reason in refused(folder, "s000.json")


@pytest.mark.parametrize(
    ("inner", "key"),
    [('"patient": "a", "patient": "b"', "patient"), ('"patient": "a", "labels": {"AF": 1, "AF": 0}', "AF")],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, inner: str, key: str) -> None:
    text = f'{{"rate_hz": 100, "gain": 200, {inner}}}'
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": text.encode()}])
    assert f"the key {key!r} stands twice" in refused(folder, "s000.json")


def test_label_keys_that_no_record_has_are_refused(tmp_path) -> None:
    about = {"rate_hz": 100, "gain": 200, "rhythm": None, "AF": 1, "Labels": {"inner": 0}}
    folder = write_tars(tmp_path / "set", [{"npy": counts(i), "json": about | {"patient": i}} for i in range(6)])
    assert "--label-keys 'rythm': no record has that key; did you mean 'rhythm'?" in refused(
        folder, label_keys=("rythm",)
    )
    assert "--label-columns 'af': no record has that key; did you mean 'AF'?" in refused(
        folder, label_columns=("x=inner,af",)
    )
    assert "the first have AF, Labels, gain, inner, patient" in refused(folder, label_keys=("diagnosis",))
    shards = index(folder, label_keys=("rhythm",), label_columns=("x=inner,AF",))  # all unknown, which is another thing
    assert shards.metadata(0)["labels"] == {"x": ["AF"]}


@pytest.mark.parametrize(
    ("each", "rules", "why"),
    [
        ([{"dx": "b", "labels": {"dx": "c"}}], {"label_keys": ("dx",)}, "it says dx 'b', but 'c' in labels"),
        ([{"AF": 1, "SB": 0, "labels": {"AF": 0}}], {"label_columns": ("rh=AF,SB",)}, "it says AF '1', but '0'"),
        ([{"AF": 1, "labels": {"rh": ["x"]}}], {"label_columns": ("rh=AF",)}, "a label 'rh' already"),
        ([{"rh": "x", "AF": 1}], {"label_columns": ("rh=AF",), "label_keys": ("rh",)}, "a label 'rh' already"),
        ([{"labels": {"AF": True}}, {"labels": {"AF": 1}}], {}, "'AF' as true or false"),
        ([{"labels": {"dx": "a"}}, {"labels": {"DX": "b"}}], {}, "'DX'"),
        ([{"dx": "a"}, {"Dx": "b"}], {"label_keys": ("dx",)}, "'Dx'"),
    ],
)
@pytest.mark.parametrize("per_tar", [1, 4])
def test_labels_that_contradict_are_refused(tmp_path, each: list[dict], rules: dict, why: str, per_tar: int) -> None:
    samples = [{"npy": counts(i), "json": ABOUT | one} for i, one in enumerate(each)]
    assert why in refused(write_tars(tmp_path / "set", samples, per_tar), **rules)


def test_labels_that_are_said_twice_are_one(tmp_path) -> None:
    said = {"dx": "b|c", "labels": {"dx": ["b", "c"], "AF": True}, "AF": 1}
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | said}])
    shards = index(folder, label_keys=("dx",), label_columns=("rh=AF",))
    assert shards.record(0).labels == {"dx": ["b", "c"], "rh": ["AF"]}


def test_a_flag_that_one_record_lacks_is_unknown_there(tmp_path) -> None:
    flags = ({"AF": 1}, {"AF": 1, "SB": 0})
    folder = write_tars(tmp_path / "set", [{"npy": counts(i), "json": ABOUT | flags[i]} for i in range(2)])
    shards = index(folder, label_columns=("AF,SB",))
    assert [shards.metadata(i)["labels"] for i in range(2)] == [{}, {"labels": ["AF"]}]


@pytest.mark.parametrize("normalisation", ["mv", "zscore"])
@pytest.mark.parametrize("order", [LEADS, MIMIC])
def test_the_stream_gives_the_samples_that_were_put_in(tmp_path, order, normalisation) -> None:
    scales = np.linspace(0.001, 0.002, 12).tolist()
    leads = [order if i % 3 else order[2:9] for i in range(12)]
    samples = [
        {"npy": counts(i, len(leads[i])), "json": ABOUT | {"leads": leads[i], "mv_per_count": scales[: len(leads[i])]}}
        for i in range(12)
    ]
    shards = index(write_tars(tmp_path / "set", samples))
    selection = Selection(shards, DataConfig(segment_s=2, min_record_s=4, normalisation=normalisation), "train")
    stream = TrainStream(selection, selection.order(4, 4, 1, 0), 0, 1, 2)
    seen = set()
    for number in range(3):
        batch = stream.make(number)
        for row, i in enumerate(batch.record_B.tolist()):
            seen.add(i)
            there = [LEADS.index(lead) for lead in LEADS if lead in leads[i]]
            expected_LT = in_canonical_order(samples[i]["npy"], leads[i])
            window_LT = batch.signal_BLT[row, there].numpy()
            starts = np.flatnonzero((expected_LT[0, :501][:, None] == window_LT[0, :1]).all(axis=1))
            start = next(s for s in starts if (expected_LT[0, s : s + 200] == window_LT[0]).all())
            np.testing.assert_array_equal(window_LT, expected_LT[:, start : start + 200])
            assert (batch.gain_BL[row].numpy() != 0).tolist() == [i in there for i in range(12)]
            if normalisation == "mv":
                scale_L = [scales[leads[i].index(LEADS[at])] for at in there]
                np.testing.assert_array_equal(batch.gain_BL[row, there].numpy(), np.array(scale_L, np.float32))
    assert seen == set(range(12))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(LEADS), st.lists(st.tuples(SOME_LEADS, st.integers(1, 40)), min_size=1))
def test_any_order_of_rows_is_read_exactly(tmp_path, order, shapes) -> None:
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    leads = [tuple(lead for lead in order if lead in some) for some, _ in shapes]
    scales = [list(range(1, len(leads_L) + 1)) for leads_L in leads]
    samples = [
        {
            "npy": counts(i, len(leads[i]), n),
            "json": ABOUT | {"leads": leads[i], "scale_mv": scales[i], "mv_per_count": None},
        }
        for i, (_, n) in enumerate(shapes)
    ]
    shards = index(write_tars(folder, samples))
    verify_dataset(folder)
    for i, sample in enumerate(samples):
        record = shards.record(i)
        np.testing.assert_array_equal(record.signal_LT, in_canonical_order(sample["npy"], leads[i]))
        assert record.scale_L.tolist() == [1 + leads[i].index(lead) for lead in record.leads]
        scale_L = shards.column("scale")[i]
        assert scale_L[shards.lead_positions(i)].tolist() == record.scale_L.tolist()


@given(st.lists(st.lists(st.sampled_from(LEADS[:7]), unique=True, min_size=1), max_size=5))
def test_a_common_order_is_found_exactly_where_there_is_one(kinds) -> None:
    order = common_order([tuple(kind) for kind in kinds])
    behind = {lead: {one for kind in kinds for one, two in pairwise(kind) if two == lead} for lead in LEADS}
    left = set(LEADS)
    while free := {lead for lead in left if not behind[lead] & left}:
        left -= free
    assert (order is None) == bool(left)  # bool: a circle
    if order is not None:
        assert sorted(order) == sorted(LEADS)
        assert all(sorted(kind, key=order.index) == kind for kind in kinds)
    if all(sorted(kind, key=LEADS.index) == kind for kind in kinds):
        assert order == LEADS


@pytest.mark.parametrize(
    "json_keys",
    [
        {"rate_hz": 100, "leads": LEADS, "scale_mv": [0.005] * 12, "patient": "a"},
        {"fs": 100.0, "lead_names": [lead.upper() for lead in LEADS], "mv_per_count": 0.005, "patient_id": "a"},
        {"sampling_rate": 100, "sig_name": LEADS, "gain": 200, "subject_id": "a"},
        {"sample_rate": 100, "gain": [200.0] * 12, "subject_id": "a"},
        {"sampling_frequency": 100, "mv_per_count": 0.005, "patient": None, "patient_id": "a"},
        {"FS": 100, "Lead_Names": LEADS, "Gain": 200, "PatientID": "a"},
        {"fs": 100, "gain": 200, "patientid": "a", "Patient": "Jo"},
    ],
)
def test_the_usual_names_are_known(tmp_path, json_keys) -> None:
    more = {
        "labels": {"Dx": ["1", 2], "n": 3, "none": None, "scp": {"NORM": 100.0}},
        "age": 61,
        "sex": "F",
        "list": [1],
    }
    record = index(write_tars(tmp_path / "set", [{"npy": counts(0), "json": json_keys | more}])).record(0)
    assert (record.rate_hz, record.leads, record.patient) == (100, LEADS, "a")
    np.testing.assert_array_equal(record.scale_L, np.full(12, 0.005, np.float32))
    assert record.labels == {"Dx": ["1", "2"], "n": ["3"], "scp": ["NORM"]}
    assert record.metadata == {"age": "61", "sex": "F"}


def test_options_say_what_the_json_does_not(tmp_path) -> None:
    samples = [
        {"ecg.npy": counts(i, 2), "meta.json": {"who": i, "AF": True, "leads": 2}, "jpg": b"x", "txt": "y"}
        for i in range(3)
    ]
    rules = {
        **{"rate_hz": 250.0, "leads": ("V1", "II"), "mv_per_count": 0.005, "patient_key": "who", "label_keys": ("AF",)},
        **{"signal_ext": "ecg.npy", "meta_ext": "meta.json"},
    }
    shards = index(write_tars(tmp_path / "set", samples), **rules)
    record = shards.record(1)
    assert (record.rate_hz, record.leads, record.patient, record.labels) == (250, ("II", "V1"), "1", {"AF": ["1"]})
    np.testing.assert_array_equal(record.signal_LT, samples[1]["ecg.npy"][::-1])
    verify_dataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("json_of_labels", "options", "labels"),
    [
        ({"dx": {"AF": False, "SB": True}}, {"label_keys": ("dx",)}, {"dx": ["SB"]}),
        ({"dx": {"AF": False, "SB": 0}}, {"label_keys": ("dx",)}, {"dx": []}),
        ({"dx": []}, {"label_keys": ("dx",)}, {"dx": []}),
        ({"dx": None}, {"label_keys": ("dx",)}, {}),
        ({"dx": "NA"}, {"label_keys": ("dx",)}, {}),
        ({"dx": "['A', 'B']"}, {"label_keys": ("dx",)}, {"dx": ["A", "B"]}),
        ({"dx": 17.0}, {"label_keys": ("dx",)}, {"dx": ["17"]}),
        ({"labels": {"AF": False, "SB": True, "ST": None}}, {}, {}),
        ({"labels": {"AF": False, "SB": True}}, {}, {"labels": ["SB"]}),
        ({"labels": {"AF": False, "rhythm": "SR|AF"}}, {}, {"AF": ["0"], "rhythm": ["SR", "AF"]}),
        ({"labels": ["A", "A", "nan"]}, {}, {"labels": ["A"]}),
        ({"AF": 1, "SB": 0.0}, {"label_columns": ("rhythm=AF,SB",)}, {"rhythm": ["AF"]}),
        ({"labels": {"AF": 0, "SB": 0, "n": 1}}, {"label_columns": ("AF,SB",)}, {"labels": [], "n": ["1"]}),
    ],
)
def test_flags_lists_and_unknown_words(tmp_path, json_of_labels: dict, options: dict, labels: dict) -> None:
    about = {name: value for name, value in ABOUT.items() if name != "patient"}
    samples = [
        {"npy": counts(0), "json": about | json_of_labels | {"patient": "NA", "subject_id": 17.0}},
        {"npy": counts(1), "json": about | json_of_labels | {"patient": "None"}},
        {"npy": counts(2), "json": about | json_of_labels | {"patient": "None"}},
    ]
    shards = index(write_tars(tmp_path / "set", samples), **options)
    record = shards.record(0)
    assert (record.labels, record.patient) == (labels, "17")
    assert {"AF", "SB", "dx"}.isdisjoint(record.metadata)
    assert len(set(shards.column("patient").tolist())) == 3
    assert "records 3" in " ".join(summarise(str(tmp_path / "set")).split())


def test_likelihoods_are_told_by_their_key(tmp_path, capsys) -> None:
    said = [{"SR": 0.0}, {"NORM": 80.0, "SR": 0.0}]
    samples = [{"npy": counts(i), "json": ABOUT | {"scp": one, "AF": {"AF": 0}}} for i, one in enumerate(said)]
    folder = write_tars(tmp_path / "set", samples, per_tar=1)
    assert cli.main(["index", str(folder), "--label-keys=scp,AF", "--workers=1"]) == 0
    shards = ShardSet.open(folder)
    assert [shards.record(i).labels["scp"] for i in (0, 1)] == [["SR"], ["NORM", "SR"]]
    assert shards.record(0).labels["AF"] == []
    verify_dataset(folder)


def test_what_was_done_to_ids_and_labels_is_counted(tmp_path, capsys) -> None:
    samples = [
        {"npy": counts(i), "json": ABOUT | {"patient": 17.0, "dx": "NULL", "sex": "NA", "age": 61.0}} for i in range(2)
    ]
    folder = write_tars(tmp_path / "set", samples)
    assert cli.main(["index", str(folder), "--label-keys=dx", "--workers=1"]) == 0
    said = capsys.readouterr().out
    assert "2 x dx 'NULL' taken as unknown" in said
    assert "2 x sex 'NA' taken as unknown" in said
    assert "2 x age written as a float (17.0, 1e+05), read as a whole number" in said
    assert "2 x patient written as a float (17.0, 1e+05), read as a whole number" in said


def test_manifests_of_older_versions_know_fewer_rules() -> None:
    fields = json.loads(json.dumps(Rules(rate_hz=100).to_manifest()))
    for name in ("label_columns", "patient_keys"):
        del fields[name]
    patient_keys = ("patient", "patient_id", "subject_id")
    assert Rules.from_manifest(fields, "manifest.json") == Rules(rate_hz=100, patient_keys=patient_keys)


def test_manifests_that_read_likelihoods_by_the_whole_set_are_indexed_again() -> None:
    fields = json.loads(json.dumps(Rules(rate_hz=100).to_manifest()))
    assert Rules.from_manifest(fields | {"likelihoods": ["scp_codes"]}, "manifest.json") == Rules(rate_hz=100)
    with pytest.raises(InputError, match=r"^manifest.json: .* index the tars again$"):
        Rules.from_manifest(fields | {"likelihoods": ["dx"]}, "manifest.json")


@pytest.mark.parametrize("per_tar", [1, 4])
def test_patients_under_different_keys_are_refused(tmp_path, per_tar) -> None:
    """7 of one key and 7 of another would be one person; the option says which one counts."""
    about = {name: value for name, value in ABOUT.items() if name != "patient"}
    each = [{"patient": "NA", "patient_id": 7}, {"PatientID": None, "Patient": 7, "patient_id": None}]
    samples = [{"npy": counts(i), "json": about | one} for i, one in enumerate(each)]
    folder = write_tars(tmp_path / "set", samples, per_tar)
    refused(folder, "s000", "s001", "'patient_id'", "'patient'", "--patient-key")
    shards = index(folder, patient_key="Patient_ID")
    assert [shards.record(i).patient for i in (0, 1)] == ["7", None]
    verify_dataset(folder)


@pytest.mark.parametrize("keys", [("patient_id", "subject_id"), ("subject_id", "Patient")])
@pytest.mark.parametrize("per_tar", [1, 4])
def test_keys_that_name_other_patients_are_refused(tmp_path, capsys, keys, per_tar) -> None:
    about = {name: value for name, value in ABOUT.items() if name != "patient"}

    def write(name: str, ids: list[tuple[int, str]]) -> Path:
        each = [{"npy": counts(i), "json": about | dict(zip(keys, one, strict=True))} for i, one in enumerate(ids)]
        return write_tars(tmp_path / name, each, per_tar)

    for name, ids in (("split", [(1, "P"), (2, "P")]), ("melted", [(1, "P"), (1, "Q")])):
        refused(write(name, ids), *map(str.casefold, keys), "--patient-key")
    assert index(tmp_path / "split", patient_key=keys[1]).record(1).patient == "P"
    assert cli.main(["index", str(write("same", [(1, "P"), (2, "Q"), (1, "P")])), "--workers=1"]) == 0
    assert f"{keys[1].casefold()} beside {keys[0]}, which names the same" in capsys.readouterr().out


def test_nan_is_an_unknown_patient(tmp_path) -> None:
    about = {name: value for name, value in ABOUT.items() if name != "patient"}
    samples = [{"npy": counts(0), "json": about | {"patient_id": float("nan"), "subject_id": 7}}]
    assert index(write_tars(tmp_path / "set", samples)).record(0).patient == "7"


def test_patients_of_two_data_sets_are_not_melted(tmp_path, make_record, ingest_records) -> None:
    for dataset, name in (("A", "a"), ("B", "b")):
        records = Records([make_record(name, patient="1")], dataset=dataset)
        ingest(records, tmp_path / "set", IngestOptions(rate_hz=100, payload="npy"), append=dataset == "B")
    (tmp_path / "tars").mkdir()
    for tar in (tmp_path / "set").glob("*.tar"):
        shutil.copy(tar, tmp_path / "tars")
    refused(tmp_path / "tars", "is of 'A'", "is of 'B'", "--dataset")
    index_folder(tmp_path / "tars", Rules(), ALL_TRAIN, dataset="both")
    assert len(set(ShardSet.open(tmp_path / "tars").column("patient").tolist())) == 1
    without = [{"npy": counts(i), "json": ABOUT | {"patient": None, "dataset": str(i)}} for i in range(2)]
    index(write_tars(tmp_path / "without", without))


def test_leads_under_another_spelling_are_not_taken_for_the_usual_order(tmp_path) -> None:
    about = {"rate_hz": 100, "Leads": MIMIC, "mv_per_count": 0.001}
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": about}])
    np.testing.assert_array_equal(index(folder).record(0).signal_LT, in_canonical_order(counts(0), MIMIC))


LEAD_LISTS = ("channels", "signal_names", "channel_names", "sig_names", "names", "lead_order")


@pytest.mark.parametrize("key", LEAD_LISTS)
def test_leads_are_found_under_any_key(tmp_path, key: str) -> None:
    about = {"rate_hz": 100, "mv_per_count": 0.001}
    for i, said in enumerate(({key: MIMIC}, {"header": {key: MIMIC}}, {key: ",".join(MIMIC)})):
        folder = write_tars(tmp_path / f"set{i}", [{"npy": counts(0), "json": about | said}])
        shards = index(folder)
        np.testing.assert_array_equal(shards.record(0).signal_LT, in_canonical_order(counts(0), MIMIC))
        assert shards.metadata(0)["leads"] == [*LEADS]
        verify_dataset(folder)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        *(({key: MIMIC, "leads": LEADS}, f"and {key} I,II,III,aVR,aVF") for key in LEAD_LISTS),
        ({"header": {"leads": MIMIC}}, "and leads I,II,III,aVR,aVF"),
        ({"channels": ["DI", "DII", *LEADS[2:]]}, "--rename-leads='DI=I'"),
        *(({key: 500}, f"'{key}' says 500") for key in ("rate", "frequency", "Hz")),
        *(({key: 500}, f"{key} '500'") for key in ("fs_hz", "srate")),
        ({"header": {"fs": 500}}, "'fs' says 500"),
        *(({key: 500}, f"'{key}' says 500") for key in ("sample_freq", "resampled_to", "targetFs")),
        *(({key: 2}, f"'{key}' says 500") for key in ("sampling_interval_ms", "samplingPeriod_ms")),
        *(({key: 0.002}, f"'{key}' says 500") for key in ("dt", "sampling_interval")),
    ],
)
def test_leads_and_rates_that_contradict_are_refused(tmp_path, said: dict, why: str) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | said}])
    assert why in refused(folder, "s000.json")


UNREAD_LEADS = (
    {"channels": [{"name": lead, "gain": 1000} for lead in MIMIC]},
    {"signals": {"rows": [{"row": i, "lead": lead} for i, lead in enumerate(MIMIC)]}},
    {"channels": {lead: i for i, lead in enumerate(MIMIC)}},
    {"channels": {str(i): lead for i, lead in enumerate(MIMIC)}},
    {f"channel_{i}": lead for i, lead in enumerate(MIMIC)},
    {"lead_order": " ".join(MIMIC)},
    {"lead_order": "|".join(MIMIC)},
    {"lead_order": json.dumps(MIMIC)},
    {"channels": [[i, lead] for i, lead in enumerate(MIMIC)]},
    {"channels": [f"{i}:{lead} (mV)" for i, lead in enumerate(MIMIC)]},
    {"channels": [*MIMIC, "time"]},
)


@pytest.mark.parametrize("said", UNREAD_LEADS, ids=range(len(UNREAD_LEADS)))
def test_leads_in_a_form_that_is_not_read_are_refused(tmp_path, said: dict) -> None:
    about = {"rate_hz": 100, "mv_per_count": 0.001}
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": about | said}])
    assert "give --leads" in refused(folder, "s000.json")
    np.testing.assert_array_equal(
        index(folder, leads=tuple(MIMIC)).record(0).signal_LT, in_canonical_order(counts(0), MIMIC)
    )


@pytest.mark.parametrize(
    "said",
    [{"signal": {"baseline": 512}}, {"signal": {"adc_zero": [100] * 12}}, {"signals": [{"baseline": 512}] * 12}],
)
def test_a_zero_that_stands_deeper_is_refused_too(tmp_path, said: dict) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | said}])
    assert "so that 0 mV is not the count 0" in refused(folder, "s000.json")


@pytest.mark.parametrize("option", [{}, {"mv_per_count": 0.001}])
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"signal": {"gain": 200, "units": "mV"}}, "its signal.gain is 200, which is not the scale"),
        ({"uv_per_lsb": 4.88}, "its uv_per_lsb is 4.88"),
        ({"meta": {"polarity": "inverted"}}, "its meta.polarity is inverted, so that leads are upside down"),
        ({"dc_offset": 3}, "so that 0 mV is not the count 0"),
    ],
)
def test_what_says_another_amplitude_is_refused(tmp_path, said: dict, reason: str, option: dict) -> None:
    about = {key: value for key, value in ABOUT.items() if not option or key != "mv_per_count"}
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": about | said}])
    assert reason in refused(folder, "s000.json", **option)


def test_what_is_named_as_a_label_says_nothing_of_amplitude(tmp_path) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | {"inverted": "T wave"}}])
    refused(folder, "upside down")
    assert index(folder, label_keys=("inverted",)).record(0).labels == {"inverted": ["T wave"]}


def test_a_mapping_of_gains_beside_the_option_is_compared(tmp_path) -> None:
    about = {"rate_hz": 100, "patient": "p", "leads": LEADS, "gain": dict.fromkeys(LEADS, 200)}
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": about}])
    assert "its gain.I is 200, which is not the scale" in refused(folder, mv_per_count=0.001)
    assert index(folder, mv_per_count=0.005).record(0).scale_L[0] == np.float32(0.005)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        *(({key: 3500}, f"its {key} is 3500, but its array has 700") for key in ("sig_len", "n_samples", "NumSamples")),
        ({"header": {"duration_s": 35}}, "its duration_s is 35, but its array has 700 samples at 100 Hz"),
    ],
)
def test_a_length_that_the_array_contradicts_is_refused(tmp_path, said: dict, reason: str) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | said}])
    assert reason in refused(folder, "s000.json", "--rate-hz")
    index(folder, rate_hz=100.0)
    same = {"sig_len": 700, "duration_s": 7.01, "samples": None, "duration": 10}
    index(write_tars(tmp_path / "same", [{"npy": counts(0), "json": ABOUT | same}]))


@pytest.mark.parametrize(
    "said", [{"fs": [100] * 11 + [50]}, {"h": {"fs": {"I": 50}}}, {"h": [[{"Sampling Rate": "50 Hz"}]]}]
)
def test_a_rate_of_one_lead_is_a_rate(tmp_path, said: dict) -> None:
    about = {key: value for key, value in ABOUT.items() if key != "rate_hz"} | {"srate": None}
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": about | said}])
    assert "says 50; leave one out" in refused(folder, "s000.json", rate_hz=100.0)


@pytest.mark.parametrize("per_tar", [1, 4])
@pytest.mark.parametrize(
    "said", [{"meta": {"dataset": "?"}}, {"DataSet": {"name": "?"}}, {"from": [{"database": "?"}]}, {"source": "?"}]
)
def test_data_sets_are_told_apart_at_any_depth(tmp_path, said: dict, per_tar: int) -> None:
    def of(name: str) -> dict:
        return json.loads(json.dumps(said).replace("?", name))

    def write(folder: str, names: tuple[str, str]) -> Path:
        samples = [{"npy": counts(i), "json": ABOUT | of(name)} for i, name in enumerate(names)]
        return write_tars(tmp_path / folder, samples, per_tar)

    folder = write("two", ("A", "B"))
    refused(folder, "of ", "'A'", "'B'", "--dataset")
    index_folder(folder, Rules(), ALL_TRAIN, dataset="both")
    assert len(index(write("one", ("A", "A")))) == 2


def test_sources_of_other_patients_and_files_name_no_data_set(tmp_path) -> None:
    each = [
        *({"patient": "a", "source": source} for source in ("raw/1.dat", "raw/2.dat", "3.hea")),
        *({"patient": patient, "source": patient} for patient in ("b", "c")),
    ]
    assert len(index(write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | one} for one in each]))) == 5


def test_json_that_nests_deep_is_read_or_refused(tmp_path) -> None:
    text = json.dumps(ABOUT)[:-1] + ', "x": ' + '{"a":' * 700 + "1" + "}" * 701
    refused(write_tars(tmp_path / "set", [{"npy": counts(0), "json": text.encode()}]), "s000.json", "nests too deep")


def test_other_lists_and_rates_say_nothing_of_leads(tmp_path) -> None:
    said = {
        "noisy": ["V1"],
        "stage": "II",
        "dx": ["I", *["x"] * 11],
        "rate": 72,
        "heart": {"rate": 72},
        "frequency": 100,
    }
    shards = index(write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT | said}]))
    assert shards.record(0).rate_hz == 100
    with_option = {name: value for name, value in ABOUT.items() if name != "rate_hz"}
    folder = write_tars(tmp_path / "option", [{"npy": counts(0), "json": with_option | {"srate": 400}}])
    refused(folder, "400", "--rate-hz", rate_hz=500.0)


def test_splits_by_a_key(tmp_path) -> None:
    samples = [{"npy": counts(i), "json": ABOUT | {"patient": i, "fold": i % 3}} for i in range(9)]
    folder = write_tars(tmp_path / "set", samples)
    by_fold = IngestOptions(split_by="fold", validation_values=("1",), test_values=("2",))
    shards = index(folder, by_fold)
    assert shards.column("split").tolist() == [0, 1, 2] * 3
    for key, value in (("fold", "7"), ("nothing", "1")):
        (folder / "manifest.json").unlink()
        with pytest.raises(InputError, match="no record has"):
            index(folder, IngestOptions(split_by=key, validation_values=(value,)))
        index(folder)
    same = [{"npy": counts(i), "json": ABOUT | {"fold": i % 3}} for i in range(3)]
    with pytest.raises(InputError, match="two splits"):
        index(write_tars(tmp_path / "torn", same), by_fold)


@pytest.mark.parametrize(
    "said", [{"fold": [9]}, {"Fold": "9.0"}, {"metadata": {"fold": 9}}, {"labels": {"FOLD": ["9"]}, "fold": "NA"}]
)
def test_a_split_is_found_wherever_the_json_says_it(tmp_path, capsys, said: dict) -> None:
    each = [{"fold": 8}, said, {}, {"fold": None}]
    samples = [{"npy": counts(i), "json": ABOUT | {"patient": i} | one} for i, one in enumerate(each)]
    folder = write_tars(tmp_path / "set", samples)
    by_fold = ["--split-by=fold", "--validation-values=8", "--test-values=9", "--workers=1"]
    assert cli.main(["index", str(folder), *by_fold]) == 0
    assert ShardSet.open(folder).column("split").tolist() == [1, 2, 0, 0]
    assert "2 x a record that has no fold, put into training" in capsys.readouterr().out


@pytest.mark.parametrize("said", [{"fold": "9|8"}, {"fold": ["9", 8]}, {"fold": 1, "labels": {"fold": 9}}])
def test_two_splits_of_one_record_are_refused(tmp_path, said: dict) -> None:
    samples = [{"npy": counts(i), "json": ABOUT | one} for i, one in enumerate([{"fold": 8}, {"fold": 9}, said])]
    folder = write_tars(tmp_path / "set", samples)
    with pytest.raises(InputError, match=r"part-000.tar: 'part-000/s002': fold has 2 values"):
        index(folder, IngestOptions(split_by="fold", validation_values=("8",), test_values=("9",)))


def test_processes_do_not_change_the_bytes(tmp_path) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(i), "json": ABOUT} for i in range(9)], per_tar=2)
    one = index(folder).identity
    (folder / "manifest.json").unlink()
    assert index(folder, workers=2).identity == one


def test_keys_may_begin_anew_in_each_tar(tmp_path) -> None:
    """Records without patients stay persons of their own."""
    samples = [{"__key__": f"{i % 4}", "npy": counts(i), "json": ABOUT | {"patient": None}} for i in range(8)]
    shards = index(write_tars(tmp_path / "set", samples))
    assert len(set(shards.column("patient").tolist())) == 8
    assert [shards.metadata(i)["name"] for i in (3, 4)] == ["part-000/3", "part-001/0"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs(tmp_path, form) -> None:
    """With folders, ./ before the names, fractions of seconds in pax headers, and files that are no samples."""
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("./ecgs")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        for name, content in (
            ("./ecgs/README", b"hello"),
            ("./ecgs/.DS_Store", b"x"),
            ("./ecgs/ß1.json", json.dumps(ABOUT).encode()),
            ("./ecgs/ß1.npy", npy(counts(1))),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000.25
            tar.addfile(info, io.BytesIO(content))
    if form == tarfile.PAX_FORMAT:  # which says such a name in a header of its own
        assert "ustar" in refused(tmp_path / "set", "a.tar", "path")
        return
    shards = index(tmp_path / "set")
    np.testing.assert_array_equal(shards.signal(0), counts(1))
    assert shards.metadata(0)["name"] == "a/./ecgs/ß1"
    verify_dataset(tmp_path / "set")


def test_pax_headers_that_tell_the_time(tmp_path) -> None:
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("1.json", json.dumps(ABOUT).encode()), ("1.npy", npy(counts(1)))):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000.25
            tar.addfile(info, io.BytesIO(content))
    np.testing.assert_array_equal(index(tmp_path / "set").signal(0), counts(1))


def test_shadow_files_of_a_system_are_no_tars(make_record, ingest_records, tmp_path) -> None:
    own = ingest_records(tmp_path / "own", [make_record(f"r{i}") for i in range(3)], payload="npy")
    (tmp_path / "again").mkdir()
    for tar in own.glob("*.tar"):
        shutil.copy(tar, tmp_path / "again")
        (tmp_path / "again" / f"._{tar.name}").write_bytes(b"\0\5\26\7")
    assert len(index(tmp_path / "again")) == 3


def test_own_tars_can_be_indexed_too(make_record, ingest_records, tmp_path) -> None:
    records = [make_record(f"r{i}", 600, LEADS[i:], labels={"Dx": ["1", "2"]}) for i in range(5)]
    own = ingest_records(tmp_path / "own", records, payload="npy", validation_fraction=0)
    (tmp_path / "again").mkdir()
    for tar in own.glob("*.tar"):
        shutil.copy(tar, tmp_path / "again")
    shards = index(tmp_path / "again")
    for i, record in enumerate(records):
        again = shards.record(i)
        np.testing.assert_array_equal(again.signal_LT, record.signal_LT)
        np.testing.assert_array_equal(again.scale_L, record.scale_L)
        assert (again.leads, again.patient, again.labels) == (record.leads, record.patient, record.labels)
    both = ShardSet.open([own, tmp_path / "again"])
    np.testing.assert_array_equal(both.signal(7), records[2].signal_LT)
    assert "rejected" in summarise(str(tmp_path / "again"))


# --- what is refused ---


def npy(array: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.save(file, array)
        return file.getvalue()


@pytest.mark.parametrize(
    ("array", "why"),
    [
        *((counts(0).astype(t), "not int16") for t in (np.int32, np.float32, np.uint16, np.int8, ">i2")),
        *((np.asfortranarray(counts(0)), "Fortran"), (counts(0)[0], "shape"), (counts(0)[None], "shape")),
        *((counts(0, 12, 0), "shape"), (np.ascontiguousarray(counts(0).T), "700 rows"), (counts(0, 13), "13 rows")),
        *(
            (counts(0, 11), "11 rows for the 12 leads"),
            (b"not numpy", "no .npy"),
            (npy(counts(0))[:-1], "bytes follow"),
        ),
        *((npy(counts(0)) + b"x", "bytes follow"), (b"", "no .npy"), (npy(counts(0))[:9], "no .npy")),
        (np.zeros(12, [("a", "<i2")]), "not int16"),
    ],
)
def test_arrays_that_are_not_counts_are_refused(tmp_path, array, why) -> None:
    samples = [{"npy": counts(i), "json": ABOUT} for i in range(6)]
    samples[5]["npy"] = array if isinstance(array, bytes) else npy(array)
    assert why in refused(write_tars(tmp_path / "set", samples), "part-001.tar", "member 's005.")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fs": 250}, "it says rate_hz '100' and fs '250'"),
        ({"gain": 200}, "a scale of 0.001 mV per count and a gain of 200 counts per mV"),
        ({"sig_name": LEADS[::-1]}, "it says leads "),
    ],
)
def test_json_that_says_two_things_is_refused(tmp_path, change, why) -> None:
    samples = [{"npy": counts(i), "json": ABOUT | (change if i == 4 else {})} for i in range(6)]
    assert why in refused(write_tars(tmp_path / "set", samples), "part-001.tar", "'s004.json'")
    same = {"fs": 100.0, "gain": 1000, "sig_name": [lead.upper() for lead in LEADS]}
    samples = [{"npy": counts(i), "json": ABOUT | same} for i in range(6)]
    assert cli.main(["index", str(write_tars(tmp_path / "same", samples))]) == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *(({"rate_hz": None}, "--rate-hz"), ({"rate_hz": "100"}, "--rate-hz"), ({"rate_hz": 0}, "--rate-hz")),
        *(({"mv_per_count": None}, "--mv-per-count"), ({"mv_per_count": 0}, "mv_per_count")),
        *(({"mv_per_count": [0.1] * 11}, "or 12"), ({"mv_per_count": float("nan")}, "nan")),
        *(({"leads": LEADS[:11]}, "11 leads"), ({"leads": [*LEADS[:11], "X"]}, "'X'"), ({"leads": 12}, "--leads")),
        *(({"leads": [*LEADS[:11], "I"]}, "lead I stands"), ({"patient": ["a"]}, "'patient'")),
        *(({"Patient": "q"}, "patient twice"), ({"FS": 250, "fs": 100}, "fs twice")),
        *(
            ({"labels": {"Dx": [["1"]]}}, "'Dx'"),
            ({"labels": {"Dx": [0, 1]}}, "without names"),
            ({"patient": 1e20}, "lost"),
            (b"{", "JSON"),
            (b"[]", "no JSON object"),
            (b"\xff{}", "JSON"),
        ),
        *((b"[" * 100_000, "JSON"), (b'{"patient": "\\ud800"}', "JSON")),
    ],
)
def test_json_that_says_too_little_is_refused(tmp_path, change, why) -> None:
    samples = [{"npy": counts(i), "json": dict(ABOUT)} for i in range(6)]
    samples[4]["json"] = change if isinstance(change, bytes) else ABOUT | change
    assert why in refused(write_tars(tmp_path / "set", samples), "part-001.tar", "'s004.json'")


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        *(({"rate_hz": 250.0}, "--rate-hz"), ({"mv_per_count": 0.1}, "--mv-per-count"), ({"leads": MIMIC}, "--leads")),
        *(
            ({"patient_key": "who"}, "--patient-key"),
            ({"signal_ext": "ecg.npy"}, ".ecg.npy"),
            ({"meta_ext": "x"}, ".x"),
        ),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, rules, why) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT}])
    assert why in refused(folder, "part-000.tar", "s000", **rules)


def test_leads_of_the_json_are_renamed(tmp_path) -> None:
    samples = [{"npy": counts(i), "json": ABOUT | {"leads": ["DI", "ECG_II", *LEADS[2:]]}} for i in range(6)]
    folder = write_tars(tmp_path / "set", samples)
    text = refused(folder, "'DI', likely I", "--rename-leads='DI=I'")
    assert "--ignore-leads" not in text
    index(folder, rename_leads=("DI=I",))
    shards = ShardSet.open(folder)
    assert shards.record(0).leads == LEADS
    shards.metadata(0)
    with pytest.raises(InputError, match="rename-leads 'DI'"):
        Rules(rename_leads=("DI",))


def test_rates_and_orders_that_differ_are_refused(tmp_path) -> None:
    rates = [{"npy": counts(i), "json": ABOUT | {"rate_hz": 100 + 25 * (i == 5)}} for i in range(6)]
    text = refused(write_tars(tmp_path / "rates", rates), "part-001.tar: 'part-001/s005'", "part-000.tar")
    assert "125 Hz" in text
    orders = [{"npy": counts(i), "json": ABOUT | {"leads": MIMIC if i == 5 else LEADS}} for i in range(6)]
    assert "order" in refused(write_tars(tmp_path / "orders", orders), "part-001.tar: 'part-001/s005'")


def test_other_processes_name_the_culprit_too(tmp_path) -> None:
    samples = [{"npy": counts(i), "json": ABOUT} for i in range(9)]
    del samples[6]["npy"]
    folder = write_tars(tmp_path / "set", samples, per_tar=2)
    with pytest.raises(InputError, match=r"part-003\.tar: key 's006' has no member \.npy"):
        index(folder, workers=2)
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("missing", ["npy", "json"])
def test_incomplete_samples_are_refused(tmp_path, missing) -> None:
    samples = [{"npy": counts(i), "json": ABOUT} for i in range(3)]
    del samples[1][missing]
    refused(write_tars(tmp_path / "set", samples), "part-000.tar", "'s001'", f".{missing}")


def test_folders_without_tars_are_refused(tmp_path) -> None:
    refused(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "gunzip" in refused(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert "empty" in refused(tmp_path, "a.tar")
    with pytest.raises(InputError, match="no such folder"):
        index(tmp_path / "absent")
    with pytest.raises(InputError, match="no such folder"):
        index(Path("pipe:cat x"))


@pytest.mark.parametrize(
    "rules",
    [
        *({"rate_hz": 0.0}, {"rate_hz": float("nan")}, {"mv_per_count": 0.0}, {"mv_per_count": float("inf")}),
        *({"leads": ("I", "X")}, {"leads": ("AVR",)}, {"signal_ext": ""}, {"meta_ext": "npy"}, {"lead_order": ("I",)}),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules) -> None:
    with pytest.raises(InputError):
        Rules(**rules)
    with pytest.raises(InputError, match="place"):
        Rules.from_manifest(json.loads(json.dumps(Rules().to_manifest() | rules)), "place")


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch) -> None:
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT}])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MachineError, match="No space left"):
        index(folder)
    monkeypatch.undo()
    index(folder)


def test_nothing_is_appended_to_tars_that_others_wrote(tmp_path, capsys) -> None:
    """Their rules would not hold for what is appended."""
    folder = write_tars(tmp_path / "set", [{"npy": counts(0), "json": ABOUT}])
    index(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["simulate", str(folder), "--patients=2", "--rate-hz=100", "--append", "--workers=1"]) == 2
    assert f"{folder}: tars that others wrote" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
