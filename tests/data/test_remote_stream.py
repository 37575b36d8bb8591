"""Training batches from shards behind HTTP and S3: the same as from the folder, whatever happens on the way."""

from __future__ import annotations

import importlib.util
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
from ecgscale.data.remote import CacheConfig
from ecgscale.data.selection import DataConfig, Selection, evaluation_batches
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.errors import InputError

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
    with pytest.raises(InputError, match=rf"{url}/{bad}.*3 attempts"):
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
