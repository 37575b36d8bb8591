"""Patient ids that may be one person's: equal ones in sets of two names, and near ones in one set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.persons import ids_apart, near_ids, odd_names
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import map_index, read_manifest, write_index_in_parts, write_manifest
from ecgscale.inspection import summarise, verify_dataset
from in_memory import Records
from small_jobs import SMALL

RATE_HZ = 100.0


@pytest.fixture
def write_set(make_record, tmp_path):
    """(name, ids) -> a data set of that name with a recording of each."""

    def write(name: str, ids: Iterable[str | None], folder: str = "", **options: object) -> Path:
        out = tmp_path / (folder or name)
        records = [make_record(f"{name}-{i:03d}", 1000, ("I", "V1"), patient=patient) for i, patient in enumerate(ids)]
        ingest(Records(records, name), out, IngestOptions(**{"rate_hz": RATE_HZ, "records_per_shard": 7} | options))
        return out

    return write


def without_ids(folder: Path) -> Path:
    """As an earlier version wrote it."""
    manifest = read_manifest((folder / "manifest.json").read_bytes(), "manifest")
    index = folder / manifest["index"]["file"]
    columns = {name: np.array(column) for name, column in map_index(index, manifest["records"]).items()}
    del columns["id_hash"]
    index.unlink()
    entry = write_index_in_parts(folder, manifest["records"], [columns])
    write_manifest(folder, manifest["rate_hz"], entry, manifest["shards"], manifest["sources"])
    return folder


TRAIN, VALIDATION = {"validation_fraction": 0.0}, {"validation_fraction": 1.0}


def test_people_who_return_are_told_where_they_stand_in_two_splits(write_set) -> None:
    first = write_set("2019", [f"H{i}" for i in range(20)], **TRAIN)
    second = write_set("2020", [f"h0{i}" for i in range(15, 35)] + [None] * 3, **VALIDATION)
    line = ids_apart(ShardSet.open([first, second]))
    assert line == (
        "5 patient ids stand in different splits of 2019, 2020, where they count as other people; 5 of the 20 ids of "
        "2019 occur in another, as where people return; if they are the same people, ingest these with one --dataset"
    )
    assert ids_apart(ShardSet.open(first)) is None


def test_sets_that_both_count_from_one_are_told_apart_from_that(write_set) -> None:
    first = write_set("Rome", [str(i) for i in range(1, 31)], **TRAIN)
    second = write_set("Oslo", [str(i) for i in range(1, 20)], **VALIDATION)
    line = ids_apart(ShardSet.open([first, second]))
    assert line is not None
    assert "19 of the 19 ids of Oslo occur in another, as where each counts 1, 2, 3, which is no fault" in line


def test_nothing_is_said_where_equal_ids_share_a_split_or_a_name(write_set) -> None:
    ids = [str(i) for i in range(12)]
    both = [write_set("a", ids, **TRAIN), write_set("b", ids, **TRAIN)]
    assert ids_apart(ShardSet.open(both)) is None
    nobody = [write_set("c", [None] * 5, **TRAIN), write_set("d", [None] * 5, **VALIDATION)]
    assert ids_apart(ShardSet.open(nobody)) is None


def test_pretraining_tells_it(write_set, jobs, tmp_path) -> None:
    ids = [str(i) for i in range(16)]
    sets = [write_set("a", ids, **TRAIN), write_set("b", ids, **VALIDATION)]
    shards = ",".join(map(str, sets))
    said = jobs.run(
        1, ["pretrain", *SMALL, f"--data.shards={shards}", f"--run.dir={tmp_path / 'run'}", "--train.steps=1"]
    )
    assert "16 patient ids stand in different splits of a, b" in said


def test_sets_of_earlier_versions_are_read_and_the_gap_is_told(write_set) -> None:
    ids = [str(i) for i in range(12)]
    older = without_ids(write_set("a", ids, **TRAIN))
    newer = write_set("b", ids, **VALIDATION)
    assert f"patient ids of a, b are not compared: {older} comes from an older version" in str(
        ids_apart(ShardSet.open([older, newer]))
    )
    assert "all checksums right" in verify_dataset(str(older))


def test_what_is_added_to_a_set_of_an_earlier_version_keeps_its_columns(write_set, make_record) -> None:
    older = without_ids(write_set("a", [str(i) for i in range(12)]))
    more = Records([make_record("new", 1000, ("I",), patient="0007")], "b")
    done = ingest(more, older, IngestOptions(rate_hz=RATE_HZ, records_per_shard=7), append=True)
    assert any("whose patient's id is not compared with others" in note for note in done.notes)
    assert done.shared_ids == {}
    assert "13 records in 3 shards, all checksums right" in verify_dataset(str(older))


def test_near_ids_of_one_set_are_counted(write_set) -> None:
    out = write_set("a", ["00007", "7", "P-8", "p-8", "9", "9", None, "10"], **TRAIN)
    line = near_ids(ShardSet.open(out))
    assert line is not None
    assert line.startswith(
        "2 patient ids are written in two ways that differ in case, leading zeros or the like alone, such as '"
    )
    assert line.endswith("they count as other people: if they are the same, write them alike")
    assert line in verify_dataset(str(out))
    assert line in summarise(str(out))
    clean = write_set("b", ["7", "8", "80"])
    assert near_ids(ShardSet.open(clean)) is None
    assert near_ids(ShardSet.open([out, clean])) == line  # of two data sets they are no matter here


@pytest.mark.parametrize("other", ["+1000", "1e3", "1.0E3", "1E+03", "0x3E8", "0X03e8", "1_000", "01000"])
def test_one_number_in_two_forms_is_near(write_set, other: str) -> None:
    line = near_ids(ShardSet.open(write_set("a", ["1000", other])))
    assert line is not None
    assert f"{other!r}" in line


@pytest.mark.parametrize("ids", [("1-000", "1000"), ("P1e3", "P1000"), ("1.5e0", "1"), ("-1", "1"), ("3E8", "0x3E8")])
def test_other_ids_are_not_near(write_set, ids: tuple[str, str]) -> None:
    assert near_ids(ShardSet.open(write_set("a", ids))) is None


def test_ids_that_may_be_codes_of_nobody_are_told(write_set) -> None:
    out = write_set("a", ["-9"] * 25 + ["5", "6", "6", "7", "9999", None], **TRAIN)
    line = "25 records are of a patient '-9', far more than of others; if that is a code for unknown, leave these"
    assert any(line in one for one in odd_names(ShardSet.open(out)))
    assert line in verify_dataset(str(out))
    assert line in summarise(str(out))
    assert odd_names(ShardSet.open(write_set("b", ["0"] * 10 + ["5"]))) == []


def test_near_ids_in_two_splits_are_shown_first(write_set) -> None:
    ids = [one for i in range(40) for one in (f"{i + 100}", f"0{i + 100}")]
    shards = ShardSet.open(write_set("a", ids, validation_fraction=0.5))
    split_of = {shards.metadata(i)["patient"]: int(split) for i, split in enumerate(shards.column("split"))}
    torn = {one for one in ids if not one.startswith("0") and split_of[one] != split_of[f"0{one}"]}
    line = str(near_ids(shards))
    alone = "40 patient ids are written in two ways that differ in case, leading zeros or the like alone"
    assert f"{alone}, {len(torn)} of which" in line
    assert any(f"'{one}'" in line and f"'0{one}'" in line for one in torn)


def test_ingest_says_it_of_a_folder(tmp_path, write_record, make_record, capsys) -> None:
    for name, patient in (("a", "0031"), ("b", "31")):
        write_record(tmp_path / "in", name, make_record(name), [f"PatientID: {patient}"])
    assert cli.main(["ingest", "--rate-hz=100", "--workers=1", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "1 patient ids are written in two ways" in capsys.readouterr().out


def test_tars_of_others_tell_it_too(write_set, capsys) -> None:
    made = write_set("a", ["007", "7"], payload="npy")
    for path in [*made.glob("index-*"), made / "manifest.json"]:
        path.unlink()
    assert cli.main(["index", str(made), "--workers=1"]) == 0
    assert "such as '007' and '7'" in capsys.readouterr().out.replace("'7' and '007'", "'007' and '7'")
    assert json.loads((made / "manifest.json").read_text())["records"] == 2


# --- keys that name patients ---


def write_headers(folder: Path, write_record, make_record, comments: Iterable[str]) -> Path:
    for i, comment in enumerate(comments):
        name = f"{folder.name}{i}"
        write_record(folder, name, make_record(name), [comment])
    return folder


def ingest_headers(folder: Path, out: Path, *options: str) -> int:
    how = ["--rate-hz=100", "--workers=2", "--records-per-shard=1", "--dataset=hospital"]
    return cli.main(["ingest", *how, *options, str(folder), str(out)])


def test_headers_that_name_patients_by_keys_of_two_kinds_are_told(tmp_path, write_record, make_record, capsys) -> None:
    comments = ["PatientID: 7", "Patient: 8", "patient_id: 9", "subject_id: 7"]
    folder = write_headers(tmp_path / "in", write_record, make_record, comments)
    assert ingest_headers(folder, tmp_path / "out") == 0
    line = (
        "patients of hospital are named by patient (1 records) and patient_id (1 records) and patientid (1 records) "
        "and subject_id (1 records), and equal ids of these count as one person; if"
    )
    assert line in capsys.readouterr().out
    assert line in verify_dataset(str(tmp_path / "out"))
    assert ingest_headers(folder, tmp_path / "one", "--patient-key=PatientID") == 0
    assert "are named by" not in capsys.readouterr().out


def test_keys_of_one_kind_are_no_matter(tmp_path, write_record, make_record, capsys) -> None:
    comments = ["PatientID: 7", "Patient: 8", "patient_id: 9", "Age: 7"]
    assert ingest_headers(write_headers(tmp_path / "in", write_record, make_record, comments), tmp_path / "out") == 0
    assert "are named by" not in capsys.readouterr().out


def test_batches_that_name_patients_by_other_keys_are_told(tmp_path, write_record, make_record, capsys) -> None:
    out = tmp_path / "out"
    one, two, three = (
        write_headers(tmp_path / name, write_record, make_record, [comment])
        for name, comment in (("one", "PatientID: 7"), ("two", "Age: 50"), ("three", "subject_id: 7"))
    )
    table = tmp_path / "labels.csv"
    table.write_text("record,mrn\ntwo0,7\n")
    assert ingest_headers(one, out) == 0
    assert ingest_headers(two, out, "--append", "--labels", str(table), "--patient-key=mrn") == 0
    assert "named by mrn (1 records) and patientid (1 records), and equal ids" in capsys.readouterr().out
    assert ingest_headers(three, out, "--append", "--dataset=other") == 0
    assert "hospital are named by mrn (1 records) and patientid (1 records), and" in capsys.readouterr().out
