"""Exact copies of recordings: found, named, and kept out of different splits, whatever is done in which order."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale import cli
from ecgscale.data.copies import Copies, about_copies, content_keys, copies_apart, copies_in
from ecgscale.data.ingest import Ingested, IngestOptions, ingest, ingest_part, merge_parts
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS, map_index, read_manifest, write_index_in_parts, write_manifest
from ecgscale.data.sources import SourceOptions, open_source
from ecgscale.errors import InputError
from ecgscale.inspection import summarise, verify_dataset
from ecgscale.lead_names import LEADS
from ecgscale.record import Record, quantise
from ecgscale.simulate import Simulation
from in_memory import Records
from small_jobs import SMALL

RATE_HZ = 100.0
HALVES = IngestOptions(rate_hz=RATE_HZ, records_per_shard=7, validation_fraction=0.3, test_fraction=0.3)


@pytest.fixture
def originals(make_record) -> list[Record]:
    return [make_record(f"a{i:02d}", 60, ("I", "V1"), patient=None) for i in range(24)]


def copied(records: list[Record], **fields: object) -> list[Record]:
    """As a file manager copies them."""
    return [replace(record, name=f"{record.name}_copy", **fields) for record in records]


def by_name(*records: Record) -> list[Record]:
    return sorted(records, key=lambda record: record.name)


def splits(out: Path) -> dict[str, str]:
    shards = ShardSet.open(out)
    split = shards.column("split")
    return {shards.metadata(i)["name"]: SPLITS[split[i]] for i in range(len(shards))}


def add(out: Path, records: list[Record], dataset: str = "made", **options: object) -> Ingested:
    return ingest(Records(records, dataset), out, IngestOptions(**vars(HALVES) | options), append=True)


# -- finding them ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 12), max_size=40))
def test_all_equal_keys_are_grouped(values: list[int]) -> None:
    copies = Copies.find(np.array(values, np.uint64))
    groups = [group.tolist() for group in np.split(copies.number_R, copies.first_G[1:-1])] if len(copies) else []
    expected = [[i for i, one in enumerate(values) if one == value] for value in sorted(set(values))]
    assert groups == [group for group in expected if len(group) > 1]


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=4), max_size=8))
def test_linked_persons_are_those_that_a_chain_of_copies_joins(groups: list[list[int]]) -> None:
    numbers = np.arange(sum(map(len, groups)))
    first_G = np.cumsum([0, *map(len, groups)])
    patient_R = np.array([code for group in groups for code in group], np.int64)
    code_P, least_P = Copies(numbers, first_G).linked_persons(patient_R)
    joined = {code: {code} for group in groups for code in group}
    for group in groups:
        union = set().union(*(joined[code] for code in group))
        for code in union:
            joined[code] = union
    expected = {code: min(union) for code, union in joined.items() if len(union) > 1}
    assert dict(zip(code_P.tolist(), least_P.tolist(), strict=True)) == expected


@pytest.mark.parametrize("payload", ["pco", "npy"])
def test_only_equal_samples_in_millivolts_are_copies(make_record, ingest_records, tmp_path, payload) -> None:
    one = make_record("a", 200, ("I", "II"))
    signal_LT = one.signal_LT.copy()
    signal_LT[:, -1] ^= 1
    records = [
        one,
        replace(one, name="b", patient="other", labels={"x": ["y"]}),
        replace(one, name="c", signal_LT=signal_LT),
        replace(one, name="d", scale_L=one.scale_L * 2),
        replace(one, name="e", leads=("aVR", "V1")),
        replace(one, name="f", signal_LT=one.signal_LT[:, :-1]),
    ]
    out = ingest_records(tmp_path / "out", records, payload=payload)
    assert copies_in(ShardSet.open(out)).number_R.tolist() == [0, 1]


def rows_of(record: Record, *leads: str) -> Record:
    """With some leads alone."""
    rows = [record.leads.index(lead) for lead in leads]
    return replace(record, signal_LT=record.signal_LT[rows], scale_L=record.scale_L[rows], leads=leads)


def between(record: Record, before: int, behind: int) -> Record:
    """With samples of zero around it."""
    return replace(record, signal_LT=np.pad(record.signal_LT, ((0, 0), (before, behind))))


def as_floats(record: Record) -> Record:
    """As a table of millivolts is ingested."""
    fitted = quantise(record.millivolts().astype(np.float64))
    return replace(record, signal_LT=fitted.signal_LT, scale_L=fitted.scale_L)


STORED_ANEW: dict[str, Callable[[Record], Record]] = {
    "lead I": lambda one: rows_of(one, "I"),
    "lead II": lambda one: rows_of(one, "II"),
    "without the limb leads that follow": lambda one: rows_of(one, "I", "II", *LEADS[6:]),
    "without II": lambda one: rows_of(one, "I", "V1", "V5"),
    "other counts of the same microvolts": lambda one: replace(
        one, signal_LT=5 * one.signal_LT, scale_L=one.scale_L / np.float32(5)
    ),
    "floats in mV": as_floats,
    "zeros behind it": lambda one: between(one, 0, 300),
    "zeros around it": lambda one: between(one, 40, 300),
    "its beginning": lambda one: replace(one, signal_LT=one.signal_LT[:, :700]),
}


@pytest.mark.parametrize("payload", ["pco", "npy"])
@pytest.mark.parametrize("scale_mv", [1 / 200, 1 / 400, 1 / 204.8, 1e-3])
def test_copies_are_known_however_they_are_stored(make_record, ingest_records, tmp_path, payload, scale_mv) -> None:
    first, second = (
        replace(one, signal_LT=one.signal_LT // 64, scale_L=np.full(12, scale_mv, np.float32), patient=None)
        for one in (make_record(name, 1000) for name in ("one", "two"))
    )
    stored = [change(one) for one in (first, second) for change in STORED_ANEW.values()]
    stored = [replace(record, name=f"{i:03}") for i, record in enumerate(stored)]
    out = ingest_records(tmp_path / "out", [first, second], **vars(HALVES) | {"payload": "npy"})
    add(out, stored, "elsewhere", payload=payload)
    copies = copies_in(ShardSet.open(out))
    half = len(STORED_ANEW)
    assert copies.number_R.tolist() == [0, *range(2, 2 + half), 1, *range(2 + half, 2 + 2 * half)]
    assert copies.first_G.tolist() == [0, 1 + half, 2 + 2 * half]
    split = splits(out)
    for number, one in enumerate((first, second)):
        assert {split[f"{i:03}"] for i in range(number * half, (number + 1) * half)} == {split[one.name]}
    verify_dataset(str(out))
    with (out / "copies.csv").open(newline="") as file:
        assert {row["equals"] for row in csv.DictReader(file)} == {"one", "two"}


@pytest.mark.parametrize("still", ["whole", "steps"])
def test_leads_that_say_too_little_make_no_copies(make_record, ingest_records, tmp_path, still) -> None:
    """Such as a loose electrode, or a calibration: other leads tell the recordings apart."""
    records = [make_record(f"{i:02}", 1000, ("I", "II", "V1")) for i in range(6)]
    alike_T = np.zeros(1000, np.int16) if still == "whole" else (np.arange(1000) // 100 % 2 * 1000).astype(np.int16)
    for record in records:
        record.signal_LT[0] = alike_T
    records = [replace(record, scale_L=np.ones(3, np.float32)) for record in records]
    out = ingest_records(tmp_path / "out", records)
    assert about_copies(ShardSet.open(out)) == []


def older(folder: Path) -> Path:
    """As an earlier version wrote it."""
    manifest = read_manifest((folder / "manifest.json").read_bytes(), "manifest")
    index = folder / manifest["index"]["file"]
    columns = {name: np.array(column) for name, column in map_index(index, manifest["records"]).items()}
    del columns["lead_keys"]
    index.unlink()
    entry = write_index_in_parts(folder, manifest["records"], [columns])
    write_manifest(folder, manifest["rate_hz"], entry, manifest["shards"], manifest["sources"])
    return folder


def test_sets_of_earlier_versions_are_compared_by_their_payloads_and_the_gap_is_told(
    originals, make_record, ingest_records, tmp_path
) -> None:
    out = older(ingest_records(tmp_path / "out", originals, **vars(HALVES)))
    untold = f"copies in another payload, with other leads or another scale are not found in {out}, which comes from"
    (line,) = about_copies(ShardSet.open(out))
    assert line.startswith(untold)
    verify_dataset(str(out))
    before = splits(out)
    added = add(out, copied(originals))
    assert splits(out) == before | {f"{name}_copy": split for name, split in before.items()}
    assert added.copies[0].startswith("24 recordings are exact copies")
    assert added.copies[-1].startswith(untold)
    new = ingest_records(tmp_path / "new", [make_record("new")])
    line = copies_apart(ShardSet.open([out, new]))
    assert line is not None
    assert line.startswith(untold)
    assert copies_apart(ShardSet.open(out)) is None


def test_flat_recordings_are_no_copies(make_record, ingest_records, tmp_path) -> None:
    flat_LT = np.zeros((2, 50), np.int16)
    records = [replace(make_record(f"{i}", 50, ("I", "II")), signal_LT=flat_LT + i % 2) for i in range(30)]
    records = [replace(record, scale_L=np.ones(2, np.float32), patient=None) for record in records]
    out = ingest_records(tmp_path / "out", records, validation_fraction=0.5)
    assert about_copies(ShardSet.open(out)) == []
    assert {"train", "validation"} == set(splits(out).values())


def test_keys_of_many_rows_equal_those_of_one(originals, ingest_records, tmp_path, monkeypatch) -> None:
    columns = ShardSet.open(ingest_records(tmp_path / "out", originals)).sets[0].columns
    whole = content_keys(columns)
    monkeypatch.setattr("ecgscale.data.copies._CHUNK", 5)
    np.testing.assert_array_equal(content_keys(columns), whole)
    assert len(np.unique(whole)) == len(originals)


# -- splits ----------------------------------------------------------------------------------------------------------


def test_copies_lie_in_one_split(originals, ingest_records, tmp_path) -> None:
    out = ingest_records(tmp_path / "out", by_name(*originals, *copied(originals)), **vars(HALVES))
    split = splits(out)
    assert set(split.values()) == set(SPLITS)
    assert all(split[record.name] == split[f"{record.name}_copy"] for record in originals)


def test_it_does_not_matter_who_reads_the_records_and_in_which_shards(originals, ingest_records, tmp_path) -> None:
    records = by_name(*originals, *copied(originals))
    split = splits(ingest_records(tmp_path / "out", records, **vars(HALVES)))
    fewer = IngestOptions(**vars(HALVES) | {"records_per_shard": 3})
    for i in (3, 1, 2):
        ingest_part(Records(records), tmp_path / "parts", fewer, (i, 3))
    merge_parts(Records(records), tmp_path / "parts", fewer)
    assert splits(tmp_path / "parts") == split
    assert splits(ingest_records(tmp_path / "back", records[::-1], **vars(HALVES) | {"payload": "npy"})) == split


def test_two_known_patients_with_a_recording_in_common_lie_in_one_split(make_record, ingest_records, tmp_path) -> None:
    records = [make_record(f"{i}{of}", 60, ("I",), patient=f"p{i}") for i in range(30) for of in "ab"]
    records += [replace(records[2 * i], name=f"{i}z", patient=f"p{i + 1}") for i in range(0, 28, 4)]
    out = ingest_records(tmp_path / "out", by_name(*records), **vars(HALVES))
    split = splits(out)
    for i in range(0, 28, 4):
        assert len({split[f"{n}{of}"] for n in (i, i + 1) for of in "ab"} | {split[f"{i}z"]}) == 1
    assert set(split.values()) == set(SPLITS)
    verify_dataset(str(out))  # no patient stands in two splits
    (copies, torn) = about_copies(ShardSet.open(out))
    assert "7 recordings are exact copies of others, such as 0a and 0z; all copies of a recording lie in one" in copies
    assert (
        "copies under two patients: 7 recordings, such as 0a (patient p0 of made) and 0z (patient p1 of made)" in torn
    )


def test_a_signal_of_many_patients_binds_none_of_them(make_record, ingest_records, tmp_path) -> None:
    """Such as a calibration signal: or all patients would lie in one split. Copies that name no patient still do."""
    one = make_record("one", 60, ("I",))
    records = [replace(one, name=f"{i:02}", patient=f"p{i}") for i in range(24)]
    out = ingest_records(tmp_path / "out", records, **vars(HALVES))
    assert set(splits(out).values()) == set(SPLITS)
    assert any("copies in different splits: 1 recordings" in line for line in about_copies(ShardSet.open(out)))
    unknown = [replace(record, patient=None) for record in records]
    assert len(set(splits(ingest_records(tmp_path / "unknown", unknown, **vars(HALVES))).values())) == 1
    known = [replace(record, patient=f"p{i}" if i < 3 else None) for i, record in enumerate(records)]
    assert len(set(splits(ingest_records(tmp_path / "three", known, **vars(HALVES))).values())) == 1


@pytest.mark.parametrize("payload", ["pco", "npy"])
def test_appended_copies_take_the_split_of_the_ones_that_are_there(
    originals, make_record, ingest_records, tmp_path, payload
) -> None:
    out = ingest_records(tmp_path / "out", originals, **vars(HALVES) | {"payload": payload})
    before = splits(out)
    others = [make_record(f"p{i}", 60, ("I",), patient=f"{i}") for i in range(24)]
    carriers = copied(originals)
    carriers = [replace(record, patient=f"{i}") for i, record in enumerate(carriers)]
    add(out, by_name(*carriers, *others), payload=payload)
    after = splits(out)
    assert after.items() >= before.items()
    for i, record in enumerate(originals):
        assert after[f"{record.name}_copy"] == before[record.name] == after[f"p{i}"]
    # A person who was moved by copies stays where he is, also when records of his come that are no copies.
    add(out, [make_record(f"q{i}", 60, ("I",), patient=f"{i}") for i in range(24)], payload=payload)
    assert all(splits(out)[f"q{i}"] == after[f"p{i}"] for i in range(24))


def test_an_appended_copy_that_joins_two_old_splits_is_named(originals, ingest_records, tmp_path) -> None:
    known = [replace(record, patient=record.name) for record in originals]
    out = ingest_records(tmp_path / "out", known, **vars(HALVES))
    before = splits(out)
    one = known[0]
    other = next(record for record in known if before[record.name] != before[one.name])
    add(out, [replace(one, name="z", patient=other.patient)])
    assert splits(out) == before | {"z": before[other.name]}  # a patient is never torn
    said = "\n".join(about_copies(ShardSet.open(out)))
    assert "1 lie in different splits" in said
    assert f"such as {one.name} ({before[one.name]}) and z ({before[other.name]})" in said


def test_a_grown_table_that_gives_known_records_other_patients_is_refused(originals, ingest_records, tmp_path) -> None:
    known = [replace(record, patient=record.name) for record in originals]
    out = ingest_records(tmp_path / "out", known, **vars(HALVES))
    grown = [replace(known[0], patient="another"), *known[1:], replace(known[1], name="new", patient="new")]
    add(out, by_name(*grown))
    rejected = (out / "rejected.csv").read_text()
    assert f"'made' has a record '{known[0].name}' already, of another patient; ingest all anew" in rejected


def test_values_that_name_splits_are_kept_and_copies_in_different_ones_named(originals, tmp_path, capsys) -> None:
    records = [replace(record, labels={"fold": ["1"]}) for record in originals]
    records += copied(originals, labels={"fold": ["2"]})
    out, options = tmp_path / "out", IngestOptions(rate_hz=RATE_HZ, split_by="fold", test_values=("2",))
    ingest(Records(by_name(*records)), out, options)
    assert set(splits(out).items()) == {(r.name, "test" if "copy" in r.name else "train") for r in records}
    apart = "copies in different splits: 24 recordings, such as a00 (train) and a00_copy (test)"
    assert apart in summarise(str(out))
    assert cli.main(["verify", str(out)]) == 0
    assert apart in capsys.readouterr().out


def test_copies_in_another_split_of_a_second_set_are_named(make_record, ingest_records, tmp_path, jobs) -> None:
    records = [make_record(f"{i}", 1000, patient=None) for i in range(12)]
    flat = replace(records[0], name="flat", signal_LT=np.zeros_like(records[0].signal_LT))
    one, two = tmp_path / "one", tmp_path / "two"
    ingest_records(one, [*records, flat], validation_fraction=0.0)
    again = [replace(record, name=f"{record.name} again") for record in (*records[:2], flat)]
    ingest(Records(again, "other"), two, IngestOptions(RATE_HZ, validation_fraction=0, test_fraction=1))
    apart = copies_apart(ShardSet.open([one, two]))
    assert apart == (
        "2 recordings have exact copies in another split of one, two, such as 0 (train) and 0 again (test); "
        "`ingest --append` into one data set keeps copies in one split"
    )
    assert copies_apart(ShardSet.open(one)) is None
    run = ["pretrain", *SMALL, f"--data.shards={one},{two}", f"--run.dir={tmp_path / 'run'}", "--train.steps=1"]
    assert apart in jobs.run(1, run)


@pytest.mark.parametrize("what", ["payload", "json"])
def test_a_damaged_copy_ends_no_run_that_skips_it(make_record, ingest_records, tmp_path, jobs, what) -> None:
    """What is told of copies is a hint; the stream decides what becomes of damaged recordings."""
    records = [make_record(f"{i:02}", 1000, patient=None) for i in range(24)]
    one, two = tmp_path / "one", tmp_path / "two"
    ingest_records(one, records, validation_fraction=0.0)
    again = [replace(record, name=f"{record.name} again") for record in records[:2]]
    ingest(Records(again, "other"), two, IngestOptions(RATE_HZ, validation_fraction=0, test_fraction=1))
    shards = ShardSet.open([one, two])
    at = int(shards.take("json_offset" if what == "json" else "offset", np.array([0]))[0])
    with (one / "shard-000000.tar").open("r+b") as tar:
        tar.seek(at + 4)
        byte = tar.read(1)
        tar.seek(at + 4)
        tar.write(bytes([byte[0] ^ 1]))
    named = "record 0 (unreadable) (train)" if what == "json" else "00 (train)"
    line = copies_apart(ShardSet.open([one, two]))
    assert line is not None
    assert f"2 recordings have exact copies in another split of one, two, such as {named} and 00 again (test)" in line
    run = ["pretrain", *SMALL, f"--data.shards={one},{two}", f"--run.dir={tmp_path / 'run'}", "--train.steps=1"]
    assert line in jobs.run(2, [*run, "--data.unreadable=skip"])


def test_tars_of_others_with_copies_of_other_leads(originals, ingest_records, tmp_path, capsys) -> None:
    copies = [rows_of(record, "I") for record in copied(originals)]
    made = ingest_records(tmp_path / "made", by_name(*originals, *copies), payload="npy")
    for path in [*made.glob("index-*"), made / "manifest.json"]:
        path.unlink()
    assert cli.main(["index", str(made), "--workers=1", "--validation-fraction=.3", "--test-fraction=.3"]) == 0
    assert "24 recordings are exact copies of others, such as" in (said := capsys.readouterr().out)
    assert "all copies of a recording lie in one split" in said
    verify_dataset(str(made))


def test_tars_of_others_with_copies(originals, ingest_records, tmp_path, capsys) -> None:
    made = ingest_records(tmp_path / "made", by_name(*originals, *copied(originals)), payload="npy")
    for path in [*made.glob("index-*"), made / "manifest.json"]:
        path.unlink()
    assert cli.main(["index", str(made), "--workers=1", "--validation-fraction=.3", "--test-fraction=.3"]) == 0
    assert "24 recordings are exact copies of others, such as" in capsys.readouterr().out
    shards = ShardSet.open(made)
    copies = copies_in(shards)
    assert len(copies) == 24
    assert not copies.differing(shards.take("split", copies.number_R)).any()
    assert set(shards.column("split").tolist()) == {0, 1, 2}


# -- the same records again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_records_that_are_there_are_left_out_and_counted(originals, ingest_records, tmp_path, workers) -> None:
    out = ingest_records(tmp_path / "out", originals[:-2], **vars(HALVES))
    before = splits(out)
    options = IngestOptions(**vars(HALVES) | {"payload": "npy", "records_per_shard": 5})
    done = ingest(Records(originals), out, options, workers, append=True)
    assert (done.records, done.rejected, done.held) == (2, 0, 22)
    assert splits(out).keys() == {record.name for record in originals}
    assert splits(out).items() >= before.items()
    assert about_copies(ShardSet.open(out)) == []
    verify_dataset(str(out))
    with pytest.raises(InputError, match="23 records of 'made' are in it already; append others"):
        add(out, originals[1:])
    mirrored = replace(originals[0], signal_LT=originals[0].signal_LT[:, ::-1].copy())
    with pytest.raises(InputError, match=r"already, 1 others are rejected, the first because: .* with other samples"):
        add(out, [mirrored, *originals[2:]])
    assert len(splits(out)) == 24
    assert not (out / "ingest.unfinished").exists()


def test_other_labels_of_records_that_are_there_are_counted(originals, make_record, ingest_records, tmp_path) -> None:
    labelled = [replace(record, labels={"rhythm": ["AF", "ä"]}, metadata={"age": "7"}) for record in originals[:4]]
    out = ingest_records(tmp_path / "out", labelled, **vars(HALVES))
    changed = [
        replace(labelled[0], labels={"rhythm": ["SR"]}),
        replace(labelled[1], labels={}),
        replace(labelled[2], metadata={"age": "8"}),
        labelled[3],
    ]
    with pytest.raises(InputError, match="3 records of 'made' are in it already; append others; 2 x a record that is"):
        add(out, changed[:2] + changed[3:])
    done = add(out, [*changed, make_record("new", 60, ("I",))])
    assert (done.records, done.held) == (1, 4)
    (note,) = (note for note in done.notes if "has other labels or metadata now" in note)
    assert done.notes[note] == 3
    assert "ingest all anew" in note
    assert ShardSet.open(out).metadata(0)["labels"] == {"rhythm": ["AF", "ä"]}
    with pytest.raises(InputError, match="append others, or ingest all anew if their labels have changed"):
        add(out, [*changed, make_record("new", 60, ("I",))])


def test_another_recording_of_that_name_is_rejected(originals, make_record, ingest_records, tmp_path) -> None:
    out = ingest_records(tmp_path / "out", originals, **vars(HALVES))
    changed = replace(originals[3], signal_LT=originals[4].signal_LT)
    done = add(out, [changed, originals[5], make_record("new", 60, ("I",))])
    assert (done.records, done.rejected, done.held) == (1, 1, 1)
    rejected = (out / "rejected.csv").read_text()
    assert "a03,'made' has a record 'a03' already, with other samples; put this one into a folder" in rejected.replace(
        '"', ""
    )
    # In another data set the name is another's.
    done = add(out, [changed, originals[5]], "elsewhere")
    assert (done.records, done.rejected, done.held) == (2, 0, 0)


def test_patient_ids_that_occur_in_another_data_set_are_counted(make_record, ingest_records, tmp_path) -> None:
    out = tmp_path / "out"
    batches = {
        "2019": [make_record(f"r{i}", 60, ("I",), patient=f"{i % 20}") for i in range(40)],
        "2020": [make_record(f"s{i}", 60, ("I",), patient=f"{i % 30 + 5}") for i in range(30)],
    }
    ingest(Records(batches["2019"], "2019"), out, HALVES)
    assert add(out, batches["2020"], "2020").shared_ids == {"2019": 15}
    assert add(out, [make_record("u", 60, ("I",), patient=None)], "2021").shared_ids == {}
    again = ingest(Records(batches["2019"], "2019"), tmp_path / "two", HALVES)
    assert again.shared_ids == {}
    assert add(tmp_path / "two", batches["2020"], "2019").shared_ids == {}


@pytest.mark.parametrize("stacked", [True, False])
def test_equal_rows_and_files_of_arrays_are_copies(tmp_path, stacked) -> None:
    simulation = Simulation(patients=3, records_per_patient=1, rate_hz=RATE_HZ)
    mv_NLT = np.stack([simulation.read(item).millivolts() for item in simulation.items()])[[0, 1, 2, 1]]
    source = tmp_path / "in.npy"
    if stacked:
        np.save(source, mv_NLT)
    else:
        source = tmp_path / "in"
        source.mkdir()
        for i, mv_LT in enumerate(mv_NLT):
            np.save(source / f"{i}.npy", mv_LT)
    out = tmp_path / "out"
    ingest(open_source(source, SourceOptions(source_rate_hz=RATE_HZ)), out, HALVES)
    assert copies_in(ShardSet.open(out)).number_R.tolist() == [1, 3]
    assert splits(out)["1"] == splits(out)["3"]


def test_the_command_line_says_it(tmp_path, write_record, capsys) -> None:
    source = tmp_path / "2019"
    simulation = Simulation(patients=3, records_per_patient=1, rate_hz=RATE_HZ)
    for i, item in enumerate(simulation.items()):
        write_record(source, f"r{i}", simulation.read(item), [f"PatientID: {i}"])
        write_record(tmp_path / "2020", f"t{i}", simulation.read(item).resampled(50), [f"PatientID: {i}"])
    command = ["ingest", "--rate-hz=100", "--workers=1"]
    assert cli.main([*command, str(source), str(tmp_path / "out")]) == 0
    assert cli.main([*command, str(tmp_path / "2020"), str(tmp_path / "out"), "--append"]) == 0
    assert "3 patient ids occur in 2019 too" in (said := capsys.readouterr().out)
    assert "if they are the same people give --dataset 2019" in said
    write_record(source, "r9", simulation.read(simulation.items()[0]), ["PatientID: 0"])
    assert cli.main([*command, str(source), str(tmp_path / "out"), "--append"]) == 0
    said = capsys.readouterr().out
    assert "3 records left out: the set has them already, by the same names and with equal samples" in said
    assert (
        "1 recordings are exact copies of others, such as r0 and r9; all copies of a recording lie in one split" in said
    )
    assert "1 records in 1 shards, 0 rejected" in said
    with (tmp_path / "out" / "copies.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    split = splits(tmp_path / "out")["r0"]
    assert rows == [(name, "r0", "2019", "0", split) for name in ("r0", "r9")]
