"""Remote shards, from a real S3 server and a real HTTP server, behind a proxy that breaks things on request."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.data import fetch as remote_files
from ecgscale.data import remote
from ecgscale.data.remote import CacheConfig, ShardCache, Unreadable, check_place, is_remote, join
from ecgscale.errors import InputError

SIZE = 300_000
FILES = {f"shard-{i:06d}.tar": np.random.default_rng(i).bytes(SIZE) for i in range(8)} | {"manifest.json": b'{"a": 1}'}
NAME = "shard-000000.tar"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_spec = importlib.util.spec_from_file_location("servers", Path(__file__).with_name("servers.py"))
servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)
Proxy = servers.Proxy


# -- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the files in bucket/set."""
    root = tmp_path_factory.mktemp("web")
    (root / "bucket" / "set").mkdir(parents=True)
    for name, content in FILES.items():
        (root / "bucket" / "set" / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def http_port(root) -> Iterator[int]:
    with servers.web_server(root) as port:
        yield port


@pytest.fixture(scope="module")
def s3_port(root) -> Iterator[int]:
    with servers.s3_server(root) as port:
        yield port


@dataclass
class Place:
    proxy: Proxy
    folder: str

    def url(self, name: str = NAME) -> str:
        return join(self.folder, name)


@pytest.fixture
def http(http_port) -> Iterator[Place]:
    proxy = Proxy(http_port)
    yield Place(proxy, f"http://127.0.0.1:{proxy.port}/bucket/set")
    proxy.close()


@pytest.fixture
def s3(s3_port, monkeypatch) -> Iterator[Place]:
    proxy = Proxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    for name, value in servers.S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    yield Place(proxy, "s3://bucket/set")
    proxy.close()


@pytest.fixture(params=["http", "s3"])
def place(request) -> Place:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(remote, "_BACKOFF_S", 0.01)


@pytest.fixture
def config(tmp_path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), attempts=4, timeout_s=20.0, limit_gb=1.0)


def requests_for(fault: str, attempts: int) -> int:
    """aiohttp itself repeats a request once whose connection is closed without an answer (RFC 9112, 9.3.1)."""
    return 2 * attempts if fault == "close" else attempts


def hold(cache: ShardCache, place: Place, name: str = NAME) -> remote.Held:
    return cache.hold(place.url(name), digest(FILES[name]), len(FILES[name]))


def fetch(cache: ShardCache, place: Place, name: str = NAME) -> None:
    with hold(cache, place, name) as held:
        assert held.path.read_bytes() == FILES[name]


def files_in(config: CacheConfig) -> list[str]:
    """All but the lock that stands there always."""
    return sorted(path.name for path in config.place.rglob("*") if path.is_file() and path.name != "lock")


def cached(config: CacheConfig) -> set[str]:
    by_digest = {digest(content): name for name, content in FILES.items()}
    return {by_digest[name] for name in files_in(config)}


# -- faults ----------------------------------------------------------------------------------------------------------

STALLS = ("stall before the header", "stall in the body")
FAULTS = ("500", "503", "429", *STALLS, "close", "garbage", "cut", "flip", "truncate", "long")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_overcome(place, config, fault) -> None:
    times = 1 if fault in STALLS else 2
    place.proxy.faults = [fault] * requests_for(fault, times)
    cache = ShardCache(CacheConfig(**vars(config) | {"timeout_s": 1.0 if fault in STALLS else 20.0}))
    fetch(cache, place)
    requests = requests_for(fault, times) + 1
    assert place.proxy.requests == {NAME: requests}
    assert (cache.stats.downloads, cache.stats.retries, cache.stats.hits) == (1, times, 0)
    assert cached(config) == {NAME}
    fetch(cache, place)
    assert place.proxy.requests == {NAME: requests}
    assert cache.stats.hits == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_one_line(place, config, fault) -> None:
    place.proxy.always = fault
    cache = ShardCache(CacheConfig(**vars(config) | {"timeout_s": 0.4 if fault in STALLS else 20.0, "attempts": 2}))
    with pytest.raises(Unreadable) as caught:
        hold(cache, place)
    assert str(caught.value).startswith(f"{place.url()}: unreadable after 2 attempts, the last: ")
    assert "\n" not in str(caught.value)
    assert fault not in ("500", "503", "429") or fault in str(caught.value)
    assert place.proxy.requests == {NAME: requests_for(fault, 2)}
    assert files_in(config) == []


