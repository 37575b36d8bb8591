"""Every way to run a config on a cluster, with its memory and its time; which of them is best, and why none fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import NoReturn

from ecgscale.cost import costs_of, parameters
from ecgscale.data.order import check_world_size
from ecgscale.errors import InputError
from ecgscale.objectives import OBJECTIVES
from ecgscale.plan.cluster import Cluster
from ecgscale.plan.config import PlanConfig
from ecgscale.plan.memory import Memory, Parallel, memory_of
from ecgscale.plan.network import collectives_of, communication_s
from ecgscale.plan.speed import micro_step, update_s
from ecgscale.training.loop import TrainConfig

_MOST_ROWS = 1 << 16
_STAGES = (0, 1, 2, 3)
_NEARLY = 1.03


@dataclass(frozen=True)
class Step:
    """Seconds of one step of the slowest rank."""

    compute: float
    recompute: float
    """Of that, layers that are done again."""
    update: float
    communication: float
    waiting: float
    """For the slowest rank."""
    sent_bytes: float
    """That each rank sends."""
    flops: int
    """Model FLOPs of one rank."""

    @property
    def total(self) -> float:
        return self.compute + self.update + self.communication + self.waiting


@dataclass(frozen=True)
class Candidate:
    """One way to run a config."""

    zero_stage: int
    checkpointed_layers: int
    offload: bool
    rows: int
    """Segments of one rank in a micro-step."""
    accumulation: int
    """Micro-steps of a step."""
    memory: Memory
    limit: float
    """Bytes of a GPU for tensors."""
    largest_rows: int
    """Segments of one rank in a micro-step that would fit; 0: not even two."""
    step: Step

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit

    @property
    def lacks(self) -> float:
        """Bytes."""
        return self.memory.peak - self.limit


def samples_of(config: PlanConfig, rate_hz: float) -> int:
    """Of one segment."""
    return round(config.data.segment_s * rate_hz)


def check_batch(config: PlanConfig, gpus: int) -> None:
    """Raises InputError where the recordings of a micro-step, or the lanes of the order, cannot be shared out."""
    contrast, lanes = config.train.contrast, config.train.lanes
    if lanes:
        check_world_size(gpus, lanes)
        if contrast % lanes:
            raise InputError(f"train.lanes {lanes} does not divide the contrast batch of {contrast}")
    if contrast % gpus:
        raise InputError(
            f"train.contrast_batch {contrast}: {gpus} GPUs cannot share so many recordings evenly; give a multiple of "
            f"{gpus}, such as {-(-contrast // gpus) * gpus}, and train.global_batch a multiple of that, or another "
            "cluster.nodes"
        )


def candidate(
    config: PlanConfig,
    cluster: Cluster,
    samples: int,
    zero_stage: int,
    checkpointed_layers: int,
    offload: bool = False,
) -> Candidate:
    """Memory and time of one way. The contrast batch is kept: it is part of the method."""
    train, engine, gpus = config.train, config.engine, cluster.gpus
    costs = costs_of(config.model, config.objective, samples)
    segments = OBJECTIVES.find(config.objective.name).segments
    rows = segments * train.contrast // gpus
    parallel = Parallel(
        zero_stage, gpus, engine.precision, cluster.kind, engine.whole_below, train.accumulation, offload
    )

    def fits(pairs: int) -> bool:
        return memory_of(costs, parallel, segments * pairs, checkpointed_layers).peak <= cluster.memory_bytes

    done = micro_step(costs, parallel, cluster.rates, rows, checkpointed_layers)
    collectives = collectives_of(costs, parallel, rows)
    updating = update_s(costs.sizes, parallel, cluster.rates)
    busy = train.accumulation * done.total + updating
    step = Step(
        compute=train.accumulation * done.total,
        recompute=train.accumulation * done.recompute,
        update=updating,
        communication=communication_s(collectives, cluster.network),
        # The largest of W normal deviates is about sqrt(2 ln W) deviations above their mean.
        waiting=busy * cluster.config.jitter * sqrt(2 * log(gpus)),
        sent_bytes=sum(one.sent(gpus) for one in collectives),
        flops=train.accumulation * done.flops,
    )
    return Candidate(
        zero_stage,
        checkpointed_layers,
        offload,
        rows,
        train.accumulation,
        memory_of(costs, parallel, rows, checkpointed_layers),
        cluster.memory_bytes,
        segments * largest(fits, _MOST_ROWS // segments),
        step,
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones fit too; 0 where 1 does not."""
    return bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))


def candidates(config: PlanConfig, cluster: Cluster, samples: int) -> list[Candidate]:
    """Each ZeRO stage with no, with as few as fit and with all layers checkpointed; the same with offload."""
    stages = [stage for stage in _STAGES[: 4 if cluster.gpus > 1 else 2] if possible(config, stage, cluster.gpus)]
    found = []
    for offload in (False, True):
        for stage in stages[1:] if offload else stages:
            none, every = (
                candidate(config, cluster, samples, stage, layers, offload) for layers in (0, config.model.depth)
            )
            found.append(none)
            if not none.fits and every.fits and (fewest := _fewest_layers(config, cluster, samples, every)):
                found.append(fewest)
            found.append(every)
    return found


