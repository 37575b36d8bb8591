"""Training batches from shards behind HTTP and S3: the same as from the folder, whatever happens on the way."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ecgscale.cli import main
from ecgscale.data import remote
from ecgscale.data.cache import Held
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.remote import CacheConfig
from ecgscale.data.selection import DataConfig, Selection, evaluation_batches
from ecgscale.data.shard_set import DamagedRecordError, ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.errors import MachineError
from ecgscale.files import file_sha256, sealed
from ecgscale.simulate import Simulation

_spec = importlib.util.spec_from_file_location("servers", Path(__file__).with_name("servers.py"))
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)


@pytest.fixture(scope="module")
def root(simulated, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    (root / "bucket").mkdir()
    shutil.copytree(simulated, root / "bucket" / "set")
    return root


@pytest.fixture(params=["http", "s3"])
def place(request, root, monkeypatch) -> Iterator[tuple[str, servers.Proxy]]:
    """The URL of the simulated set, and the proxy before its server."""
    server = servers.web_server if request.param == "http" else servers.s3_server
    with server(root) as port:
        proxy = servers.Proxy(port)
        for name, value in (servers.S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}).items():
            monkeypatch.setenv(name, value)
        yield (f"http://127.0.0.1:{proxy.port}" if request.param == "http" else "s3:/") + "/bucket/set", proxy
        proxy.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(remote, "_BACKOFF_S", 0.01)


@pytest.fixture
def cache(tmp_path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), attempts=3)


def open_stream(place: str | Path, cache: CacheConfig, rank: int = 0, world_size: int = 1, **options) -> TrainStream:
    config = DataConfig(segment_s=2.5, min_record_s=5, shuffle_window=4, cache=cache, **options)
    selection = Selection(ShardSet.open(place, cache), config, "train")
    return TrainStream(selection, selection.order(8, 4, 2, seed=3), rank, world_size, segments=2)


def assert_same_batches(one: TrainStream, other: TrainStream, first: int, batches: int) -> None:
    """Two epochs have 8 global batches of two micro-steps."""
    streams = one.from_batch(first), other.from_batch(first)
    for _ in range(2 * batches):
        a, b = next(streams[0]), next(streams[1])
        assert torch.equal(a.record_B, b.record_B)
        assert torch.equal(a.signal_BLT, b.signal_BLT)
        assert torch.equal(a.gain_BL, b.gain_BL)
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_and_nothing_is_fetched_twice(place, cache, simulated, workers) -> None:
    url, proxy = place
    assert_same_batches(open_stream(url, cache, workers=workers), open_stream(simulated, cache), 0, 16)
    tars = {name: count for name, count in proxy.requests.items() if name.endswith(".tar")}
    assert tars == {path.name: 1 for path in simulated.glob("*.tar")}
    # Another run on this node finds all of it in the cache.
    assert_same_batches(open_stream(url, cache), open_stream(simulated, cache), 10**8, 8)
    assert {name: count for name, count in proxy.requests.items() if name.endswith(".tar")} == tars


def test_faults_on_the_way_change_nothing(place, cache, simulated) -> None:
    url, proxy = place
    proxy.faults = ["500", "", "cut", "", "flip", "503", "truncate", "", "500", "flip", "", "cut"]
    assert_same_batches(open_stream(url, cache), open_stream(simulated, cache), 0, 8)
    assert not proxy.faults


def test_a_cache_smaller_than_the_set_gives_the_same(place, cache, simulated) -> None:
    url, _ = place
    largest = max(path.stat().st_size for path in simulated.iterdir())
    small = CacheConfig(**vars(cache) | {"limit_gb": 4.5 * largest / 1e9})
    for rank in range(2):
        one, other = open_stream(url, small, rank, 2), open_stream(simulated, cache, rank, 2)
        assert_same_batches(one, other, 3, 16)
    held = sum(path.stat().st_size for path in Path(cache.folder).rglob("*") if path.is_file())
    assert held <= small.limit_gb * 1e9


def test_shards_are_fetched_before_they_are_needed(root, cache) -> None:
    """In the order of the plan: those of the first batches first."""
    with servers.web_server(root) as port:
        proxy = servers.Proxy(port)
        url = f"http://127.0.0.1:{proxy.port}/bucket/set"
        one_by_one = CacheConfig(**vars(cache) | {"downloads": 1})
        stream = open_stream(url, one_by_one, workers=1)
        batches = stream.from_batch(0)
        next(batches)
        waiting = threading.Event()
        for _ in range(100):
            if sum(name.endswith(".tar") for name in proxy.requests) == 5:
                break
            waiting.wait(0.1)
        assert sum(name.endswith(".tar") for name in proxy.requests) == 5  # all of a small set, after one batch
        batches.close()
        proxy.close()


def test_a_shard_that_stays_unreadable_stops_the_run_or_is_skipped(place, cache, simulated) -> None:
    url, proxy = place
    bad = "shard-000003.tar"
    opened = open_stream(url, cache), open_stream(url, cache, unreadable="skip")
    proxy.broken = {bad: "500"}
    batches = opened[0].from_batch(0)
    with pytest.raises(MachineError, match=rf"{url}/{bad}.*3 attempts"):
        list(batches)
    batches.close()
    batches, right = opened[1].from_batch(0), open_stream(simulated, cache).from_batch(0)
    shard = opened[1].selection.shards
    for _ in range(32):
        got, wanted = next(batches), next(right)
        hit = torch.from_numpy(shard.shard_of(wanted.record_B.numpy()) == 3)
        assert torch.equal(got.record_B != wanted.record_B, hit)
        assert torch.equal(got.signal_BLT[~hit], wanted.signal_BLT[~hit])
    counts = opened[1].own_counts()
    assert counts["data/skipped_shards"] == 1
    assert counts["data/replaced_recordings"] > 0
    batches.close()
    right.close()


def flip_in_cache(cache: CacheConfig, sha256: str, rng: np.random.Generator, count: int = 1) -> None:
    """Turn bits around in the node's copy of a file, as its disk may."""
    path = Path(cache.folder) / sha256[:2] / sha256
    content = bytearray(path.read_bytes())
    for at in rng.integers(len(content), size=count):
        content[at] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_copy_of_the_index_is_fetched_again(place, cache, simulated, capsys, seed) -> None:
    url, proxy = place
    index = open_stream(url, cache).selection.shards.sets[0].manifest["index"]
    flip_in_cache(cache, index["sha256"], np.random.default_rng(seed))
    again = open_stream(url, cache)
    assert f"{url}/{index['file']}: its copy in {cache.folder} was damaged; fetched again" in capsys.readouterr().err
    assert proxy.requests[index["file"]] == 2
    assert again.own_counts()["data/damaged_copies"] == 1
    assert_same_batches(again, open_stream(simulated, cache), 0, 4)


