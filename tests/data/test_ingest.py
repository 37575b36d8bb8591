"""Ingest: the same bytes from any number of processes, honest rejections, splits that keep patients apart."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.data.sources import WfdbFolder, wfdb
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS

WFDB_RATE_HZ = 250
BROKEN = {"bad/cut", "bad/garbage", "bad/lead", "bad/rate", "bad/unit"}


def sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def splits(folder: Path) -> dict[str, str]:
    """Record name -> name of its split."""
    shards = ShardSet.open(folder)
    split = shards.column("split")
    return {shards.metadata(i)["name"]: SPLITS[split[i]] for i in range(len(shards))}


def run(*argv: object) -> int:
    """Exit code of a command line; argparse raises its own."""
    try:
        return cli.main([str(argument) for argument in argv])
    except SystemExit as end:
        return int(end.code)


def write_wfdb(folder: Path, name: str, signal_mv_TL: np.ndarray, leads=("I", "II", "V1"), **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    options = {"fs": WFDB_RATE_HZ, "units": ["mV"] * len(leads), "fmt": ["16"] * len(leads)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword in DataFrame", DeprecationWarning)  # wfdb 4.3.1
        wfdb.wrsamp(name, p_signal=signal_mv_TL, sig_name=list(leads), write_dir=str(folder), **(options | fields))
    return folder / f"{name}.hea"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Nine readable WFDB records of four patients in three folders, and five that are each broken in another way."""
    root = tmp_path_factory.mktemp("raw") / "hospital"
    time_T = np.arange(10 * WFDB_RATE_HZ) / WFDB_RATE_HZ
    wave_TL = np.stack([np.sin(2 * np.pi * hz * time_T) for hz in (1.0, 5.0, 20.0)], axis=1)
    for i in range(9):
        comments = [f"Age: {50 + i}", "Sex: Female", f"Dx: 426783006,{i}", f"patient: p{i % 4}"]
        write_wfdb(root / f"ward{i % 3}", f"rec{i}", (1 + i) * wave_TL, comments=comments)
    bad = root / "bad"
    for name in ("cut", "lead", "rate", "unit"):
        write_wfdb(bad, name, wave_TL)
    (bad / "cut.dat").write_bytes((bad / "cut.dat").read_bytes()[:-500])
    (bad / "garbage.hea").write_bytes(b"\x00\xff nonsense")
    edit(bad / "lead.hea", " V1", " pleth")
    edit(bad / "rate.hea", f" {WFDB_RATE_HZ} ", " 0 ")
    edit(bad / "unit.hea", "/mV", "/bpm")
    return root


# --- bytes ---


def test_bytes_do_not_depend_on_the_number_of_processes(raw, tmp_path) -> None:
    options = IngestOptions(rate_hz=100, records_per_shard=3)
    for workers in (1, 2, 3):
        ingest(WfdbFolder(raw, "hospital"), tmp_path / f"{workers}", options, workers)
    one = sha256(tmp_path / "1")
    assert len([name for name in one if name.endswith(".tar")]) == 4  # 14 headers, five of them broken: one is empty
    assert "rejected.csv" in one
    assert sha256(tmp_path / "2") == one
    assert sha256(tmp_path / "3") == one


# --- what cannot be read ---


