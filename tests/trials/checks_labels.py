"""Cases of labels and patients: whose they are, and what cells mean."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from case_check import case, ecgscale

from ecgscale.data.cells import is_known
from ecgscale.data.shard_set import ShardSet

ARRAY = ("--source-rate-hz", 500, "--source-leads", "I,II")


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.read_text())))


def records_of(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> JSON."""
    shards = ShardSet.open(out)
    return {(one := shards.metadata(number))["name"]: one for number in range(len(shards))}


def patients_of(out: Path) -> int:
    return len(set(ShardSet.open(out).column("patient").tolist()))


def ingested(source: Path, out: Path, *options: object) -> str:
    """What the command prints; it must succeed."""
    done = ecgscale("ingest", source, out, *options)
    assert done.code == 0, done.text
    return done.out


@case("stacked-row-column")
def stacked_row_column(folder: Path, scratch: Path) -> str:
    rows = rows_of(folder / "labels.csv")
    ingested(folder / "x.npy", scratch / "out", *ARRAY, "--labels", folder / "labels.csv")
    records = records_of(scratch / "out")
    for row in rows:
        record = records[f"{int(row['row']):0{len(next(iter(records)))}d}"]
        assert record["patient"] == row["patient_id"], (row, record)
        assert record["labels"] == {"rhythm": [row["rhythm"]]}, (row, record)
    (scratch / "labels.csv").write_text(
        "".join(f"{row['patient_id']}\n" for row in [{"patient_id": "patient_id"}, *rows])
    )
    by_order = ecgscale("ingest", folder / "x.npy", scratch / "out2", *ARRAY, "--labels", scratch / "labels.csv")
    assert by_order.code == 2, by_order.text
    return f"{len(rows)} rows by number; without numbers refused: {by_order.err.strip()[-60:]}"


@case("list-strings")
def list_strings(folder: Path, scratch: Path) -> str:
    ingested(folder, scratch / "out", "--labels", folder / "labels.csv")
    records = records_of(scratch / "out")
    names = {
        name for record in records.values() for label in record["labels"].items() for name in (label[0], *label[1])
    }
    assert not [name for name in names if not name.strip() or set(name) & set("[]{}'\"\n")], names
    flags = {row["record"]: row["AF"] for row in rows_of(folder / "labels.csv")}
    set_ones = {tuple(records[name]["labels"]["AF"]) for name, flag in flags.items() if flag in ("1", "1.0", "True")}
    assert len(set_ones) == 1, set_ones
    by_text: dict[tuple[str, str], list[str]] = {}
    for row in rows_of(folder / "labels.csv"):
        for column in ("super", "scp_codes", "lines"):
            letters = "".join(sorted(row[column].replace("\r", "").replace("\n", ",").replace(",", "")))
            classes = sorted(records[row["record"]]["labels"][column])
            assert by_text.setdefault((column, letters), classes) == classes, row
    return f"classes {sorted(names)}"


@case("na-words")
def na_words(folder: Path, scratch: Path) -> str:
    rows = rows_of(folder / "labels.csv")
    said = ingested(folder, scratch / "out", "--labels", folder / "labels.csv")
    known = {row["patient_id"] for row in rows if is_known(row["patient_id"])}
    unknown = sum(not is_known(row["patient_id"]) for row in rows)
    assert patients_of(scratch / "out") == len(known) + unknown
    for record in records_of(scratch / "out").values():
        for values in (*record["labels"].values(), record["metadata"].values()):
            assert all(map(is_known, values)), record
    counted = [line for line in said.splitlines() if "taken as unknown" in line]
    assert counted, said
    return f"{patients_of(scratch / 'out')} persons, {len(counted)} lines count the words"


@case("one-bad-cell")
def one_bad_cell(folder: Path, scratch: Path) -> str:
    rows = rows_of(folder / "exams.csv")
    ingested(folder, scratch / "out")
    records = records_of(scratch / "out")
    rejected = rows_of(scratch / "out" / "rejected.csv")
    assert len(records) + len(rejected) == len(rows)
    without_patient = [row for row in rows if not is_known(row["patient_id"])]
    assert len(rejected) == len(without_patient), rejected
    assert all("patient_id" in row["reason"] for row in rejected), rejected
    for name, record in records.items():
        row = next(row for row in rows if row["exam_id"] == name.rpartition("_")[2])
        assert ("sex" in record["metadata"]) == is_known(row["is_male"]), record
    return f"{len(records)} exams read, {len(rejected)} rejected"


@case("csv-names-npy")
def csv_names_npy(folder: Path, scratch: Path) -> str:
    ingested(folder, scratch / "out", *ARRAY, "--labels", folder / "labels.csv")
    records = records_of(scratch / "out")
    for row in rows_of(folder / "labels.csv"):
        record = records[row["filename"].removesuffix(".npy")]
        assert (record["patient"], record["labels"]) == (row["patient_id"], {"rhythm": [row["rhythm"]]}), record
    return f"{len(records)} records by the names of their files"


@case("patient-17.0")
def patient_17_0(folder: Path, scratch: Path) -> str:
    out = scratch / "out"
    for batch in ("a", "b"):
        more = ["--append"] if batch == "b" else []
        ingested(folder / batch, out, *more, "--dataset", "hosp", "--labels", folder / batch / "labels.csv")
    ids = [row["patient_id"] for batch in ("a", "b") for row in rows_of(folder / batch / "labels.csv")]
    known = {float(one) for one in ids if is_known(one)}
    unknown = sum(not is_known(one) for one in ids)
    assert patients_of(out) == len(known) + unknown, (patients_of(out), len(known), unknown)
    shards = ShardSet.open(out)
    splits: dict[int, set[int]] = {}
    for patient, split in zip(shards.column("patient").tolist(), shards.column("split").tolist(), strict=True):
        splits.setdefault(patient, set()).add(split)
    assert all(len(one) == 1 for one in splits.values())
    return f"{len(known)} patients and {unknown} unknown, none in two splits"
