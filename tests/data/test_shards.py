"""Shards: what is written is read, and whatever is damaged, missing, foreign or half-written is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecgscale import cli
from ecgscale.data import payload as payloads
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import map_index, shard_entry, write_index, write_manifest, write_tar
from ecgscale.errors import InputError, MachineError
from ecgscale.files import write_whole
from ecgscale.inspection import verify_dataset
from ecgscale.lead_names import LEADS
from ecgscale.record import patient_code

LEAD_SUBSETS = st.sets(st.sampled_from(LEADS), min_size=1).map(lambda leads: sorted(leads, key=LEADS.index))
PAYLOADS = pytest.mark.parametrize("payload", ["pco", "npy"])
SOURCE = {"dataset": "made", "options": {}, "records": 0, "rejected": 0}


def write_set(folder: Path, records, dataset: str = "made", payload: str = "pco", per_shard: int = 100) -> Path:
    """Shards, by the functions that write the format."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, entries = [], []
    for first in range(0, len(records), per_shard):
        tar, part = folder / f"shard-{first // per_shard:06d}.tar", records[first : first + per_shard]
        parts.append(write_tar(tar, dataset, [(f"key-{i}", record) for i, record in enumerate(part)], payload))
        entries.append(shard_entry(tar, len(part), dataset, payload))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns["split"] = np.zeros(len(records), np.uint8)
    write_manifest(folder, records[0].rate_hz, write_index(folder, columns), entries, [SOURCE])
    return folder


