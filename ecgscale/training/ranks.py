"""The processes of a job: joining them, and agreeing on what went wrong."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ecgscale.errors import InputError


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
    has fewer GPUs than processes.
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
        backend = "nccl" if device.type == "cuda" else "gloo"
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
            dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
        atexit.register(_leave)  # not sooner: DeepSpeed holds on to the group
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _leave() -> None:
    """Leave together: a process that is still at it can be aborted by the connection of one that has gone."""
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
    return torch.device("cuda", local_rank)


def all_succeed(error: str | None) -> None:
    """Raise the same InputError on every rank where any rank has an error to tell. All ranks call it together."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    told = next((one for one in errors if one is not None), None)
    if told is not None:
        raise InputError(told)


def first_rank(ranks: Ranks, action: Callable[[], object]) -> None:
    """Do something on the first rank; where it fails for the user or the disk, every rank raises InputError."""
    error = None
    if ranks.first:
        try:
            action()
        except (InputError, OSError) as failure:
            error = str(failure)
    all_succeed(error)


def log(ranks: Ranks, line: str) -> None:
    """One line for the person at the terminal, from one rank."""
    if ranks.first:
        print(line, file=sys.stderr, flush=True)