@pytest.mark.parametrize("payload", ["pco", "npy"])
def test_damaged_copies_of_shards_are_fetched_again(tmp_path, cache, payload, capsys) -> None:
    """One bit on one node's disk neither stops a run nor changes a batch: records, their JSON, whole and in parts."""
    shards = tmp_path / "bucket" / "set"
    options = IngestOptions(rate_hz=250, records_per_shard=8, payload=payload)
    ingest(Simulation(patients=20, duration_s=6, rate_hz=250), shards, options)
    with servers.web_server(tmp_path) as port:
        url, rng = f"http://127.0.0.1:{port}/bucket/set", np.random.default_rng(0)
        near, warm = open_stream(shards, cache), open_stream(url, cache)
        for shard in range(5):
            warm.selection.shards.prefetch(shard)
        for one in warm.selection.shards.shards:
            flip_in_cache(cache, one.sha256, rng, count=200)
        far = open_stream(url, cache)
        assert_same_batches(far, near, 0, 16)
        assert far.own_counts()["data/damaged_copies"] == 5
        for one in warm.selection.shards.shards:
            flip_in_cache(cache, one.sha256, rng, count=200)
        far = open_stream(url, cache).selection.shards
        assert [far.metadata(number) for number in range(40)] == [near.selection.shards.metadata(n) for n in range(40)]
        assert 1 <= far.cache.stats.damaged <= 5
        whole_RLT = np.zeros((40, 12, 1500), np.int16)
        far.read_whole(np.arange(40), whole_RLT)
        assert all(np.array_equal(whole_RLT[n], near.selection.shards.signal(n)) for n in range(40))
        assert far.cache.stats.damaged == 5


