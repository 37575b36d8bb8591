"""Shards: what is written is read, and whatever is damaged, missing or half-written is refused by name."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecgscale import cli
from ecgscale.data.shards import ShardSet, write_index, write_manifest, write_tar, write_whole
from ecgscale.errors import InputError
from ecgscale.inspection import verify_dataset
from ecgscale.record import LEADS, patient_code

LEAD_SUBSETS = st.sets(st.sampled_from(LEADS), min_size=1).map(lambda leads: sorted(leads, key=LEADS.index))


def write_set(folder: Path, records, dataset: str = "made") -> Path:
    """One shard, by the three functions that write the format."""
    folder.mkdir(parents=True, exist_ok=True)
    tar = folder / "shard-000000.tar"
    columns = write_tar(tar, dataset, [(f"key-{i}", record) for i, record in enumerate(records)])
    entry = write_index(tar, columns | {"split": np.zeros(len(records), np.uint8)})
    write_manifest(folder, dataset, records[0].rate_hz, [entry], 0, {})
    return folder


def assert_equal(one, other) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def refused(folder: Path, culprit: Path, check=ShardSet.open) -> str:
    """The one line with which it is refused; it names the file."""
    with pytest.raises(InputError) as caught:
        check(folder)
    text = str(caught.value)
    assert str(culprit) in text
    assert "\n" not in text
    return text


# --- writing and reading ---


def test_what_is_written_is_read(make_record, tmp_path) -> None:
    records = [
        make_record("a/plain"),
        make_record("b", 1, ["V6"], patient=None),
        make_record("c", 3, ["aVR", "V1", "V2"], labels={"Dx": ["1", "2"], "none": []}),
        make_record("d ü/µ", 777, LEADS[:6], metadata={"age": "61", "note": 'a "ß"\n,line'}, invalid_samples=4),
        make_record("e", 0),
    ]
    shards = ShardSet.open(write_set(tmp_path / "set", records))
    assert len(shards) == len(records)
    assert shards.rate_hz == 100
    for i, record in enumerate(records):
        shard, number = shards.locate(i)
        assert_equal(shard.record(number), record)
        assert [LEADS[at] for at in shard.lead_positions(number)] == list(record.leads)
        columns = {name: column[number] for name, column in shard.columns.items()}
        assert columns["samples"] == record.n_samples
        assert columns["rate_hz"] == record.rate_hz
        assert columns["patient"] == patient_code("made", record.patient, record.name)
        scale_L = np.zeros(12, np.float32)
        scale_L[shard.lead_positions(number)] = record.scale_L
        np.testing.assert_array_equal(columns["scale"], scale_L)
    assert verify_dataset(tmp_path / "set").endswith("5 records in 1 shards, all checksums right")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(LEAD_SUBSETS, st.integers(0, 2000)), min_size=1, max_size=6))
def test_any_leads_of_any_length_are_read_back(make_record, tmp_path, shapes) -> None:
    records = [make_record(f"r{i}", n_samples, leads) for i, (leads, n_samples) in enumerate(shapes)]
    shards = ShardSet.open(write_set(tmp_path / "set", records))
    for i, record in enumerate(records):
        assert_equal(shards.shards[0].record(i), record)


def test_equal_records_give_equal_bytes(make_record, tmp_path) -> None:
    records = [make_record(f"r{i}", 100 + i, labels={"b": ["1"], "a": ["2"]}) for i in range(5)]
    again = [dataclasses.replace(record, labels=dict(reversed(record.labels.items()))) for record in records]
    assert contents(write_set(tmp_path / "a", records)) == contents(write_set(tmp_path / "b", again))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset 1.0.2 does not close what it reads
def test_webdataset_reads_the_same_samples(simulated) -> None:
    from webdataset import WebDataset

    shards = ShardSet.open(simulated)
    tars = [str(shard.tar) for shard in shards.shards]
    samples = list(WebDataset(tars, shardshuffle=False, empty_check=False))
    gc.collect()
    assert len(samples) == len(shards) == 40
    for i, sample in enumerate(samples):
        shard, number = shards.locate(i)
        assert sample["__key__"] == f"{shard.tar.stem}-{number:06d}"
        signal_LT = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        assert signal_LT.dtype == np.int16
        np.testing.assert_array_equal(signal_LT, shard.signal(number))
        assert json.loads(sample["json"]) == shard.metadata(number)


def test_an_opened_shard_travels_without_its_data(simulated) -> None:
    shard = ShardSet.open(simulated).shards[1]
    expected = shard.signal(2).copy()
    travelled = pickle.dumps(shard)
    assert len(travelled) < shard.tar.stat().st_size / 10
    np.testing.assert_array_equal(pickle.loads(travelled).signal(2), expected)


def test_several_sets_are_one(make_record, simulated, tmp_path) -> None:
    other = write_set(tmp_path / "other", [make_record(f"r{i}", 200) for i in range(3)], "other")
    both = ShardSet.open([simulated, other])
    assert len(both) == 43
    shard, number = both.locate(41)
    assert shard.record(number).name == "r1"
    assert both.identity != ShardSet.open(simulated).identity
    with pytest.raises(IndexError):
        both.locate(43)


def test_sets_of_different_rates_are_refused(make_record, simulated, tmp_path) -> None:
    other = write_set(tmp_path / "other", [make_record("r", rate_hz=250.0)])
    with pytest.raises(InputError, match=r"100\.0, 250\.0"):
        ShardSet.open([simulated, other])
    with pytest.raises(InputError, match=r"data\.shards"):
        ShardSet.open([])


# --- single bits ---


def test_a_flipped_bit_in_a_payload_is_seen_when_the_record_is_read(copied) -> None:
    tar = copied / "shard-000002.tar"
    columns = ShardSet.open(copied).shards[2].columns
    for record, place in ((0, 0.0), (3, 0.001), (4, 0.5), (7, 1.0)):
        byte = int(columns["offset"][record] + round(place * (int(columns["length"][record]) - 1)))
        flip(tar, byte, bit=record)
        shard = ShardSet.open(copied).shards[2]
        for other in set(range(8)) - {record}:
            shard.signal(other)
        for _ in range(2):  # and again, when it is read again
            with pytest.raises(InputError, match=f"{tar}: record {record} is damaged"):
                shard.signal(record)
        assert f"record: {record})" in refused(copied, tar, verify_dataset)
        flip(tar, byte, bit=record)
    verify_dataset(copied)


def test_a_flipped_bit_in_a_json_is_seen_when_it_is_read(copied) -> None:
    tar = copied / "shard-000001.tar"
    start = int(ShardSet.open(copied).shards[1].columns["json_offset"][5])
    for byte in (start, start + 30, start + 100):
        flip(tar, byte, 0)
        shard = ShardSet.open(copied).shards[1]
        shard.metadata(4)
        with pytest.raises(InputError, match=f"{tar}: the JSON of record 5 is damaged"):
            shard.record(5)
        assert "record: 5)" in refused(copied, tar, verify_dataset)
        flip(tar, byte, 0)


def test_verify_sees_any_flipped_bit_of_a_tar(copied) -> None:
    tar = copied / "shard-000003.tar"
    columns = ShardSet.open(copied).shards[3].columns
    end = int(columns["offset"][0] + columns["length"][0])
    size = tar.stat().st_size
    anywhere = random.Random(0).sample(range(size), 30)
    header, padding, last = 100, end + 1, size - 1
    for byte in (header, padding, last, *anywhere):
        flip(tar, byte, byte % 8)
        refused(copied, tar, verify_dataset)
        flip(tar, byte, byte % 8)
    flip(tar, header, 0)
    assert "tar header" in refused(copied, tar, verify_dataset)


def test_any_flipped_bit_of_an_index_is_refused(copied) -> None:
    index = copied / "shard-000000.index.safetensors"
    for byte in range(0, index.stat().st_size, 29):
        flip(index, byte, byte % 8)
        refused(copied, index)
        flip(index, byte, byte % 8)
    ShardSet.open(copied)


def test_any_flipped_bit_of_the_manifest_is_refused(copied) -> None:
    manifest = copied / "manifest.json"
    whole = manifest.read_bytes()
    for byte in range(0, len(whole), 13):
        for bit in {byte // 13 % 8, 5}:  # 5: upper and lower case
            flip(manifest, byte, bit)
            refused(copied, manifest)
            manifest.write_bytes(whole)


# --- what is missing, cut off or foreign ---


@pytest.mark.parametrize("name", ["shard-000004.tar", "shard-000004.index.safetensors", "manifest.json"])
@pytest.mark.parametrize("kept", [0, 0.5, -1])
def test_a_truncated_file_is_refused(copied, name, kept) -> None:
    path = copied / name
    size = path.stat().st_size
    os.truncate(path, size - 1 if kept == -1 else int(kept * size))
    refused(copied, path)
    refused(copied, path, verify_dataset)


@pytest.mark.parametrize("name", ["shard-000004.tar", "shard-000004.index.safetensors", "manifest.json"])
def test_a_missing_file_is_refused(copied, name) -> None:
    (copied / name).unlink()
    refused(copied, copied if name == "manifest.json" else copied / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff\xfe", b"[]", b"{}", b'"x"', b"7", b'{"format": 1}', b'{"format": "ecgscale-shards/99"}'],
)
def test_a_foreign_manifest_is_refused(copied, content) -> None:
    (copied / "manifest.json").write_bytes(content)
    refused(copied, copied / "manifest.json")


def test_a_folder_that_is_no_data_set_is_refused(tmp_path) -> None:
    assert "manifest.json" in refused(tmp_path, tmp_path)
    refused(tmp_path / "absent", tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", tmp_path / "file")


@pytest.mark.parametrize("field", ["file", "index"])
@pytest.mark.parametrize("where", ["../evil/{}", "{folder}/../evil/{}", "sub/../../evil/{}", "..", "", "."])
def test_a_manifest_leads_to_no_other_folder(copied, field, where) -> None:
    shutil.copytree(copied, copied.parent / "evil")
    (copied / "sub").mkdir()
    manifest = json.loads((copied / "manifest.json").read_bytes())
    entry = manifest["shards"][0]
    entry[field] = where.format(entry[field], folder=copied)
    write_manifest(copied, "evil", manifest["rate_hz"], manifest["shards"], 0, {})
    refused(copied, copied / "manifest.json")


def test_verify_compares_counts_with_the_manifest(copied) -> None:
    manifest = json.loads((copied / "manifest.json").read_bytes())
    manifest["shards"][1]["records"] += 1
    write_manifest(copied, "made", manifest["rate_hz"], manifest["shards"], 0, {})
    refused(copied, copied / "shard-000001.tar", verify_dataset)


# --- full disks and interrupted writers ---

SIMULATE = ["--patients=8", "--duration-s=5", "--rate-hz=100", "--records-per-shard=4"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    assert cli.main(["simulate", str(out), *SIMULATE, "--workers=1"]) == 0
    return contents(out)


def begin_simulate(out: Path, *options: str, **process: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "ecgscale.cli", "simulate", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **process)


def files_of_at_most(n_bytes: int) -> None:
    """Every write beyond fails with EFBIG, as one to a full disk does with ENOSPC."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_a_full_disk_ends_ingest_with_one_line(tmp_path, undisturbed) -> None:
    out = tmp_path / "set"
    process = begin_simulate(out, *SIMULATE, "--workers=2", preexec_fn=lambda: files_of_at_most(40_000))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.count("\n") == 1
    assert f"{out}/shard-00000" in errors
    assert "File too large" in errors
    refused(out, out)
    assert cli.main(["simulate", str(out), *SIMULATE, "--workers=1"]) == 0
    assert contents(out) == undisturbed


