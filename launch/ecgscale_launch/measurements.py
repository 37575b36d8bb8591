"""What a task of the doctor's checkup measures, each by itself: first alone, then with the others. Nothing is judged.

What may be missing or broken on a node (PyTorch, and what imports it) is imported by the functions themselves.
"""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecgscale.errors import one_line

if TYPE_CHECKING:
    import torch

SPEED_MB = 64
SHARD_RECORDS = 512  # read of each data set by each node
SHARD_LIMIT_S = 5.0
SMALL_MB, LARGE_MB, LARGE_MB_ON_CPU = 1, 64, 16  # all-reduced; gloo on a slow network is done within seconds
REPEATS = {SMALL_MB: 10, LARGE_MB: 3, LARGE_MB_ON_CPU: 3}
_VISIBLE_S = 20.0  # NFS shows a new file to other nodes after some seconds
_PEER_S = 60.0  # for another rank, which has begun the same check, to come as far
_CLOCK_S = 10.0  # for a node that has just answered to answer again
_PING_PONGS = 8
LATE_S = 240.0  # for another rank to be done with its disk and shards


@dataclass
class Task:
    """Where a task stands, and what it shall look at."""

    folder: Path
    shards: list[str]
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    store: Any = None  # when the ranks have met
    device: torch.device | None = None

    @property
    def of_node(self) -> bool:
        """Whether it is the one of its node that does what one per node suffices for."""
        return self.local_rank == 0


# -- alone -----------------------------------------------------------------------------------------------------------


def software(_: Task) -> dict[str, Any]:
    """Interpreter, versions, and where the code comes from."""
    import torch

    import ecgscale_launch
    from ecgscale_launch.job_record import versions

    found = versions()
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}  # type: ignore[no-untyped-call]
    return {"executable": sys.executable, "versions": found, "code": str(Path(ecgscale_launch.__file__).parents[1])}


def machine(_: Task) -> dict[str, Any]:
    """Cores, memory in bytes, limits and variables of this task."""
    import psutil

    memory = psutil.virtual_memory()
    given = int(os.environ.get("SLURM_MEM_PER_NODE", "0")) * 2**20
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory": min(memory.total, given or memory.total),
        "memory_available": memory.available,
        "open_files": _limit(resource.RLIMIT_NOFILE),
        "locked_memory": _limit(resource.RLIMIT_MEMLOCK),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("NCCL_", "GLOO_"))
        },
    }


def _limit(which: int) -> int | None:
    """The most that this process may raise a limit to; None: no limit."""
    most = resource.getrlimit(which)[1]
    return None if most == resource.RLIM_INFINITY else most


def gpus(task: Task) -> dict[str, Any]:
    """Names of the visible GPUs; does this task's multiply right, and what of its memory is free, in bytes."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if task.local_rank >= len(names):
        return {"names": names, "right": None, "free": None, "total": None}
    device = torch.device("cuda", task.local_rank)
    free, total = torch.cuda.mem_get_info(device)
    # Small whole numbers: their products and sums are exact in every precision that the GPU may choose.
    left, right = torch.randint(-2, 3, (2, 512, 512), generator=torch.Generator().manual_seed(task.rank)).unbind()
    product = left.float().to(device) @ right.float().to(device)
    same = torch.equal(product.cpu().long(), left @ right)
    return {"names": names, "right": same, "free": free, "total": total}


def disk(task: Task) -> dict[str, Any] | None:
    """MB/s of writing to the run folder, down to the disk, and of reading back; its free space in bytes."""
    if not task.of_node:
        return None
    path, block = task.folder / f"speed-{task.rank}.bin", secrets.token_bytes(10**6)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(SPEED_MB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        _forget(path)
        opened = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(10**6):
                pass
        read_s = time.perf_counter() - opened
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(task.folder).free
    return {"write_mb_per_s": SPEED_MB / (written - began), "read_mb_per_s": SPEED_MB / read_s, "free": free}


def _forget(path: Path) -> None:
    """Drop a file from this node's cache: the storage is to be measured, not the memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shards(task: Task) -> dict[str, Any] | None:
    """Of each data set: the speed of reading, in MB/s of stored bytes and in records/s, or why it cannot be read."""
    if not task.of_node or not task.shards:
        return None
    from ecgscale.errors import InputError

    found = []
    for place in task.shards:
        try:
            found.append({"place": place} | _read(place, task))
        except InputError as error:
            found.append({"place": place, "error": one_line(str(error))})
    return {"sets": found}


def _read(place: str, task: Task) -> dict[str, Any]:
    """Each node begins elsewhere in the set, as in training."""
    import numpy as np

    from ecgscale.data.remote import is_remote
    from ecgscale.data.shard_set import ShardSet

    opening = time.perf_counter()
    opened = ShardSet.open(place)
    first = len(opened) * task.rank // task.world_size
    number_R = np.sort((first + np.arange(min(SHARD_RECORDS, len(opened)))) % len(opened))
    if not is_remote(place):
        for shard in set(opened.shard_of(number_R).tolist()):
            _forget(Path(opened.shards[shard].place))
    length_R, samples_R = (opened.take(name, number_R).tolist() for name in ("length", "samples"))
    began, count = time.perf_counter(), 0
    for count, _ in enumerate(opened.windows(number_R, [0] * len(number_R), samples_R), 1):  # noqa: B007
        if time.perf_counter() - began > SHARD_LIMIT_S:
            break
    seconds = time.perf_counter() - began
    speed = {"records_per_s": count / seconds, "mb_per_s": sum(length_R[:count]) / 1e6 / seconds}
    return {"records": len(opened), "read": count, "open_s": began - opening} | speed