@pytest.mark.parametrize("fault", ["401", "403", "404", "400"])
def test_an_answer_that_stays_the_same_is_not_asked_for_again(place, config, fault) -> None:
    place.proxy.always = fault
    with pytest.raises(Unreadable, match=f"^{place.url()}: "):
        hold(ShardCache(config), place)
    assert place.proxy.requests == {NAME: 1}
    assert files_in(config) == []


@pytest.mark.parametrize("folder", ["set/nothing", "../none/set"])
def test_no_such_file_or_bucket(place, config, folder) -> None:
    url = f"{place.folder.removesuffix('set')}{folder}/x.tar".replace("bucket/../", "")
    with pytest.raises(Unreadable, match="no such file or bucket"):
        ShardCache(config).hold(url, "0" * 64, 1)
    assert sum(place.proxy.requests.values()) == 1


def test_no_server_is_retried(config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x.tar"
    cache = ShardCache(config)
    with pytest.raises(Unreadable, match=f"^{url}: unreadable after 4 attempts"):
        cache.hold(url, "0" * 64, 1)
    assert cache.stats.retries == 3


def test_no_credentials(s3, config, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(Unreadable, match="FSSPEC_S3_ANON"):
        hold(ShardCache(config), s3)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match="nobody"):
        hold(ShardCache(config), s3)


@pytest.mark.parametrize("fault", ["503", "stall in the body", "cut"])
def test_small_files_are_read_anew_each_time(place, config, fault) -> None:
    place.proxy.faults = [fault]
    cache = ShardCache(CacheConfig(**vars(config) | {"timeout_s": 0.7}))
    for _ in range(2):
        assert cache.read(place.url("manifest.json")) == FILES["manifest.json"]
    assert place.proxy.requests == {"manifest.json": 3}
    assert files_in(config) == []


def test_read_is_bounded(http, config, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_READ_LIMIT_BYTES", SIZE - 1)
    with pytest.raises(InputError, match="larger than"):
        ShardCache(config).read(http.url())


def test_ranges_for_gcsfs_give_the_same_bytes(s3, config, monkeypatch) -> None:
    """gcsfs is not installed here; s3fs has the same two methods."""
    monkeypatch.setattr(remote_files, "_RANGE_BYTES", 70_000)
    monkeypatch.setattr(remote_files, "_streamed", remote_files._ranged)
    fetch(ShardCache(config), s3)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_client_is_named(config) -> None:
    with pytest.raises(InputError, match=r"pip install 'ecgscale\[gs\]'"):
        ShardCache(config).hold("gs://bucket/x.tar", "0" * 64, 1)


@pytest.mark.parametrize(("sha256", "size"), [("../../" + "0" * 58, 1), ("0" * 63, 1), (None, 1), ("0" * 64, 0)])
def test_what_a_manifest_says_is_checked(config, sha256, size) -> None:
    with pytest.raises(InputError, match="its manifest gives"):
        ShardCache(config).hold("http://127.0.0.1:1/x", sha256, size)


# -- several at once -------------------------------------------------------------------------------------------------

HOLDER = """
import json, sys
from ecgscale.data import fetch as remote_files
from ecgscale.data import remote
remote._BACKOFF_S = 0.01
config, files, how = json.loads(sys.argv[1])
cache = remote.ShardCache(remote.CacheConfig(**config))
sys.stdin.readline()
for url, sha256, size in files:
    with cache.hold(url, sha256, size) as held:
        assert remote.hashlib.sha256(held.path.read_bytes()).hexdigest() == sha256
        if how == "stay":
            print("held", flush=True)
            sys.stdin.readline()
print(json.dumps(vars(cache.stats)))
"""


def start(config: CacheConfig, place: Place, names: list[str], how: str = "") -> subprocess.Popen[str]:
    files = [(place.url(name), digest(FILES[name]), len(FILES[name])) for name in names]
    command = [sys.executable, "-W", "error", "-c", HOLDER, json.dumps([vars(config), files, how])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_fetch_each_file_once(place, config) -> None:
    place.proxy.slow_s = 0.1
    names = sorted(FILES)[1:6]
    count = 8 if place.folder.startswith("http") else 4  # s3fs takes a second of computing to import
    with ExitStack() as stack:
        processes = [stack.enter_context(start(config, place, names[i % 5 :] + names[: i % 5])) for i in range(count)]
        for process in processes:
            go(process)
        stats = [json.loads(process.stdout.read()) for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    assert place.proxy.requests == dict.fromkeys(names, 1)
    assert sum(each["downloads"] for each in stats) == 5
    assert sum(each["hits"] for each in stats) == 5 * (count - 1)
    assert cached(config) == set(names)


def test_a_process_killed_while_it_fetches_stops_nobody(http, config) -> None:
    http.proxy.faults = ["stall in the body"]
    with start(config, http, [NAME]) as victim:
        go(victim)
        assert http.proxy.stalled.wait(30)
        with ExitStack() as stack:
            others = [stack.enter_context(start(config, http, [NAME])) for _ in range(3)]
            for process in others:
                go(process)
            time.sleep(0.5)
            victim.send_signal(signal.SIGKILL)
            stats = [json.loads(process.stdout.read()) for process in others]
    assert sum(each["downloads"] for each in stats) == 1
    assert http.proxy.requests == {NAME: 2}
    assert cached(config) == {NAME}


def test_threads_fetch_each_file_once_and_not_too_many_at_a_time(place, config) -> None:
    place.proxy.slow_s = 0.05
    cache = ShardCache(CacheConfig(**vars(config) | {"downloads": 2}))
    most, running, lock = 0, 0, threading.Lock()
    download = cache._download

    def counted(*arguments: object) -> None:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        download(*arguments)
        with lock:
            running -= 1

    cache._download = counted
    names = sorted(FILES)[1:] * 4

    def ahead(name: str) -> None:
        cache.hold(place.url(name), digest(FILES[name]), len(FILES[name]), wait=False).release()

    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(ahead, names):
            pass
    assert place.proxy.requests == dict.fromkeys(FILES.keys() - {"manifest.json"}, 1)
    assert most == 2
    assert (cache.stats.downloads, cache.stats.hits) == (8, 24)
    assert cache.stats.bytes == 8 * SIZE
    assert cache.stats.waited_s > 0


FORK = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@FORK
def test_a_process_killed_at_any_time_leaves_nothing_that_looks_complete(http, config) -> None:
    rng = np.random.default_rng(0)
    names = sorted(FILES)[1:]
    http.proxy.slow_s = 0.01

    def fetch_all() -> None:
        cache = ShardCache(config)
        for name in names:
            hold(cache, http, name).release()

    killed = 0
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=fetch_all, daemon=True)
        process.start()
        process.join(rng.uniform(0.0, 0.2))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        process.close()
        for path in config.place.glob("??/*"):
            if not path.suffix:
                assert digest(path.read_bytes()) == path.name
                path.unlink()
    assert killed > 3
    for name in names:
        fetch(ShardCache(config), http, name)
    fetch(ShardCache(config), http, "manifest.json")
    assert cached(config) == set(FILES)


def _fetch_in_child(cache: ShardCache, place: Place, name: str) -> None:
    fetch(cache, place, name)
    fetch(cache, place, NAME)


@FORK
def test_a_cache_goes_through_a_fork(place, config) -> None:
    """Also while a thread of the parent fetches: neither its locks nor its connections are the child's."""
    cache = ShardCache(config)
    fetch(cache, place)
    place.proxy.faults = ["stall in the body"]
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(
            fetch, ShardCache(CacheConfig(**vars(config) | {"timeout_s": 1.5})), place, "manifest.json"
        )
        assert place.proxy.stalled.wait(10)
        child = multiprocessing.get_context("fork").Process(
            target=_fetch_in_child, args=(cache, place, "shard-000001.tar"), daemon=True
        )
        child.start()
        child.join(20)
        assert child.exitcode == 0
        fetching.result()
    fetch(cache, place, "shard-000002.tar")
    child.close()


@FORK
def test_a_release_in_a_forked_child_lets_nothing_go(http, config) -> None:
    cache = ShardCache(CacheConfig(**vars(config) | {"limit_gb": 1.5 * SIZE / 1e9, "timeout_s": 0.3}))
    with hold(cache, http) as held:
        child = multiprocessing.get_context("fork").Process(target=held.release, daemon=True)
        child.start()
        child.join(20)
        with pytest.raises(InputError, match="in use at once"):
            hold(cache, http, "shard-000001.tar")
    child.close()
    fetch(cache, http, "shard-000001.tar")


def test_a_cache_can_be_pickled(http, config) -> None:
    cache = ShardCache(config)
    fetch(cache, http)
    copy = pickle.loads(pickle.dumps(cache))
    fetch(copy, http)
    assert (copy.config, copy.stats.hits) == (config, 1)


# -- space -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(config) -> CacheConfig:
    """A cache for three files."""
    return CacheConfig(**vars(config) | {"limit_gb": 3.5 * SIZE / 1e9, "timeout_s": 2.0})


def shards(*numbers: int) -> list[str]:
    return [f"shard-{number:06d}.tar" for number in numbers]


def test_what_was_asked_for_longest_ago_goes_first(http, small) -> None:
    cache = ShardCache(small)
    for name in shards(0, 1, 2, 0, 3):
        fetch(cache, http, name)
        time.sleep(0.02)  # the kernel's file times are that coarse
    assert cached(small) == set(shards(0, 2, 3))
    fetch(cache, http, shards(4)[0])
    assert cached(small) == set(shards(0, 3, 4))


def test_files_in_use_stay(http, small) -> None:
    cache = ShardCache(small)
    with hold(cache, http, shards(0)[0]), hold(cache, http, shards(1)[0]):
        for name in shards(2, 3, 4):
            fetch(cache, http, name)
            time.sleep(0.02)
        assert cached(small) == set(shards(0, 1, 4))


def test_a_release_is_waited_for(http, small) -> None:
    cache = ShardCache(small)
    helds = [hold(cache, http, name) for name in shards(0, 1, 2)]
    releasing = threading.Timer(0.5, helds[1].release)
    releasing.start()
    fetch(cache, http, shards(3)[0])
    releasing.join()
    assert cached(small) == set(shards(0, 2, 3))
    for held in helds:
        held.release()


def test_all_in_use_is_an_error_that_says_how_much(http, small) -> None:
    cache = ShardCache(CacheConfig(**vars(small) | {"timeout_s": 0.3}))
    with start(small, http, shards(0), "stay") as other, ExitStack() as stack:
        go(other)
        assert other.stdout.readline() == "held\n"
        for name in shards(0, 1, 2):
            stack.enter_context(hold(cache, http, name))
        with pytest.raises(InputError, match=r"0\.0009 GB are in use at once .*limit_gb.*data\.shuffle_window"):
            hold(cache, http, shards(3)[0])
        stack.close()
        fetch(cache, http, shards(3)[0])
        fetch(cache, http, shards(4)[0])
        assert shards(0)[0] in cached(small)  # the other process uses it still
        other.communicate("\n")


def test_a_file_larger_than_the_cache(http, config) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=r"data\.cache\.limit_gb is 0\.0002, but one file has 0\.0003 GB"):
        hold(ShardCache(CacheConfig(**vars(config) | {"limit_gb": 0.0002})), http)
    assert time.monotonic() - began < 5
    assert http.proxy.requests == {}


def test_the_bound_holds_at_any_time(http, small) -> None:
    """Under threads and processes that use two or three files at once, of eight."""
    limit, most, over = 3.5 * SIZE, 0, threading.Event()
    watched = Path(small.folder)

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            # A file that goes while the folder is walked may make room for one that comes: only what stands at two
            # walks was there at once.
            before, after = (sizes(), sizes())
            most = max(most, sum(size for file, size in before.items() if file in after))

    def sizes() -> dict[tuple[Path, int], int]:
        found = {}
        for path in watched.glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found[path, status.st_ino] = status.st_size
        return found

    def work(number: int) -> None:
        for name in np.random.default_rng(number).permutation(shards(*range(8))):
            fetch(cache, http, str(name))

    config = CacheConfig(**vars(small) | {"timeout_s": 20.0})
    cache = ShardCache(config)
    with ExitStack() as stack:
        processes = [stack.enter_context(start(config, http, shards(*range(i, 8), *range(i)))) for i in (0, 4)]
        watching = stack.enter_context(ThreadPoolExecutor(1)).submit(watch)
        stack.callback(over.set)
        for process in processes:
            go(process)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(6)))
        for process in processes:
            process.communicate(timeout=60)
    watching.result()
    assert [process.returncode for process in processes] == [0, 0]
    assert SIZE < most <= limit
    assert cache.stats.downloads > 8


