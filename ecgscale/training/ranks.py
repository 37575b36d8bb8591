"""The processes of a job: joining them, and agreeing on what went wrong."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from ecgscale import progress
from ecgscale.errors import InputError, MachineError, RankError, system_error
from ecgscale.training.environment import MEETING_TIMEOUT_S, NODES


class Ranks(NamedTuple):
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_ranks() -> Ranks:
    """Join the processes of the job over NCCL or gloo: those of torchrun or ecgscale-launch, or this one alone.

    Raises InputError where the environment tells of several processes but not which one this is, or where a machine
    has fewer GPUs than processes; RankError that names the ranks that have not come in time.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise InputError("SLURM_NTASKS tells of several tasks but RANK is not set; start with torchrun")
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise InputError(f"RANK is set but {missing[0]} is not; start with torchrun or ecgscale-launch")
    device = _device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(rank, world_size), rank=rank, world_size=world_size)
        progress.at(0, "start-up")
        atexit.register(_leave)  # not sooner: DeepSpeed holds on to the group
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _store(rank: int, world_size: int) -> Store:
    """The store by which the ranks find each other, when all have come; RankError that names those who have not."""
    if "MASTER_PORT" not in os.environ:
        if world_size > 1:
            raise InputError("RANK is set but MASTER_PORT is not; start with torchrun or ecgscale-launch")
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=float(os.environ.get(MEETING_TIMEOUT_S, "300")))
    torchrun_has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks
    first = rank == 0
    try:
        master = first and not torchrun_has_one
        tcp = TCPStore(address, port, world_size, master, timeout, wait_for_workers=False)
        store = PrefixStore(f"ecgscale/{attempt}", tcp)
        store.set(f"rank/{rank}", socket.gethostname())
        if first:
            _wait_for_all(store, world_size, timeout)
            store.set("all", "here")
        store.wait(["all"], timeout + timedelta(seconds=5))
    except dist.DistError as error:
        if first and not isinstance(error, dist.DistStoreError):
            raise RankError(f"rank 0 cannot open its meeting point {address}:{port}: {_first_line(error)}") from error
        raise RankError(f"rank {rank} lost or never found rank 0 at {address}:{port} within {timeout}") from error
    return store


def _wait_for_all(store: Store, world_size: int, timeout: timedelta) -> None:
    keys = [f"rank/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RankError(f"after {timeout.total_seconds():g} s {_named(missing, world_size)} missing") from error


def _named(ranks: list[int], world_size: int) -> str:
    """``rank 3 (n2) is`` or ``ranks 2 (n2), 3 (n2) are``; the first ten of many."""
    nodes = os.environ.get(NODES, "").split(",")
    where = [nodes[rank * len(nodes) // world_size] for rank in ranks]
    shown = [f"{rank} ({node})" if node else f"{rank}" for rank, node in zip(ranks, where, strict=True)]
    listed = ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
    return f"ranks {listed} are" if len(ranks) > 1 else f"rank {listed} is"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _leave() -> None:
    """Leave together: a process that is still at it can be aborted by the connection of one that has gone.

    Not after an error: the others may be in the midst of something that never ends without this rank.
    """
    if progress.now().phase:
        return
    if dist.get_backend() == "gloo" and dist.get_world_size() > 1:
        with suppress(RuntimeError):  # a rank that failed is not waited for
            dist.monitored_barrier(timeout=timedelta(seconds=5))
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"LOCAL_RANK {local_rank}, but this machine shows {torch.cuda.device_count()} GPUs; "
            "start one process per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)
    exact_fp32()
    return torch.device("cuda", local_rank)


def exact_fp32() -> None:
    """fp32 convolutions of this process without TF32, as PyTorch's fp32 products are by default; where a program has
    asked for TF32 in products, by `torch.set_float32_matmul_precision`, both have it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"


_Told = InputError | MachineError | RankError


def all_succeed(error: _Told | None) -> None:
    """Raise the same error on every rank where any rank has one to tell. All ranks call it together."""
    errors: list[tuple[str, type[_Told]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else (str(error), type(error)))
    told = next((error for error in errors if error is not None), None)
    if told is not None:
        raise told[1](told[0])


def first_rank(ranks: Ranks, action: Callable[[], object]) -> None:
    """Do something on the first rank; where it fails, every rank raises its error."""
    error: _Told | None = None
    if ranks.first:
        try:
            action()
        except (InputError, MachineError, RankError) as failure:
            error = failure
        except OSError as failure:
            error = system_error(failure)
    all_succeed(error)


def log(ranks: Ranks, line: str) -> None:
    """One line for the person at the terminal, from one rank."""
    if ranks.first:
        print(line, file=sys.stderr, flush=True)