def test_rejected_records_are_listed_and_counted(raw, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert run("ingest", raw, out, "--rate-hz=100", "--workers=1") == 0
    closing = capsys.readouterr().out.splitlines()[-1]
    assert "9 records" in closing
    assert "5 rejected" in closing
    assert str(out / "rejected.csv") in closing
    with (out / "rejected.csv").open(newline="") as file:
        reasons = {row["record"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == BROKEN
    for name, reason in reasons.items():
        assert f"{raw}/{name}.hea" in reason
        assert "\n" not in reason
    assert "truncated" in reasons["bad/cut"]
    assert "pleth" in reasons["bad/lead"]
    assert "bpm" in reasons["bad/unit"]
    assert sorted(splits(out)) == sorted(f"ward{i % 3}/rec{i}" for i in range(9))


def test_a_name_that_is_not_utf8_rejects_one_record(raw, tmp_path, capsys) -> None:
    source = shutil.copytree(raw / "ward0", tmp_path / "source")
    (source / "rec0.hea").rename(source / os.fsdecode(b"caf\xe9.hea"))
    assert run("ingest", source, tmp_path / "out", "--rate-hz=100", "--workers=1") == 0
    assert "2 records in 1 shards, 1 rejected" in capsys.readouterr().out
    assert "\ncaf\\udce9,the name" in (tmp_path / "out" / "rejected.csv").read_text("utf8").replace("\r", "")
    assert run("ingest", source.rename(tmp_path / os.fsdecode(b"caf\xe9")), tmp_path / "second") == 2
    assert "caf\\udce9" in capsys.readouterr().err


def test_no_data_set_where_nothing_can_be_read(raw, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert run("ingest", raw / "bad", out, "--workers=1") == 2
    assert "none of the 5 records" in capsys.readouterr().err
    assert len((out / "rejected.csv").read_text().splitlines()) == 6
    with pytest.raises(InputError, match=str(out)):
        ShardSet.open(out)
    assert run("ingest", raw, out, "--workers=1") == 0  # the folder may be used again


def test_an_empty_source_is_refused(ingest_records, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "absent"):
        assert run("ingest", source, tmp_path / "out") == 2
        assert str(source) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="none of the 0 records"):
        ingest_records(tmp_path / "out", [])


# --- where it is written ---


def test_a_data_set_is_not_overwritten(raw, copied, capsys) -> None:
    before = sha256(copied)
    assert run("ingest", raw, copied) == 2
    assert f"{copied}: holds a data set already" in capsys.readouterr().err
    assert sha256(copied) == before


def test_shards_of_somebody_else_are_not_removed(raw, copied, capsys) -> None:
    """shard-000000.tar is what many WebDataset folders hold."""
    (copied / "manifest.json").unlink()
    before = sha256(copied)
    assert run("ingest", raw, copied) == 2
    assert f"{copied}/index-" in (error := capsys.readouterr().err)
    assert "not made by an interrupted ingest" in error
    assert sha256(copied) == before


def test_a_file_is_no_place_for_a_data_set(raw, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("ingest", raw, out, "--workers=1") == 2
        assert capsys.readouterr().err.startswith(f"ecgscale: {out}: ")
    assert (tmp_path / "file").read_text() == "x"


# --- splits ---


@pytest.fixture(scope="module")
def patients(make_record) -> list:
    """Two short recordings of each of 500 patients."""
    return [make_record(f"{p:03d}/{r}", 5, ["I"], patient=f"{p}") for p in range(500) for r in range(2)]


def test_split_by_hash_keeps_patients_apart(ingest_records, patients, tmp_path) -> None:
    options = {"validation_fraction": 0.15, "test_fraction": 0.3, "records_per_shard": 300}
    split = splits(ingest_records(tmp_path / "a", patients, **options))
    assert all(split[f"{p:03d}/0"] == split[f"{p:03d}/1"] for p in range(500))
    share = {name: count / 1000 for name, count in Counter(split.values()).items()}
    assert share["validation"] == pytest.approx(0.15, abs=0.05)  # standard error 0.016
    assert share["test"] == pytest.approx(0.3, abs=0.06)  # 0.02
    # It depends on the patient alone: not on order, company or shard.
    some = splits(ingest_records(tmp_path / "b", patients[::-3], **options | {"records_per_shard": 7}))
    assert some == {name: split[name] for name in some}


def test_unknown_patients_are_all_different(ingest_records, patients, tmp_path) -> None:
    unknown = [replace(record, patient=None) for record in patients[:200]]
    out = ingest_records(tmp_path / "a", unknown, validation_fraction=0.5)
    assert len(np.unique(ShardSet.open(out).column("patient"))) == 200
    assert 60 < Counter(splits(out).values())["validation"] < 140


def test_split_by_a_label_or_metadata(ingest_records, patients, tmp_path) -> None:
    fold = {record.name: str(int(record.patient) % 10) for record in patients[:100]}
    by_label = [replace(record, labels={"fold": [fold[record.name]]}) for record in patients[:100]]
    by_metadata = [replace(record, metadata={"fold": fold[record.name]}) for record in patients[:100]]
    options = {"split_by": "fold", "validation_values": ("8", "x"), "test_values": ("9", "0"), "records_per_shard": 30}
    expected = {name: {"8": "validation", "9": "test", "0": "test"}.get(value, "train") for name, value in fold.items()}
    assert splits(ingest_records(tmp_path / "a", by_label, **options)) == expected
    assert splits(ingest_records(tmp_path / "b", by_metadata, **options)) == expected


def test_a_patient_in_two_splits_is_refused(ingest_records, patients, tmp_path) -> None:
    torn = [replace(record, labels={"fold": [f"{i}"]}) for i, record in enumerate(patients[10:16])]
    with pytest.raises(InputError, match=r"patient '6' .*train and validation.* by fold"):
        ingest_records(tmp_path / "out", torn, split_by="fold", validation_values=("3",))
    with pytest.raises(InputError, match="out"):
        ShardSet.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"split_by": "age", "validation_values": ("11",)}, r"age in \['11'\].*validation.*have 61"),
        ({"split_by": "age", "test_values": ("11",)}, r"age in \['11'\].*test.*have 61"),
        ({"split_by": "fold", "test_values": ("11",)}, "split-by fold: no record has that key; they have age, sex"),
        ({"split_by": "fold"}, "split-by"),
        ({"validation_values": ("1",)}, "split-by"),
        ({"rate_hz": 0.0}, "rate-hz 0"),
        ({"rate_hz": float("nan")}, "rate-hz nan"),
        ({"rate_hz": 5.0}, "rate-hz 5 Hz; an ECG has 20 to 100000 Hz"),
        ({"rate_hz": 0.002}, r"a period in seconds\? Then it is 500 Hz"),
        ({"records_per_shard": 0}, "records-per-shard 0"),
        ({"validation_fraction": -0.1}, "-0.1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.51}, "0.5, 0.51.*at most 1"),
        ({"test_fraction": float("nan")}, "nan"),
    ],
)
def test_wrong_options_are_named(ingest_records, patients, tmp_path, fields, named) -> None:
    records = [replace(record, metadata={"age": "61"}, labels={"sex": ["f"]}) for record in patients[:4]]
    with pytest.raises(InputError, match=named):
        ingest_records(tmp_path / "out", records, **fields)


@pytest.mark.parametrize(
    "option", ["--rate-hzz=100", "--rate-hz=fast", "--workers=many", "--records-per-shard=0", "--test-fraction=2"]
)
def test_wrong_options_end_with_exit_code_2(raw, tmp_path, capsys, option) -> None:
    assert run("ingest", raw, tmp_path / "out", option) == 2
    assert option.lstrip("-").split("=")[0].split("-")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_values_that_name_splits_are_taken_as_they_are_written(make_record, ingest_records, tmp_path) -> None:
    folds = ["1", "2", "Test", "09"]
    records = [make_record(f"{i}", 60, ("I",), labels={"fold": [fold]}) for i, fold in enumerate(folds)]
    for given, says in ((("test", "1"), "fold 'Test', the options say 'test'"), (("9", "1"), "fold '09'.* say '9'")):
        with pytest.raises(InputError, match=f"{says}: name both, or write them alike"):
            ingest_records(tmp_path / given[0], records, split_by="fold", test_values=given)
    with pytest.raises(InputError, match="both name '1'; a record has one split"):
        IngestOptions(split_by="fold", validation_values=("1",), test_values=("2", "1"))
    with pytest.raises(InputError, match="test-fraction goes without split-by"):
        IngestOptions(split_by="fold", test_values=("2",), test_fraction=0.5)


def test_a_record_of_two_values_or_of_none_is_told(make_record, ingest_records, tmp_path) -> None:
    out = tmp_path / "out"
    values = ({"fold": ["1"]}, {"fold": ["1", "9"]}, {}, {"fold": ["9"]})
    records = [make_record(f"{i}", 60, ("I",), labels=labels) for i, labels in enumerate(values)]
    ingest_records(out, records, split_by="fold", test_values=("9",))
    (source,) = ShardSet.open(out).sets[0].manifest["sources"]
    assert (source["records"], source["rejected"]) == (3, 1)
    assert "fold has 2 values, 1, 9; a record lies in one split" in (out / "rejected.csv").read_text()
    assert source["notes"]["a record that has no fold, put into training"] == 1


@pytest.mark.parametrize(
    ("options", "split"),
    [
        (["--test-fraction=1"], "test"),
        (["--test-fraction=1.0", "--validation-fraction=0"], "test"),
        (["--validation-fraction=1"], "validation"),
        (["--split-by=sex", "--test-values=Female"], "test"),
    ],
)
def test_a_set_may_have_no_recording_for_training(raw, tmp_path, options, split) -> None:
    out = tmp_path / "out"
    assert run("ingest", raw, out, "--rate-hz=100", "--workers=1", *options) == 0
    assert set(splits(out).values()) == {split}
    assert run("verify", out) == 0
    with pytest.raises(InputError, match=f"out: no training recordings, only 9 for {split}; give a set that has some"):
        Selection(ShardSet.open(out), DataConfig([str(out)]), "train").order(4, 4, 4, 0)


def test_pretraining_without_recordings_for_training_ends_with_one_line(raw, tmp_path, jobs) -> None:
    assert run("ingest", raw, tmp_path / "out", "--rate-hz=100", "--workers=1", "--test-fraction=1") == 0
    command = ["pretrain", f"--data.shards={tmp_path / 'out'}", f"--run.dir={tmp_path / 'run'}"]
    said = jobs.run(1, command, code=2)
    assert said.startswith("ecgscale: out: no training recordings, only 9 for test; give a set that has some, or ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fractions_that_leave_some_for_training_still_do(raw, tmp_path, capsys) -> None:
    assert run("ingest", raw, tmp_path / "out", "--rate-hz=100", "--test-fraction=0.95") == 2
    assert "validation and test fractions (0.1, 0.95)" in capsys.readouterr().err


def test_recordings_that_are_all_too_short_are_named(raw, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("ingest", raw, out, "--rate-hz=100", "--workers=1", "--validation-fraction=0") == 0
    said = "none of the 9 training recordings can be used: 9 are shorter than data.min_record_s 30 s, .* 10 s"
    with pytest.raises(InputError, match=said):
        Selection(ShardSet.open(out), DataConfig([str(out)], min_record_s=30), "train").order(4, 4, 4, 0)


# --- content ---


def test_recordings_are_resampled(raw, tmp_path) -> None:
    out = tmp_path / "out"
    ingest(WfdbFolder(raw / "ward1", "hospital"), out, IngestOptions(rate_hz=100))
    shards = ShardSet.open(out)
    assert shards.rate_hz == 100
    record = shards.record(0)
    assert (record.name, record.rate_hz, record.leads, record.n_samples) == ("rec1", 100, ("I", "II", "V1"), 1000)
    time_T = np.arange(1000) / 100
    expected_mv_LT = 2 * np.sin(2 * np.pi * np.array([[1.0], [5.0], [20.0]]) * time_T)
    middle = slice(50, -50)  # the ends of a resampled wave are a guess
    np.testing.assert_allclose(record.millivolts()[:, middle], expected_mv_LT[:, middle], atol=0.02)


def test_from_wfdb_to_a_picture(raw, tmp_path, capsys) -> None:
    out, picture = tmp_path / "out", tmp_path / "one.png"
    assert run("ingest", raw, out, "--workers=1", "--records-per-shard=5", "--patient-key=patient") == 0
    capsys.readouterr()
    assert run("verify", out) == 0
    assert "9 records in 2 shards, all checksums right" in capsys.readouterr().out
    assert run("inspect", out) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["data"] == "set    hospital"
    assert shown["records"].startswith("9 in 2 shards")
    assert shown["records"].endswith("5 rejected")
    assert shown["patients"] == "4"
    assert shown["hours"] == "0.03; recordings of 10 to 10 s"  # 90 s
    assert shown["rate"] == "500 Hz"
    assert shown["leads"] == "I 9, II 9, V1 9"
    assert "Dx: 426783006 9, " in shown["label"]
    assert sum(int(part.split()[1]) for part in shown["splits"].split(", ")) == 9
    assert run("inspect", out, "--plot", 8, picture) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000
    for number in ("9", "-1", "x"):
        assert run("inspect", out, "--plot", number, picture) == 2
    assert run("inspect", out, "--plot", 0, tmp_path / "one.txt") == 2
    assert run("inspect", raw) == run("verify", raw) == 2


def test_metadata_of_headers_and_labels_of_a_table(raw, tmp_path) -> None:
    table = tmp_path / "labels.csv"
    rows = [f"ward{i % 3}/rec{i},{'a|b' if i == 4 else 'a'},f{i % 4},P{i % 4}" for i in range(9)]
    table.write_text("\n".join(["record,kind,fold,patient_id", *rows]))
    out = tmp_path / "out"
    split = ("--split-by=fold", "--validation-values=f1", "--test-values=f2,f3")
    assert run("ingest", raw, out, "--labels", table, *split, "--rate-hz=100", "--workers=1", "--dataset=mine") == 0
    shards = ShardSet.open(out)
    described = {m["name"]: m for m in map(shards.metadata, range(len(shards)))}
    one = described["ward1/rec4"]
    assert one["labels"]["kind"] == ["a", "b"]
    assert one["labels"]["Dx"] == ["426783006", "4"]
    assert (one["metadata"]["age"], one["metadata"]["sex"], one["dataset"]) == ("54", "Female", "mine")
    assert {name: m["patient"] for name, m in described.items()} == {
        f"ward{i % 3}/rec{i}": f"P{i % 4}" for i in range(9)
    }
    where = ("train", "validation", "test", "test")
    assert splits(out) == {f"ward{i % 3}/rec{i}": where[i % 4] for i in range(9)}


def test_a_table_that_fits_no_record_is_refused(raw, tmp_path, capsys) -> None:
    (tmp_path / "labels.csv").write_text("record,kind\nsomebody,a\n")
    for table in ("labels.csv", "absent.csv"):
        assert run("ingest", raw, tmp_path / "out", "--labels", tmp_path / table) == 2
        assert table in capsys.readouterr().err


def test_real_recordings(shared_data, tmp_path, capsys) -> None:
    source, out = shared_data / "cinc2021", tmp_path / "out"
    assert run("ingest", source, out, "--workers=1", "--records-per-shard=20") == 0
    assert run("verify", out) == 0
    said = capsys.readouterr().out
    assert "50 records in 3 shards" in said
    assert f"{out}: 2 records: leads without a signal are left out as absent; JS20004, JS20008 (see" in said
    assert said.count(" records: ") == 1, "nothing else is odd about them"
    shards = ShardSet.open(out)
    assert len(np.unique(shards.column("patient"))) == 50  # no patient is known, so no two are the same
    assert [bin(leads).count("1") for leads in shards.column("leads").tolist() if leads != 2**12 - 1] == [9, 9]
    for i in range(0, 50, 7):
        record = shards.record(i)
        header = (source / f"{record.name}.hea").read_text()
        (codes,) = [line.split(":")[1] for line in header.splitlines() if line.startswith("# Dx")]
        assert record.labels["Dx"] == codes.strip().split(",")
        expected = wfdb.rdrecord(str(source / record.name))
        assert [lead.casefold() for lead in expected.sig_name] == [lead.casefold() for lead in LEADS]
        if expected.fs == 500:
            np.testing.assert_allclose(record.millivolts().T, expected.p_signal, atol=1e-5)