def possible(config: PlanConfig, zero_stage: int, gpus: int) -> bool:
    """Whether the engine takes a stage: 3 only uncompiled, and where every parameter has an element for each rank."""
    if zero_stage < 3:
        return True
    return not config.engine.compile and min(parameters(config.model, config.objective).values()) >= gpus


def _fewest_layers(config: PlanConfig, cluster: Cluster, samples: int, every: Candidate) -> Candidate | None:
    """With as few checkpointed layers as fit; None where that is all of them."""

    def tried(layers: int) -> Candidate:
        return candidate(config, cluster, samples, every.zero_stage, layers, every.offload)

    spared = largest(lambda spared: tried(config.model.depth - spared).fits, config.model.depth - 1)
    return tried(config.model.depth - spared) if spared else None


def best(found: list[Candidate], usual: int) -> Candidate | None:
    """Of those that fit and are nearly as fast as the fastest, stage ``usual``, else the lowest. None offloads."""
    fitting = [one for one in found if one.fits and not one.offload]
    if not fitting:
        return None
    fastest = min(one.step.total for one in fitting)
    near = [one for one in fitting if one.step.total <= _NEARLY * fastest]
    return min(near, key=lambda one: (one.zero_stage != usual, one.zero_stage, one.checkpointed_layers))


def usual_stage(config: PlanConfig, gpus: int) -> int:
    """ZeRO 1, but on one rank in fp32, where nothing is shared out and stage 0 has no buffer; see `speed.READ_S`."""
    return int(gpus > 1 or config.engine.precision == "bf16")


def rule(usual: int) -> str:
    """How `best` chooses, for people."""
    wanted = f"ZeRO {usual}, else the lowest stage" if usual else "the lowest stage"
    return f"of what fits and is within {_NEARLY - 1:.0%} of the fastest, {wanted}"


def refuse(config: PlanConfig, cluster: Cluster, samples: int, found: list[Candidate]) -> NoReturn:
    """Raises InputError that says by how much nothing fits, and what would."""
    least = min((one for one in found if not one.offload), key=lambda one: one.lacks)
    ways = list(_ways_out(config, cluster, samples))
    if ways:
        instead = f"what fits: {'; '.join(ways)}"
    elif cluster.kind == "cpu":
        instead = "nothing that was tried fits: take a smaller model, or more memory"
    else:
        instead = "nothing that was tried fits: more GPUs need a larger train.contrast_batch; or take a smaller model"
    raise InputError(
        f"model.preset {config.model.preset} with {least.rows} segments per {cluster.device} does not fit: it needs "
        f"{_gb(least.memory.peak)} at least (ZeRO {least.zero_stage}, {checkpointing(least, config)}), which is "
        f"{_gb(least.lacks)} more than the {_gb(cluster.memory_bytes)} that {cluster.config.device} has for tensors; "
        f"{instead}"
    )


def _ways_out(config: PlanConfig, cluster: Cluster, samples: int) -> Iterator[str]:
    """What would fit: smaller micro-steps, more machines with GPUs."""
    train, gpus = config.train, cluster.gpus
    for parts in range(2, train.global_batch // gpus + 1):
        if train.contrast % parts or not _shared_out(train, train.contrast // parts, gpus):
            continue
        smaller = replace(config, train=replace(train, contrast_batch=train.contrast // parts))
        if (found := best(candidates(smaller, cluster, samples), usual_stage(config, gpus))) is not None:
            yield (
                f"train.contrast_batch {smaller.train.contrast} (micro-steps of {found.rows} segments per "
                f"{cluster.device}, ZeRO {found.zero_stage}, {checkpointing(found, config)})"
            )
            break
    if cluster.kind == "cpu":
        return
    nodes = cluster.config.nodes
    while (nodes := nodes * 2) * cluster.config.gpus_per_node <= 4096:
        if not _shared_out(train, train.contrast, nodes * cluster.config.gpus_per_node):
            continue
        more = cluster.of_nodes(nodes)
        if (found := best(candidates(config, more, samples), usual_stage(config, more.gpus))) is not None:
            yield f"cluster.nodes {nodes} (ZeRO {found.zero_stage}, {checkpointing(found, config)})"
            break


def _shared_out(train: TrainConfig, contrast: int, gpus: int) -> bool:
    """Whether so many GPUs can share a contrast batch, in the lanes that are given if any are."""
    lanes = train.lanes or gpus
    return contrast % gpus == 0 and contrast % lanes == 0 and lanes % gpus == 0


def checkpointing(one: Candidate, config: PlanConfig) -> str:
    if not one.checkpointed_layers:
        return "no layer checkpointed"
    whole = one.checkpointed_layers >= config.model.depth
    return "all layers checkpointed" if whole else f"{one.checkpointed_layers} layers checkpointed"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