def forge(folder: Path, change: Callable[[dict, list], None]) -> Path:
    """Change the index columns and the manifest's shards of a set, with all checksums right again; returns a tar."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    old = folder / manifest["index"]["file"]
    columns = {name: np.array(column) for name, column in map_index(old, manifest["records"]).items()}
    old.unlink()
    shards = manifest["shards"]
    change(columns, shards)
    for shard in shards:
        tar = folder / shard["file"]
        shard |= {"bytes": tar.stat().st_size, "sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
    write_manifest(folder, manifest["rate_hz"], write_index(folder, columns), shards, manifest["sources"])
    return folder / shards[0]["file"]


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
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def index_of(folder: Path) -> Path:
    (index,) = folder.glob("index-*.safetensors")
    return index


def refused(folder: Path, culprit: Path, check=ShardSet.open) -> str:
    """The one line with which it is refused; it names the file."""
    with pytest.raises(InputError) as caught:
        check(folder)
    text = str(caught.value)
    assert str(culprit) in text
    assert "\n" not in text
    return text


# --- writing and reading ---


@PAYLOADS
def test_what_is_written_is_read(make_record, tmp_path, payload) -> None:
    records = [
        make_record("a/plain"),
        make_record("b", 1, ["V6"], patient=None),
        make_record("c", 3, ["aVR", "V1", "V2"], labels={"Dx": ["1", "2"], "none": []}),
        make_record("d ü/µ", 777, LEADS[:6], metadata={"age": "61", "note": 'a "ß"\n,line'}, invalid_samples=4),
        make_record("long", 2 * payloads.BLOCK + 1),
    ]
    shards = ShardSet.open(write_set(tmp_path / "set", records, payload=payload, per_shard=2))
    assert len(shards) == len(records)
    assert shards.rate_hz == 100
    assert shards.first_S.tolist() == [0, 2, 4, 5]
    columns = {name: shards.column(name) for name in ("samples", "patient", "scale")}
    for i, record in enumerate(records):
        assert_equal(shards.record(i), record)
        assert [LEADS[at] for at in shards.lead_positions(i)] == list(record.leads)
        assert columns["samples"][i] == record.n_samples
        assert columns["patient"][i] == patient_code("made", record.patient, record.name)
        scale_L = np.zeros(12, np.float32)
        scale_L[shards.lead_positions(i)] = record.scale_L
        np.testing.assert_array_equal(columns["scale"][i], scale_L)
    assert verify_dataset(tmp_path / "set").endswith("5 records in 3 shards, all checksums right")


def test_a_record_without_samples_does_not_spoil_a_set(make_record, ingest_records, tmp_path) -> None:
    folder = ingest_records(
        tmp_path / "set", [make_record("full"), make_record("hollow", 0), make_record("bare", 9, [])]
    )
    assert len(ShardSet.open(folder)) == 1
    assert (folder / "rejected.csv").read_text().count("holds no samples") == 2


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(LEAD_SUBSETS, st.integers(1, 2000)), min_size=1, max_size=6),
    st.sampled_from(["pco", "npy"]),
    st.data(),
)
def test_any_leads_of_any_length_are_read_back(make_record, tmp_path, shapes, payload, data) -> None:
    records = [make_record(f"r{i}", n_samples, leads) for i, (leads, n_samples) in enumerate(shapes)]
    shards = ShardSet.open(write_set(tmp_path / "set", records, payload=payload))
    for i, record in enumerate(records):
        assert_equal(shards.record(i), record)
    stop_R = [data.draw(st.integers(1, record.n_samples)) for record in records]
    start_R = [data.draw(st.integers(0, stop - 1)) for stop in stop_R]
    windows = shards.windows(np.arange(len(records)), start_R, stop_R)
    for window_LT, record, start, stop in zip(windows, records, start_R, stop_R, strict=True):
        np.testing.assert_array_equal(window_LT, record.signal_LT[:, start:stop])


@PAYLOADS
def test_equal_records_give_equal_bytes(make_record, tmp_path, payload) -> None:
    records = [make_record(f"r{i}", 100 + i, labels={"b": ["1"], "a": ["2"]}) for i in range(5)]
    again = [dataclasses.replace(record, labels=dict(reversed(record.labels.items()))) for record in records]
    one, other = (write_set(tmp_path / name, some, payload=payload) for name, some in (("a", records), ("b", again)))
    assert contents(one) == contents(other)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset 1.0.2 does not close what it reads
@PAYLOADS
def test_webdataset_reads_the_same_samples(make_record, tmp_path, payload) -> None:
    from webdataset import WebDataset

    records = [make_record(f"r{i}", 400 + i, LEADS[: 1 + i], labels={"Dx": [str(i)]}) for i in range(10)]
    shards = ShardSet.open(write_set(tmp_path / "set", records, payload=payload, per_shard=4))
    samples = list(WebDataset([shard.place for shard in shards.shards], shardshuffle=False, empty_check=False))
    gc.collect()
    assert len(samples) == len(shards) == 10
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"key-{i % 4}"
        member = sample[payload]
        signal_LT = payloads.decode(member) if payload == "pco" else np.load(io.BytesIO(member), allow_pickle=False)
        assert signal_LT.dtype == np.int16
        np.testing.assert_array_equal(signal_LT, records[i].signal_LT)
        assert json.loads(sample["json"]) == shards.metadata(i)
        assert sample.keys() == {"__key__", "__url__", "__local_path__", "json", payload}


@PAYLOADS
def test_the_bytes_are_those_of_the_writer_of_webdataset(make_record, tmp_path, payload) -> None:
    """Tars of many sizes, so that every padding of members and of the end occurs."""
    from webdataset.writer import TarWriter

    for count in (1, 2, 9, 10):
        records = [(f"key-{i}", make_record(f"r{i}", 100 + 7 * i)) for i in range(count)]
        write_tar(tmp_path / "ours.tar", "set", records, payload)
        with tarfile.open(tmp_path / "ours.tar") as ours:
            members = {member.name: ours.extractfile(member).read() for member in ours}
        usual = {"mtime": 0, "user": "ecgscale", "group": "ecgscale", "mode": 0o444, "encoder": False}
        with (tmp_path / "theirs.tar").open("wb") as file, TarWriter(file, **usual) as writer:
            for key, _ in records:
                writer.write({"__key__": key} | {ext: members[f"{key}.{ext}"] for ext in ("json", payload)})
        assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_several_sets_are_one(make_record, simulated, tmp_path) -> None:
    other = write_set(tmp_path / "other", [make_record(f"r{i}", 200) for i in range(3)], "other", "npy")
    both = ShardSet.open([simulated, other])
    assert len(both) == 43
    assert both.record(41).name == "r1"
    assert both.shard_of(np.array([0, 8, 39, 40])).tolist() == [0, 1, 4, 5]
    assert both.identity != ShardSet.open(simulated).identity
    assert_equal(both.record(7), ShardSet.open(simulated).record(7))
    with pytest.raises(InputError, match="twice"):
        ShardSet.open([other, tmp_path / "x" / ".." / "other"])


def test_sets_of_different_rates_are_refused(make_record, simulated, tmp_path) -> None:
    other = write_set(tmp_path / "other", [make_record("r", rate_hz=250.0)])
    with pytest.raises(InputError, match=r"100\.0, 250\.0"):
        ShardSet.open([simulated, other])
    with pytest.raises(InputError, match=r"data\.shards"):
        ShardSet.open([])


# --- single bits ---


@pytest.fixture(params=["pco", "npy"])
def small(request, make_record, tmp_path) -> Path:
    """Two tars of three short records each, to be damaged. Of equal size where samples are plain."""
    records = [make_record(f"r{i}", 60, LEADS[:3], labels={"Dx": [str(i)]}) for i in range(6)]
    return write_set(tmp_path / "small", records, payload=request.param, per_shard=3)


def test_every_flipped_bit_of_a_tar_is_found(small) -> None:
    """A bit of every 13th byte, so of all places in headers, JSON, payloads, gaps and the end. Reading sees its own."""
    tar = small / "shard-000001.tar"
    shards = ShardSet.open(small)
    places = [  # (record, is payload, first byte, behind the last)
        (i, what == "", int(shards.column(f"{what}offset")[i]), int(shards.column(f"{what}length")[i]))
        for i in range(3, 6)
        for what in ("", "json_")
    ]
    hit = set()
    for byte in range(0, tar.stat().st_size, 13):
        flip(tar, byte, byte % 8)
        text = refused(small, tar, verify_dataset)
        damaged = ShardSet.open(small)
        inside = [(i, signal) for i, signal, first, length in places if first <= byte < first + length]
        for i in range(6):
            if inside and inside[0][0] == i:
                hit.add(inside[0])
                assert f"record: {i - 3})" in text
                for _ in range(2):  # and again, when it is read again
                    with pytest.raises(InputError, match=f"{tar}: (the JSON of )?record {i - 3} is damaged"):
                        damaged.record(i)
                (damaged.metadata if inside[0][1] else damaged.signal)(i)  # the other part is whole
            else:
                damaged.record(i)
        assert inside or "tar header" in text
        flip(tar, byte, byte % 8)
    assert len(hit) == 6
    verify_dataset(small)


def test_any_flipped_bit_of_an_index_or_manifest_is_refused(small) -> None:
    for path in (index_of(small), small / "manifest.json"):
        for byte in range(0, path.stat().st_size, 11):
            for bit in {byte % 8, 5}:  # 5: upper and lower case
                flip(path, byte, bit)
                refused(small, path)
                flip(path, byte, bit)
    verify_dataset(small)


# --- what is missing, cut off or of another set ---


@pytest.mark.parametrize("which", ["tar", "index", "manifest"])
@pytest.mark.parametrize("kept", [0, 0.5, -1, None])
def test_a_truncated_or_missing_file_is_refused(small, which, kept) -> None:
    path = {"tar": small / "shard-000001.tar", "index": index_of(small), "manifest": small / "manifest.json"}[which]
    size = path.stat().st_size
    if kept is None:
        path.unlink()
    else:
        os.truncate(path, size - 1 if kept == -1 else int(kept * size))
    refused(small, path)
    refused(small, path, verify_dataset)


def test_a_tar_that_was_cut_before_it_was_counted_is_refused(small) -> None:
    """Size and sha256 are those of the manifest; the end is missing."""
    tar = small / "shard-000001.tar"
    for size in (13 * 512, 12 * 512 + 100, 12 * 512, 11 * 512 - 1):  # members end at 12 * 512
        os.truncate(tar, size)
        forge(small, lambda columns, shards: None)
        refused(small, tar, verify_dataset)


def test_swapped_tars_are_refused(make_record, tmp_path) -> None:
    records = [make_record(f"r{i}", 60) for i in range(6)]
    folder = write_set(tmp_path / "set", records, payload="npy", per_shard=3)
    one, other = sorted(folder.glob("*.tar"))
    assert one.stat().st_size == other.stat().st_size
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    shards = ShardSet.open(folder)  # which looks at sizes only
    refused(folder, one, verify_dataset)
    for i in range(6):
        for read in (shards.signal, shards.metadata):
            with pytest.raises(InputError, match="checksum differs"):
                read(i)


def test_files_of_another_set_are_refused(make_record, tmp_path) -> None:
    mine, others = (
        write_set(tmp_path / name, [make_record(f"{name}{i}", 60) for i in range(3)], payload="npy")
        for name in ("mine", "your")
    )
    whole = contents(mine)
    index_of(mine).write_bytes(index_of(others).read_bytes())  # of equal size
    refused(mine, mine / index_of(mine).name)
    shutil.copy(others / "manifest.json", mine)
    refused(mine, index_of(others).name)
    shutil.copy(index_of(others), mine)
    tar = mine / "shard-000000.tar"
    refused(mine, tar, verify_dataset)
    with pytest.raises(InputError, match=f"{tar}: record 0 is damaged"):
        ShardSet.open(mine).signal(0)
    for name, content in whole.items():
        (mine / name).write_bytes(content)
    verify_dataset(mine)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x00\xff\xfe", b"[]", b"{}", b'"x"', b"7", b'{"format": 1}', b'{"format": "ecgscale-shards/99"}'),
        *(b"[" * 100_000, b'{"format":' * 5000, b'{"format": 1e999}'),
    ],
)
def test_a_foreign_manifest_is_refused(copied, content) -> None:
    (copied / "manifest.json").write_bytes(content)
    refused(copied, copied / "manifest.json")


def test_a_folder_that_is_no_data_set_is_refused(tmp_path) -> None:
    assert "manifest.json" in refused(tmp_path, tmp_path)
    refused(tmp_path / "absent", tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", tmp_path / "file")


# --- what has right checksums all over, and is wrong ---


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("offset", 1 << 40), ("offset", (1 << 63) - 2), ("offset", (1 << 64) - 600), ("length", (1 << 32) - 1)),
        *(("json_offset", 1 << 40), ("json_offset", (1 << 63) - 1), ("json_length", 1 << 25), ("leads", 0)),
        *(("leads", 1 << 12), ("samples", 0), ("split", 3)),
    ],
)
def test_an_index_that_points_outside_is_refused(small, column, value) -> None:
    def change(columns, shards) -> None:
        columns[column][1] = value

    refused(small, forge(small, change))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("offset", 512), ("length", 10), ("samples", 59), ("samples", 61), ("samples", (1 << 32) - 1)),
        *(("leads", 3), ("leads", 0b1110), ("scale", np.nan), ("scale", -1), ("patient", 1), ("checksum", 1)),
        ("lead_keys", 1),
        *(("json_offset", 0), ("json_length", 7), ("json_checksum", 1)),
    ],
)
def test_an_index_that_lies_is_refused(small, column, value) -> None:
    def change(columns, shards) -> None:
        columns[column][1] = value

    tar = forge(small, change)
    refused(small, tar, verify_dataset)


@pytest.mark.parametrize(
    "change",
    [
        lambda columns, shards: shards[0].update(records=4) or shards[1].update(records=2),
        lambda columns, shards: shards[0].update(dataset="other"),
        lambda columns, shards: shards[0].update(payload="npy" if shards[0]["payload"] == "pco" else "pco"),
        lambda columns, shards: shards.reverse(),
    ],
)
def test_a_manifest_that_lies_is_refused(small, change) -> None:
    tar = forge(small, change)
    refused(small, tar, verify_dataset)


def test_a_patient_in_two_splits_is_refused(make_record, tmp_path) -> None:
    folder = write_set(tmp_path / "set", [make_record(f"r{i}", patient="one") for i in range(2)])

    def change(columns, shards) -> None:
        columns["split"][1] = 2

    forge(folder, change)
    refused(folder, folder, verify_dataset)


# --- compressed payloads that lie ---

HEAD = struct.Struct("<4sIII")


def signed(member: bytes, leads: int, samples: int) -> payloads.Counts:
    """Decoded with the checksum that it should have."""
    checksum = xxhash.xxh3_64_intdigest(member[: payloads.header_bytes(samples)])
    return payloads.decode_window(np.frombuffer(member, np.uint8), checksum, leads, samples, 0, samples)


@pytest.mark.parametrize("samples", [60, payloads.BLOCK + 60])
def test_a_header_that_lies_is_refused(make_record, samples) -> None:
    member, checksum = payloads.encode(make_record("r", samples, LEADS[:3]).signal_LT, "pco")
    rest, whole = member[HEAD.size :], np.frombuffer(member, np.uint8)
    with pytest.raises(payloads.DamagedError, match="checksum"):
        payloads.decode_window(whole, checksum ^ 1, 3, samples, 0, samples)
    lies = [(b"ECGq", 3, samples, 8192), (b"ECGp", 2, samples, 8192), (b"ECGp", 3, samples + 1, 8192)]
    lies += [(b"ECGp", 3, samples, 4096), (b"ECGp", 2**32 - 1, samples, 8192), (b"ECGp", 3, 2**32 - 1, 8192)]
    for lie in lies:
        with pytest.raises(payloads.DamagedError, match="header"):
            signed(HEAD.pack(*lie) + rest, 3, samples)
    for claimed in ((2, samples), (4, samples), (3, samples - 1), (3, samples + 1), (3, 2**31)):  # index and header
        with pytest.raises(InputError):
            signed(HEAD.pack(b"ECGp", *claimed, 8192) + rest, *claimed)
        with pytest.raises(InputError):
            payloads.decode(HEAD.pack(b"ECGp", *claimed, 8192) + rest)
    for cut in (member[:-1], member + b"x", member[:20], b"", b"ECGp"):
        with pytest.raises(InputError):
            signed(cut, 3, samples)
        with pytest.raises(InputError):
            payloads.decode(cut)


def test_a_block_of_another_type_or_length_is_refused() -> None:
    from pcodec import ChunkConfig, standalone

    good = np.arange(180, dtype=np.int16)
    for values in (
        good[:-1],
        np.arange(181, dtype=np.int16),
        *(good.astype(t) for t in ("u2", "i4", "f4", "f8", "i8")),
    ):
        block = standalone.simple_compress(values, ChunkConfig())
        table = struct.pack("<IQ", len(block), xxhash.xxh3_64_intdigest(block))
        with pytest.raises(payloads.DamagedError):
            signed(HEAD.pack(b"ECGp", 3, 60, 8192) + table + block, 3, 60)


@settings(max_examples=300)
@given(st.data())
def test_no_bytes_crash_the_decoder(data) -> None:
    """Blocks of any bytes, whole, mutated or made up, whose checksums are right: samples of the shape, or Damaged."""
    rng = np.random.default_rng(data.draw(st.integers(0, 50)))
    leads, samples = data.draw(st.sampled_from([(1, 1), (12, 1), (3, 60), (12, 500)]))
    steps = data.draw(st.sampled_from([1, 5, 60_000]))
    signal_LT = rng.integers(-(steps // 2) - 1, steps // 2 + 1, (leads, samples)).cumsum(axis=1).astype(np.int16)
    block = bytearray(payloads.encode(signal_LT, "pco")[0][payloads.header_bytes(samples) :])
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, max(0, min(len(block), data.draw(st.sampled_from([40, 10_000]))) - 1)))
        how = data.draw(st.sampled_from(["flip", "set", "cut", "insert"]))
        if how == "flip" and block:
            block[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "set" and block:
            block[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del block[at : at + data.draw(st.integers(1, 30))]
        else:
            block[at:at] = data.draw(st.binary(max_size=30))
    table = struct.pack("<IQ", len(block), xxhash.xxh3_64_intdigest(bytes(block)))
    member = HEAD.pack(b"ECGp", leads, samples, 8192) + table + bytes(block)
    began = time.monotonic()
    with contextlib.suppress(payloads.DamagedError):
        assert signed(member, leads, samples).shape == (leads, samples)
    assert time.monotonic() - began < 5


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(content) -> None:
    for member in (content, b"ECGp" + content, HEAD.pack(b"ECGp", 3, 2**32 - 1, 8192) + content):
        with pytest.raises(InputError):
            payloads.decode(member)
    with pytest.raises(payloads.DamagedError):
        payloads.npy_shape(np.frombuffer(b"\x93NUMPY\x01\x00" + content, np.uint8))


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
    assert process.returncode == 1, errors
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
    assert cli.main(["simulate", str(out), *SIMULATE, "--workers=1", "--restart"]) == 0
    assert contents(out) == undisturbed


@pytest.mark.parametrize("what", ["index", "manifest"])
def test_no_file_is_half_written_on_a_full_disk(make_record, tmp_path, monkeypatch, what) -> None:
    folder = write_set(tmp_path / "set", [make_record("old")])
    before = contents(folder)
    fsync = os.fsync

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith(what):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=f"{folder}.*No space left"):
        write_set(folder, [make_record("new")])
    assert not list(folder.glob("*.partial"))
    assert contents(folder)["manifest.json"] == before["manifest.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="absent/file"):
        write_whole(tmp_path / "absent" / "file", b"x")


def test_offsets_that_were_taken_off_stand_in_the_json(tmp_path, make_record, ingest_records) -> None:
    plain = make_record("a", leads=("I", "V1"))
    offset = dataclasses.replace(make_record("b", leads=("I", "V1")), offset_mv={"V1": 300.25})
    shards = ShardSet.open(ingest_records(tmp_path / "set", [plain, offset]))
    assert [shards.metadata(number).get("offset_mv") for number in range(2)] == [None, {"V1": 300.25}]