def test_what_a_killed_process_left_is_counted_and_removed(http, small) -> None:
    cache = ShardCache(small)
    http.proxy.faults = ["stall in the body"]
    with start(small, http, shards(7)) as victim:
        go(victim)
        assert http.proxy.stalled.wait(30)
        (partial,) = small.place.glob("??/*.partial")
        assert partial.stat().st_size == SIZE
        with hold(cache, http, shards(0)[0]), hold(cache, http, shards(1)[0]):
            impatient = ShardCache(CacheConfig(**vars(small) | {"timeout_s": 0.2}))
            with pytest.raises(InputError, match="in use at once"):
                hold(impatient, http, shards(2)[0])
        victim.kill()
        victim.wait()
    assert partial.exists()
    fetch(cache, http, shards(2)[0])
    assert cached(small) == set(shards(0, 1, 2))


def test_a_file_of_the_wrong_size_is_fetched_anew(http, config) -> None:
    cache = ShardCache(config)
    with hold(cache, http) as held:
        path = held.path
    path.write_bytes(b"short")
    fetch(cache, http)
    assert http.proxy.requests == {NAME: 2}


def test_files_that_are_not_the_caches_are_left_alone(http, small) -> None:
    strange = small.place / "ab" / "notes.txt"
    strange.parent.mkdir(parents=True)
    strange.write_bytes(bytes(10 * SIZE))
    cache = ShardCache(small)
    for name in shards(0, 1, 2, 3):
        fetch(cache, http, name)
    assert strange.exists()


