"""Cases of what a path is recognised as, and of the same person or recording twice."""

from __future__ import annotations

import csv
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from case_check import case, ecgscale

from ecgscale.data.shard_set import ShardSet


def splits(out: Path) -> dict[str, int]:
    """Record name -> number of its split."""
    shards = ShardSet.open(str(out))
    return {shards.metadata(i)["name"]: int(split) for i, split in enumerate(shards.column("split"))}


def equal_data(folder: Path) -> list[list[str]]:
    """Names of the records of a folder, those with equal data files together."""
    groups = defaultdict(list)
    for path in sorted(folder.glob("*.dat")):
        groups[path.read_bytes()].append(path.stem)
    return [*groups.values()]


def copy_plain(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("README.md"))


@case("same-signal-twice")
def same_signal_twice(folder: Path, scratch: Path) -> str:
    groups = equal_data(folder)
    spare = sum(len(group) - 1 for group in groups)
    fractions = ("--validation-fraction=0.3", "--test-fraction=0.3")
    for i, chosen in enumerate(((), fractions)):
        out = scratch / f"out{i}"
        said = ecgscale("ingest", folder, out, *chosen)
        assert said.code == 0, said.text
        for text in (said.out, ecgscale("inspect", out).out, ecgscale("verify", out).out):
            assert f"{spare} recordings are exact copies of others" in text, text
        split = splits(out)
        assert all(len({split[name] for name in group}) == 1 for group in groups)
    assert len(set(split.values())) == 3
    grown, out = copy_plain(folder, scratch / "grown"), scratch / "twice"
    assert ecgscale("ingest", grown, out, "--dataset=X", *fractions).code == 0
    before, first = splits(out), groups[0][0]
    (grown / "added.dat").write_bytes((grown / f"{first}.dat").read_bytes())
    (grown / "added.hea").write_text((grown / f"{first}.hea").read_text().replace(first, "added"))
    said = ecgscale("ingest", grown, out, "--dataset=X", "--append", *fractions)
    assert said.code == 0, said.text
    assert f"{len(before)} records left out" in said.out, said.out
    assert splits(out) == before | {"added": before[first]}
    return f"{spare} copies named and in the splits of their originals; {len(before)} old names left out of an --append"


@case("batches-two-names")
def batches_two_names(folder: Path, scratch: Path) -> str:
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())
    ids = [
        {re.search(r"PatientID: *(\S+)", path.read_text())[1] for path in batch.glob("*.hea")}
        for batch in (first, second)
    ]
    assert ecgscale("ingest", first, scratch / "out").code == 0
    said = ecgscale("ingest", second, scratch / "out", "--append")
    assert said.code == 0, said.text
    (line,) = [line for line in said.out.splitlines() if f"--dataset {first.name}" in line]
    assert f"{len(ids[0] & ids[1])} patient ids occur in {first.name} too" in line
    assert ecgscale("ingest", first, scratch / "one").code == 0
    assert ecgscale("ingest", second, scratch / "one", "--append", f"--dataset={first.name}").code == 0
    shards = ShardSet.open(str(scratch / "one"))
    assert len(np.unique(shards.column("patient"))) == len(ids[0] | ids[1])
    return line.partition(": ")[2]


def table_of(root: Path) -> dict[str, str]:
    """ecg_id -> patient of a PTB-XL folder's table."""
    with (root / "ptbxl_database.csv").open(newline="") as file:
        return {row["ecg_id"]: str(int(float(row["patient_id"]))) for row in csv.DictReader(file)}


@case("one-level-off")
def one_level_off(folder: Path, scratch: Path) -> str:
    (root,) = [path.parent for path in (folder / "above").rglob("ptbxl_database.csv")]
    patients = table_of(root)
    sources = {"zip": next(folder.glob("*.zip")), "above": folder / "above", "records500": root / "records500"}
    for kind, source in sources.items():
        out = scratch / kind
        said = ecgscale("ingest", source, out)
        assert said.code == 0, said.text
        assert said.out.startswith(f"PTB-XL: {len(patients)} records"), said.out
        shards = ShardSet.open(str(out))
        seen = {}
        for i in range(len(shards)):
            about = shards.metadata(i)
            seen[str(int(about["name"].rpartition("/")[2].split("_")[0]))] = about["patient"]
            assert about["labels"]["scp"], about
        assert len(shards) == len(patients)
        assert seen == patients
    both = shutil.copytree(root, scratch / "lost")
    (both / "ptbxl_database.csv").unlink()
    said = ecgscale("ingest", both, scratch / "refused")
    assert said.code == 2, said.text
    assert "looks like PTB-XL at both rates" in said.err
    return f"{len(patients)} records of {len(set(patients.values()))} patients each way: {', '.join(sources)}"


@case("own-record-list")
def own_record_list(folder: Path, scratch: Path) -> str:
    names = sorted(path.stem for path in folder.glob("*.hea"))
    said = ecgscale("ingest", folder, scratch / "out")
    assert said.code == 0, said.text
    assert sorted(splits(scratch / "out")) == names
    (line,) = [line for line in said.out.splitlines() if "not the list of MIMIC-IV-ECG" in line]
    return line.partition(f"{folder}: ")[2]