def test_a_shard_that_is_damaged_at_its_source_is_an_error(tmp_path, cache, simulated) -> None:
    """Its copy is what the manifest says, so that fetching it again would not help."""
    shards = shutil.copytree(simulated, tmp_path / "bucket" / "set")
    manifest = json.loads((shards / "manifest.json").read_text())
    first = shards / manifest["shards"][0]["file"]
    content = bytearray(first.read_bytes())
    for at in range(0, len(content), 500):
        content[at] ^= 255
    first.write_bytes(content)
    manifest["shards"][0]["sha256"] = file_sha256(first)
    (shards / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with servers.web_server(tmp_path) as port:
        far = open_stream(f"http://127.0.0.1:{port}/bucket/set", cache).selection.shards
        for number in (0, 1):
            with pytest.raises(DamagedRecordError, match=r"shard-000000\.tar: record"):
                far.signal(number)
        assert far.cache.stats.damaged == 0


def test_a_disk_that_gives_back_other_bytes_is_named(place, cache, monkeypatch) -> None:
    url, _ = place
    monkeypatch.setattr(Held, "sha256", lambda held: "0" * 64)
    with pytest.raises(MachineError, match=f"^{cache.folder}: gives back other bytes than were written"):
        open_stream(url, cache)


def test_evaluation_and_metadata_come_from_remote_shards_too(place, cache, simulated) -> None:
    url, _ = place
    near, far = open_stream(simulated, cache).selection, open_stream(url, cache).selection
    for (one, _), (other, _) in zip(evaluation_batches(near, 4, 2, 0), evaluation_batches(far, 4, 2, 0), strict=True):
        assert torch.equal(one.signal_BLT, other.signal_BLT)
    assert [far.shards.metadata(number) for number in range(40)] == [near.shards.metadata(n) for n in range(40)]
    assert np.array_equal(far.shards.column("patient"), near.shards.column("patient"))


def test_commands_take_urls(place, cache, monkeypatch, capsys) -> None:
    url, _ = place
    monkeypatch.setenv("ECGSCALE_CACHE", cache.folder)
    assert main(["verify", url]) == 0
    assert "40 records in 5 shards, all checksums right" in capsys.readouterr().out
    assert main(["inspect", url]) == 0
    assert "patients    20" in capsys.readouterr().out


def _read_as_rank(rank: int, url: str, cache: CacheConfig) -> None:
    stream = open_stream(url, cache, rank, 2, workers=1)
    batches = stream.from_batch(0)
    for _ in range(8):
        next(batches)
    batches.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_ranks_fetch_each_shard_once(root, cache) -> None:
    """Real processes at the same time; every shard crosses the network once."""
    with servers.web_server(root) as port:
        proxy = servers.Proxy(port)
        url = f"http://127.0.0.1:{proxy.port}/bucket/set"
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=_read_as_rank, args=(rank, url, cache), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]
        files = [count for name, count in proxy.requests.items() if name.endswith((".tar", ".safetensors"))]
        assert files == [1] * 6
        proxy.close()


def test_a_run_trains_from_a_server(root, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ECGSCALE_CACHE", cache.folder)
    with servers.web_server(root) as port:
        proxy = servers.Proxy(port)
        small = ["--model.preset=tiny", "--model.depth=1", "--model.width=32", "--model.heads=2"]
        small += ["--model.ffn_width=32", "--model.stem_channels=16", "--data.segment_s=2.5", "--data.min_record_s=5"]
        small += ["--train.steps=2", "--train.global_batch=8", f"--run.dir={tmp_path / 'run'}"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deepspeed, in this process
            assert main(["pretrain", *small, f"--data.shards=http://127.0.0.1:{proxy.port}/bucket/set"]) == 0
        assert {count for name, count in proxy.requests.items() if name.endswith((".tar", ".safetensors"))} == {1}
        proxy.close()