LIMITED = """
import resource, sys
from ecgscale.data.remote import CacheConfig, ShardCache
from ecgscale.errors import MachineError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ShardCache(CacheConfig(folder=sys.argv[1])).hold(*sys.argv[2:4], int(sys.argv[4]))
except MachineError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_named(http, config) -> None:
    command = [sys.executable, "-W", "error", "-c", LIMITED, config.folder, http.url(), digest(FILES[NAME]), str(SIZE)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{config.folder}: the cache cannot be used: File too large; free space there")
    assert files_in(config) == []


def test_a_full_disk_is_named(http, config, tmp_path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here, so no file system of a few kB")
    (tmp_path / "tiny").mkdir()
    script = f'mount -t tmpfs -o size=100k none {tmp_path}/tiny && exec "$@" && find {tmp_path}/tiny -size +0'
    program = LIMITED.replace("(1000, 1000)", "(-1, -1)")
    program += "import pathlib; print([p.name for p in pathlib.Path(sys.argv[1]).rglob('*') if p.is_file()])"
    inner = [
        sys.executable,
        "-W",
        "error",
        "-c",
        program,
        f"{tmp_path}/tiny",
        http.url(),
        digest(FILES[NAME]),
        str(SIZE),
    ]
    said = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *inner], capture_output=True, text=True, check=True
    )
    first, left = said.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/tiny: the cache cannot be used: No space left on device; free space there")
    assert left == "['lock']"
    assert http.proxy.requests == {NAME: 1}


def test_a_cache_folder_that_is_a_file(http, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^{tmp_path}/file: the cache cannot be used"):
        hold(ShardCache(CacheConfig(folder=str(tmp_path / "file"))), http)


def test_released_files_leave_no_descriptor_open(http, config) -> None:
    cache = ShardCache(config)
    fetch(cache, http)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        held = hold(cache, http)
        held.release()
        held.release()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_memory_is_constant(http_port, config, tmp_path_factory) -> None:
    """A file of 200 MB is fetched in less than 100 MB more than a small one."""
    big = tmp_path_factory.mktemp("big") / "big.tar"
    with big.open("wb") as file:
        file.truncate(200_000_000)
    with big.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    handler = functools.partial(servers.QuietHandler, directory=big.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        cache = ShardCache(config)
        assert cache.read(f"http://127.0.0.1:{http_port}/bucket/set/{NAME}") == FILES[NAME]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with cache.hold(f"http://127.0.0.1:{server.server_port}/big.tar", sha256, 200_000_000) as held:
            held.path.unlink()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        server.shutdown()
        thread.join()
    big.unlink()
    assert after - before < 100_000  # kB


# -- names and configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket/set", "gs://b/x", "gcs://b/x", "http://host/x", "https://host:1/x/"])
def test_remote_places(url) -> None:
    assert is_remote(url)
    check_place(url)


@pytest.mark.parametrize("place", ["/data/set", "set", "../set", "C", "runs/a:b"])
def test_local_places(place, config) -> None:
    assert not is_remote(place)
    check_place(place)
    with pytest.raises(InputError, match="only URLs are fetched"):
        ShardCache(config).read(place)


@pytest.mark.parametrize(
    "place",
    [
        "pipe:cat /etc/passwd",
        "file:///data/set",
        "file:/data",
        "ftp://host/x",
        "s3:/bucket",
        "memory://x",
        "simplecache::s3://bucket/x",
        "zip://a::s3://bucket/x",
        "s3://bucket/x::file:///y",
        "s3:///x",
        "http://",
        "https://host/x?sig=1",
        "http://host/a b",
        "https://user:secret@host/x",
    ],
)
def test_strange_places_are_refused(place) -> None:
    with pytest.raises(InputError) as caught:
        check_place(place)
    assert "secret" not in str(caught.value)


def test_a_refusal_names_what_is_known() -> None:
    with pytest.raises(InputError, match=r"^ftp://host/x: .*s3://, gs://, gcs://, http://, https://$"):
        check_place("ftp://host/x")


def test_join() -> None:
    assert join("s3://bucket/set/", "shard-000000.tar") == "s3://bucket/set/shard-000000.tar"
    assert join("http://host/a", "b/c.tar") == "http://host/a/b/c.tar"


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "http://other/x",
        "a/../../b",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "x?y",
        "x#y",
        "%2e%2e/x",
        "a\\..\\b",
        "s3:x",
        "a\nb",
        "a::b",
    ],
)
def test_names_that_lead_elsewhere_are_refused(name) -> None:
    with pytest.raises(InputError, match="which is no file of that folder"):
        join("s3://bucket/set", name)


@given(st.text("./ab%:?#\\\n", max_size=8))
def test_whatever_join_takes_stays_in_the_folder(name) -> None:
    try:
        url = join("http://host/set", name)
    except InputError:
        return
    from yarl import URL

    path = URL(url).path
    assert path.startswith("/set/")
    assert os.path.normpath(path) == path
    assert str(URL(url)) == url


@pytest.mark.parametrize(
    ("field", "value"),
    [("limit_gb", 0.0), ("limit_gb", float("nan")), ("attempts", 0), ("timeout_s", -1.0), ("downloads", 0)],
)
def test_configuration_is_checked(field, value) -> None:
    with pytest.raises(InputError, match=rf"^data\.cache\.{field} must be"):
        CacheConfig(**{field: value})


def test_the_folder_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("ECGSCALE_CACHE", raising=False)
    assert CacheConfig().place == Path.home() / ".cache" / "ecgscale"
    monkeypatch.setenv("ECGSCALE_CACHE", "/scratch/cache")
    assert CacheConfig().place == Path("/scratch/cache")
    assert CacheConfig(folder="~/here").place == Path.home() / "here"