# -- together --------------------------------------------------------------------------------------------------------


def meeting(task: Task) -> dict[str, Any]:
    """All ranks find each other, as in training; the seconds that it took."""
    import torch.distributed as dist

    from ecgscale.training.ranks import start_ranks

    began = time.perf_counter()
    task.device = start_ranks().device
    seconds = time.perf_counter() - began
    task.store = dist.PrefixStore("checkup", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    return {"seconds": seconds, "address": os.environ["MASTER_ADDR"], "backend": dist.get_backend()}


def shared_folder(task: Task) -> dict[str, Any]:
    """Who does not see what others write: rank 0 looks for all files, each other rank for that of rank 0."""
    own, written = secrets.token_hex(8), ""
    try:
        (task.folder / f"shared-{task.rank}").write_text(own)
        written = own
    finally:
        task.store.set(f"shared/{task.rank}", written)  # the others wait for it
    others = range(1, task.world_size) if task.rank == 0 else [0]
    _wait(task, [f"shared/{rank}" for rank in others])
    token_of = {rank: task.store.get(f"shared/{rank}").decode() for rank in others}
    began = time.monotonic()
    unseen = [rank for rank, token in token_of.items() if not _sees(task.folder / f"shared-{rank}", token, began)]
    return {"seconds": time.monotonic() - began, "unseen": unseen}


def _sees(path: Path, token: str, began: float) -> bool:
    while token:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() - began > _VISIBLE_S:
            return False
        time.sleep(0.05)
    return False


def clocks(task: Task) -> dict[str, Any] | None:
    """How far the node's clock is ahead of rank 0's, in seconds, and how far that may be off."""
    if task.rank == 0:
        _tell_time(task)
        return {"ahead_s": 0.0, "plus_minus_s": 0.0}
    if not task.of_node:
        return None
    ahead_s, round_trip_s = 0.0, float("inf")
    for i in range(_PING_PONGS):
        key, asked = f"clock/{task.rank}/{i}", time.time()
        task.store.set(f"{key}/ask", "")
        _wait(task, [f"{key}/answer"])
        answered = time.time()
        if answered - asked < round_trip_s:
            round_trip_s = answered - asked
            ahead_s = (asked + answered) / 2 - float(task.store.get(f"{key}/answer"))
    return {"ahead_s": ahead_s, "plus_minus_s": round_trip_s / 2}


def _tell_time(task: Task) -> None:
    from torch.distributed import DistError

    for rank in range(task.local_world_size, task.world_size, task.local_world_size):
        try:
            for i in range(_PING_PONGS):
                _wait(task, [f"clock/{rank}/{i}/ask"], _CLOCK_S)
                task.store.set(f"clock/{rank}/{i}/answer", repr(time.time()))
        except DistError:  # that node's own report lacks its clock
            continue


def all_reduce(task: Task) -> dict[str, Any] | None:
    """Bus bandwidth in GB/s, as NCCL's tests count it: 2 (n - 1) / n of the bytes per second; and is the sum right."""
    if task.world_size == 1:
        return None
    import torch

    task.store.set(f"ready/{task.rank}", "")
    _wait(task, [f"ready/{rank}" for rank in range(task.world_size)], LATE_S)
    assert task.device is not None
    large = LARGE_MB if task.device.type == "cuda" else LARGE_MB_ON_CPU
    pattern = torch.arange(large * 250_000, device=task.device) % 8  # whole numbers, whose sums are exact
    sizes, right = [], True
    for mb in (SMALL_MB, large):
        part = pattern[: mb * 250_000].float()
        seconds, total = _timed_sums(part * (task.rank + 1), REPEATS[mb])
        right &= torch.equal(total, part * (task.world_size * (task.world_size + 1) // 2))
        bus_bytes = 2 * (task.world_size - 1) / task.world_size * mb * 1e6
        sizes.append({"mb": mb, "gb_per_s": bus_bytes / seconds / 1e9})
    return {"sizes": sizes, "right": right}


def _timed_sums(own: torch.Tensor, repeats: int) -> tuple[float, torch.Tensor]:
    """Seconds of one all-reduce in the median, the first one left out, and the sum."""
    import torch
    import torch.distributed as dist

    total, taken = own, []
    for _ in range(1 + repeats):
        total = own.clone()
        if own.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(total)
        if own.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[repeats // 2], total


def _wait(task: Task, keys: list[str], limit_s: float = _PEER_S) -> None:
    from datetime import timedelta

    task.store.wait(keys, timedelta(seconds=limit_s))
