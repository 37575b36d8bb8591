"""What is measured of steps: throughput, MFU, shares of the time, memory, stragglers. docs/steps.md names all.

Shape suffixes: W ranks.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ecgscale.training.clock import PARTS
from ecgscale.training.devices import Arithmetic, peak_flops
from ecgscale.training.engine import EngineConfig
from ecgscale.training.ranks import Ranks

OfRanks = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What a step amounts to."""

    recordings: int
    """Of all ranks."""
    segments: int
    """Of all ranks."""
    tokens: int
    """Of all ranks, in front of the transformer; padding and masked ones count."""
    flops: float = 0.0
    """Model FLOPs of one rank, forward and backward, without what is recomputed; 0: unknown."""
    peak_flops: float | None = None
    """Of one device in the precision that is trained in; None: unknown."""


class Straggler(NamedTuple):
    """The rank that keeps the others waiting."""

    rank: int
    slowdown: float  # its own time as a multiple of the median rank's
    part: str  # in which it loses most


def device_peak(config: EngineConfig, device: torch.device) -> float | None:
    """Peak FLOP/s: `engine.peak_tflops`, or by the table for a known GPU; None for others and for CPUs."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    tf32 = config.precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision: Arithmetic = "tf32" if tf32 else config.precision
    return peak_flops(torch.cuda.get_device_name(device), precision)


def throughput(work: Work, steps: int, elapsed_s: float, world_size: int) -> dict[str, float]:
    """Scalars of so many steps in so many seconds."""
    step_s = elapsed_s / steps
    amounts = {"ecg": work.recordings, "segments": work.segments, "tokens": work.tokens}
    rates = {f"throughput/{what}_per_s": amount / step_s for what, amount in amounts.items()}
    rates |= {f"{name}_per_device": rate / world_size for name, rate in rates.items()}
    if work.flops:
        rates["throughput/tflops_per_device"] = work.flops / step_s / 1e12
        if work.peak_flops:
            rates["throughput/mfu"] = work.flops / step_s / work.peak_flops
    return rates


def shares(part_W: Mapping[str, OfRanks]) -> dict[str, float]:
    """Share of all ranks' time that each part takes; they add up to 1."""
    total = sum(float(part_W[part].sum()) for part in PARTS)
    return {f"step/{part}_share": float(part_W[part].sum()) / total for part in PARTS}


def straggler(part_W: Mapping[str, OfRanks], steps: int) -> tuple[Straggler, dict[str, float]]:
    """Who is slowest without the time inside collectives, in which the others wait for it; with its scalars."""
    own = [part for part in PARTS if part != "communication"]
    own_W = np.sum([part_W[part] for part in own], axis=0)
    slowest, median_s = int(own_W.argmax()), float(np.median(own_W))
    slowdown = float(own_W[slowest]) / median_s
    lost = {part: float(part_W[part][slowest] - np.median(part_W[part])) for part in own}
    scalars = {
        "straggler/slowest_s": float(own_W[slowest]) / steps,
        "straggler/median_s": median_s / steps,
        "straggler/slowdown": slowdown,
        "straggler/rank": float(slowest),
    }
    return Straggler(slowest, slowdown, max(lost, key=lambda part: lost[part])), scalars


def memory(device: torch.device) -> dict[str, float]:
    """Gigabytes (1e9 bytes) that this process holds now and has held at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held = {"host_rss": _process().memory_info().rss, "host_peak": most}
    if device.type == "cuda":
        held["device_allocated"] = torch.cuda.memory_allocated(device)
        held["device_reserved"] = torch.cuda.memory_reserved(device)
        held["device_peak"] = torch.cuda.max_memory_allocated(device)
    return {f"memory/{name}_gb": count / 1e9 for name, count in held.items()}


@cache
def _process() -> psutil.Process:
    return psutil.Process()


def gather_over_ranks(parts: Mapping[str, Tensor], values: Mapping[str, float], ranks: Ranks) -> dict[str, OfRanks]:
    """(W,) of each scalar, of tensors on the device and of plain numbers, in one all-gather. All ranks call it."""
    own = torch.tensor(list(values.values()), dtype=torch.float64).to(ranks.device)
    own = torch.cat([own, *(part.detach().double().reshape(1) for part in parts.values())])
    of_ranks = [own]
    if ranks.world_size > 1:
        of_ranks = [torch.empty_like(own) for _ in range(ranks.world_size)]
        dist.all_gather(of_ranks, own)
    gathered = torch.stack(of_ranks, dim=1).cpu().numpy()
    return dict(zip([*values, *parts], gathered, strict=True))
