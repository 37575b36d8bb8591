"""What is sent between ranks in a step, and how long that takes: the alpha-beta model, ring by ring.

A message of m bytes takes alpha + m / beta. Between GPUs of a machine each GPU has a link of its own; between machines
the GPUs of a machine share its adapters. Nothing overlaps with computing: DeepSpeed runs with `overlap_comm` off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from ecgscale.cost import Costs
from ecgscale.plan.memory import LIVE, Parallel
from ecgscale.training.engine import BUCKET

Kind = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Network:
    """Links between ``gpus`` of each of ``nodes`` machines: seconds, and bytes/s that collectives reach."""

    nodes: int
    gpus: int
    link_latency_s: float
    link_bytes_per_s: float
    node_latency_s: float
    node_bytes_per_s: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step."""

    kind: Kind
    what: str
    calls: int
    bytes: int
    """Of all calls together: the whole tensor, as every rank has it before or behind."""

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, in a ring."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (ranks - 1) / ranks


def collective_s(kind: Kind, size: float, network: Network) -> float:
    """Seconds of one collective over all ranks, of a tensor of ``size`` bytes, by machines and then within them.

    An all-reduce of g GPUs on each of n machines is a reduce-scatter within machines, n-rank all-reduces of the g parts
    side by side, and an all-gather. Between machines it is a ring or, where that is shorter, a binary tree.
    """
    within = _ring_s(size, network.gpus, network.link_latency_s, network.link_bytes_per_s)
    between = _ring_s(size, network.nodes, network.node_latency_s, network.node_bytes_per_s)
    if kind != "all-reduce":
        return within + between
    hops = ceil(log2(network.nodes)) if network.nodes > 1 else 0
    tree = 2 * hops * network.node_latency_s + (2 * size / network.node_bytes_per_s if hops else 0.0)
    return 2 * within + min(2 * between, tree)


def _ring_s(size: float, ranks: int, latency_s: float, bytes_per_s: float) -> float:
    """Reduce-scatter or all-gather: ranks − 1 turns of a part each."""
    return (ranks - 1) * (latency_s + size / ranks / bytes_per_s)


def collectives_of(costs: Costs, parallel: Parallel, rows: int) -> list[Collective]:
    """What DeepSpeed 0.19.8 and the objective send in one step of ``rows`` segments on each rank.

    Its stages 1 and 2 reduce the gradient of each bucket to all ranks, though each needs its share only: 3 n e bytes
    pass instead of 2 n e. Stage 2 does so in every micro-step. Stage 3 gathers the weights in both passes of each
    micro-step, but for those that stay gathered.
    """
    if parallel.world_size == 1:
        return []
    sizes = costs.sizes
    n, element, micro = sum(sizes), parallel.element, parallel.accumulation
    buckets = ceil(n / BUCKET)
    collectives: list[Collective] = []
    if parallel.zero_stage <= 2:
        times = micro if parallel.zero_stage == 2 else 1
        collectives.append(Collective("all-reduce", "gradients", times * buckets, times * n * element))
    if parallel.zero_stage in (1, 2):
        collectives.append(Collective("all-gather", "weights", 1, n * element))
    if parallel.zero_stage == 3:
        large = [size for size in (*sizes, *costs.frozen) if size >= parallel.whole_below]
        passes = 2 if sum(large) > LIVE else 1
        gathered = micro * passes * sum(large) * element
        if large:
            collectives.append(Collective("all-gather", "weights", micro * passes * len(large), gathered))
        collectives.append(Collective("reduce-scatter", "gradients", micro * max(buckets, 1), micro * n * element))
        small = sum(size for size in sizes if size < parallel.whole_below)
        collectives.append(Collective("all-gather", "small weights", 1, small * element))
    # Few bytes, but each of these waits for all ranks.
    collectives += [
        Collective(one.kind, "objective", micro, micro * one.bytes) for one in costs.sent(rows, parallel.world_size)
    ]
    return collectives


def communication_s(collectives: Sequence[Collective], network: Network) -> float:
    """Seconds of all of them, one after the other."""
    if network.ranks == 1:
        return 0.0
    return sum(one.calls * collective_s(one.kind, one.bytes / one.calls, network) for one in collectives)