@pytest.mark.parametrize(("workers", "whole_group"), [(1, True), (2, False)])
def test_a_killed_ingest_leaves_no_data_set(tmp_path, undisturbed, workers, whole_group) -> None:
    out = tmp_path / "set"
    process = begin_simulate(out, "--patients=4000", *SIMULATE[1:], f"--workers={workers}", start_new_session=True)
    with process:
        deadline = time.monotonic() + 60
        while not (out / "shard-000001.tar").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(children) >= workers - 1
    assert not psutil.wait_procs(children, timeout=20)[1]  # orphans would go on writing there
    refused(out, out)
    assert cli.main(["simulate", str(out), *SIMULATE, "--workers=1"]) == 0
    assert contents(out) == undisturbed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("what", ["tar", "index", "manifest"])
def test_no_file_is_half_written_on_a_full_disk(make_record, tmp_path, what) -> None:
    folder = write_set(tmp_path / "set", [make_record("old")])
    before = contents(folder)
    name = {"tar": "shard-000000.tar", "index": "shard-000000.index.safetensors", "manifest": "manifest.json"}[what]
    (folder / f"{name}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=f"{folder / name}.*No space left"):
        write_set(folder, [make_record("new")])
    assert not (folder / f"{name}.partial").is_symlink()
    assert contents(folder)[name] == before[name]


def test_a_file_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="absent/file"):
        write_whole(tmp_path / "absent" / "file", b"x")
