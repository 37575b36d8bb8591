"""Labels and classes that may be one but for how they are written are told, wherever they come from."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale import cli
from ecgscale.data.ingest import Ingested, IngestOptions, ingest
from ecgscale.data.persons import apart, odd_names
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import write_manifest
from ecgscale.data.spellings import Spellings, alike
from ecgscale.errors import InputError
from ecgscale.inspection import summarise, verify_dataset
from ecgscale.lead_names import LEADS
from in_memory import Records

OPTIONS = IngestOptions(rate_hz=100.0, records_per_shard=2, validation_fraction=0)
ONE_CLASS = "1 classes of rhythm may be another that is written otherwise, such as 'AF' and 'af'; they count as"


@pytest.mark.parametrize(
    "names",
    [
        ("Sinus rhythm", "sinus  rhythm", "SINUS_RHYTHM", "sinus-rhythm", "Sinus rhythm.", "Sinus\u00a0rhythm"),
        ("1", "yes", "True", "\uff11"),
        ("0", "no", "FALSE"),
    ],
)
def test_names_that_are_alike(names: Sequence[str]) -> None:
    assert len({alike(name) for name in names}) == 1


@pytest.mark.parametrize("names", [("1", "-1"), ("AF", "AFL"), ("1", "01"), ("ST", "S T"), ("B+", "B"), ("12", "1.2")])
def test_names_that_are_not(names: Sequence[str]) -> None:
    assert len({alike(name) for name in names}) == len(names)


@given(st.text())
def test_what_is_alike_is_alike_to_itself(name: str) -> None:
    assert alike(alike(name)) == alike(name)


def test_what_is_kept_is_bounded_and_in_order() -> None:
    spellings = Spellings()
    spellings.add({"report": [f"{i:04d}" for i in range(3000)], "long": ["x" * 101], "rhythm": ["b", "a"], "none": []})
    kept = spellings.kept()
    assert {label: len(classes) for label, classes in kept.items()} == {
        "long": 0,
        "none": 0,
        "report": 1000,
        "rhythm": 2,
    }
    assert kept["rhythm"] == ["a", "b"]


def write(make_record, out: Path, prefix: str, labels: Sequence[dict[str, list[str]]], **options: bool) -> Ingested:
    records = [make_record(f"{prefix}{i}", 1000, ("I",), labels=each) for i, each in enumerate(labels)]
    return ingest(Records(records), out, OPTIONS, **options)


def test_classes_of_two_shards_are_told(make_record, tmp_path) -> None:
    labels = [{"rhythm": ["SR", "AF"], "dx": ["AF"]}, {}, {"rhythm": ["af"], "dx": ["AFL"]}]
    (line,) = write(make_record, tmp_path / "out", "r", labels).odd_names
    assert line.startswith(ONE_CLASS)
    assert line in verify_dataset(str(tmp_path / "out"))
    assert line in summarise(str(tmp_path / "out"))


def test_classes_and_labels_of_two_batches_are_told(make_record, tmp_path) -> None:
    out = tmp_path / "out"
    assert write(make_record, out, "a", [{"rhythm": ["AF"]}, {"rhythm": ["SR"]}]).odd_names == []
    (line,) = write(make_record, out, "b", [{"rhythm": ["af"]}], append=True).odd_names
    assert line.startswith(ONE_CLASS)
    first, second = write(make_record, out, "c", [{"Rhythm": ["AF"]}], append=True).odd_names
    assert first.startswith("1 labels may be another that is written otherwise, such as 'Rhythm' and 'rhythm'")
    assert second == line


def test_classes_of_two_folders_are_told_where_they_are_read_together(make_record, tmp_path) -> None:
    for name, rhythm in (("a", "AF"), ("b", "af")):
        assert write(make_record, tmp_path / name, name, [{"rhythm": [rhythm]}]).odd_names == []
    (line,) = apart(ShardSet.open([tmp_path / "a", tmp_path / "b"]))
    assert line.startswith(ONE_CLASS)
    assert apart(ShardSet.open(tmp_path / "a")) == []


LATER = ("classes", "patient_keys")  # of the manifest's ``sources``; earlier versions lack them


def write_source(out: Path, **changed: object) -> None:
    """As another version, or somebody else, has written it."""
    fields = json.loads((out / "manifest.json").read_text())
    source = {name: value for name, value in fields["sources"][0].items() if name not in LATER} | changed
    index = {name: fields["index"][name] for name in ("file", "bytes", "sha256")}
    write_manifest(out, fields["rate_hz"], index, fields["shards"], [source])


def test_sets_of_earlier_versions_say_nothing_of_classes(make_record, tmp_path) -> None:
    out = tmp_path / "out"
    write(make_record, out, "a", [{"rhythm": ["AF"]}])
    write_source(out)
    assert odd_names(ShardSet.open(out)) == []


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        *(("classes", value) for value in (["AF"], {"rhythm": "AF"}, {"rhythm": [1]})),
        *(("patient_keys", value) for value in (["a"], {"a": "1"}, {"a": 0})),
    ],
)
def test_manifests_that_say_it_wrong_are_refused(make_record, tmp_path, name: str, broken: object) -> None:
    out = tmp_path / "out"
    write(make_record, out, "a", [{"rhythm": ["AF"]}])
    write_source(out, **{name: broken})
    with pytest.raises(InputError, match="ingest the data again"):
        ShardSet.open(out)


def test_classes_of_headers_are_told(make_record, write_record, tmp_path, capsys) -> None:
    for name, diagnoses in (("a", "Sinus rhythm"), ("b", "AF, sinus  rhythm"), ("c", "AF")):
        write_record(tmp_path / "in", name, make_record(name), [f"Dx: {diagnoses}", f"PatientID: {name}"])
    assert cli.main(["ingest", "--rate-hz=100", "--workers=2", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "1 classes of Dx may be another that is written otherwise, such as 'Sinus" in capsys.readouterr().out


def test_classes_of_tables_are_told(make_record, write_record, tmp_path, capsys) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("record,dx,note\na,Sinus|AF,u\nb,sinus,v\nc,SINUS,v\n")
    for name in "abc":
        write_record(tmp_path / "in", name, make_record(name))
    command = ["ingest", "--rate-hz=100", "--workers=1", "--labels", str(table)]
    assert cli.main([*command, str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "written otherwise" in line)
    assert "2 classes of dx may be another that is written otherwise, such as 'SINUS' and 'Sinus'" in line


def test_classes_of_json_are_told(tmp_path, capsys) -> None:
    for number, rhythm in enumerate(("AF", "af")):
        about = {"rate_hz": 100, "mv_per_count": 0.001, "patient": f"p{number}", "labels": {"rhythm": rhythm}}
        array = io.BytesIO()
        np.save(array, np.random.default_rng(number).integers(-900, 900, (len(LEADS), 700), np.int16))
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for ending, content in (("npy", array.getvalue()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"s.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert cli.main(["index", str(tmp_path), "--workers=1"]) == 0
    assert ONE_CLASS in capsys.readouterr().out


def test_columns_of_two_tables_are_refused(make_record, write_record, tmp_path, capsys) -> None:
    write_record(tmp_path / "in", "a", make_record("a"))
    tables = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for table, column in zip(tables, ("sinus rhythm", "Sinus_Rhythm"), strict=True):
        table.write_text(f"record,{column}\na,1\n")
    given_twice = [argument for table in tables for argument in ("--labels", str(table))]
    assert cli.main(["ingest", "--rate-hz=100", *given_twice, str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "column 'Sinus_Rhythm' is 'sinus rhythm' in" in capsys.readouterr().err
