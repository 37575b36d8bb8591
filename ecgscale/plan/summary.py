"""A plan: the ways to run, the one that is recommended, and what it takes: days, energy, storage, failures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Literal, cast

import numpy as np

from ecgscale.config import PretrainConfig
from ecgscale.cost import parameters
from ecgscale.data.order import default_lanes
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.objectives import OBJECTIVES
from ecgscale.plan.candidates import (
    Candidate,
    best,
    candidate,
    candidates,
    check_batch,
    possible,
    refuse,
    samples_of,
    usual_stage,
)
from ecgscale.plan.cluster import Cluster
from ecgscale.plan.config import PlanConfig
from ecgscale.plan.failures import daly_interval_s, effective_share, simulated_share, young_interval_s
from ecgscale.plan.memory import MOMENTS
from ecgscale.plan.network import collective_s

MOST_GPUS = 4096
LONGEST_INTERVAL_S = 1800.0
DECODE_S_PER_BYTE = 80e-6 / 60_000
"""Of one core, for each byte of int16 samples: measured by `ecgscale bench stream` (docs/stream.md)."""
_SIMULATED_FAILURES = 100_000


@dataclass(frozen=True)
class Length:
    """How long the run is, and what it reads."""

    recordings: int
    rate_hz: float
    steps: int
    epochs: float
    stored_bytes: float
    """Of one recording."""
    plain_bytes: float
    """Of its int16 samples."""


@dataclass(frozen=True)
class Traffic:
    """Checkpoints and recordings."""

    checkpoint_bytes: int
    """fp32 weights and both moments."""
    save_s: float
    """Until training goes on."""
    read_bytes_per_s: float
    """Of all nodes together."""
    loader_cores_per_node: float
    """That decode recordings, if nothing else."""


@dataclass(frozen=True)
class Survival:
    """What failures cost."""

    between_failures_s: float
    young_s: float
    daly_s: float
    interval_s: float
    """Of the two what the config has: Daly's, half an hour at most. Training between two checkpoints."""
    effective: float
    """Share of the time that is training which is kept, with the config's interval."""
    simulated: float
    """The same by drawing failures."""


@dataclass(frozen=True)
class Scaled:
    """The recommended way on another number of GPUs."""

    gpus: int
    global_batch: int
    step_s: float
    communication_s: float
    efficiency: float
    """Recordings per second and GPU over those of one machine."""
    same_batch_step_s: float | None
    """With the global batch of the config instead, where it can be shared."""
    peak_bytes: int
    """Of a GPU."""
    fits: bool
    survival: Survival
    recordings_per_s: float
    """Those of lost time not counted."""


@dataclass(frozen=True)
class Plan:
    """What `ecgscale plan` says."""

    config: PlanConfig
    cluster: Cluster
    length: Length
    parameters: int
    ways: list[Candidate]
    chosen: Candidate
    storage: Traffic
    survival: Survival
    scaled: list[Scaled]

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the peak would do in a step; None where no peak is known."""
        peak = self.cluster.peak_flops
        return self.chosen.step.flops / self.chosen.step.total / peak if peak else None

    @property
    def hours(self) -> float:
        """From begin to end, failures and saving included."""
        return self.length.steps * self.chosen.step.total / self.survival.effective / 3600

    @property
    def kwh(self) -> float | None:
        """Of the building; None where the power of a device is not known."""
        if not self.cluster.watts:
            return None
        config = self.cluster.config
        watts = (self.cluster.watts + config.host_watts) * config.pue
        return self.hours * self.cluster.gpus * watts / 1000

    def pretraining(self) -> PretrainConfig:
        """The recommended config. Checkpoints come by the clock, as rates are no more than predicted."""
        layers, contrast = self.chosen.checkpointed_layers, self.config.train.contrast
        engine = replace(
            self.config.engine,
            zero_stage=cast(Literal[0, 1, 2, 3], self.chosen.zero_stage),
            activation_checkpointing=layers >= self.config.model.depth or layers,
        )
        gpus = self.cluster.gpus
        lanes = self.config.train.lanes
        if not lanes and default_lanes(contrast) % gpus:
            lanes = gpus
        train = replace(
            self.config.train,
            steps=self.length.steps,
            lanes=lanes,
            checkpoint_every=self.config.train.keep_every or self.length.steps,
            checkpoint_every_s=round(self.survival.interval_s),
        )
        whole = self.config
        return PretrainConfig(whole.data, whole.init, whole.model, whole.objective, engine, train, whole.run)

    def tree(self) -> dict[str, Any]:
        """For programs: seconds, bytes, FLOP/s."""
        return {
            "given": asdict(self.config),
            "pretraining": asdict(self.pretraining()),
            "cluster": asdict(self.cluster),
            "length": asdict(self.length),
            "parameters": self.parameters,
            "ways": [_way(one) for one in self.ways],
            "recommended": _way(self.chosen) | {"mfu": self.mfu},
            "storage": asdict(self.storage),
            "survival": asdict(self.survival),
            "hours": self.hours,
            "gpu_hours": self.hours * self.cluster.gpus,
            "kwh": self.kwh,
            "scaled": [asdict(one) for one in self.scaled],
        }


def _way(one: Candidate) -> dict[str, Any]:
    return asdict(one) | {
        "fits": one.fits,
        "peak_bytes": one.memory.peak,
        "step_s": None if one.offload else one.step.total,
    }


def make_plan(config: PlanConfig, cluster: Cluster) -> Plan:
    """Raises InputError where the config cannot be run on the cluster: what is wrong, by how much, and what would be
    right."""
    length = _length(config)
    OBJECTIVES.find(config.objective.name).check(config.model, config.objective, config.data, length.rate_hz)
    check_batch(config, cluster.gpus)
    samples = samples_of(config, length.rate_hz)
    ways = candidates(config, cluster, samples)
    chosen = best(ways, usual_stage(config, cluster.gpus))
    if chosen is None:
        refuse(config, cluster, samples, ways)
    n = sum(parameters(config.model, config.objective).values())
    trained = sum(parameters(config.model, config.objective, trained=True).values())
    storage = _storage(config, cluster, chosen, length, n, trained)
    survival = survival_of(cluster, storage.save_s)
    if not survival.effective:
        raise InputError(
            f"cluster.mtbf_hours {cluster.config.mtbf_hours:g}: with a failure every "
            f"{survival.between_failures_s:.3g} s, {cluster.config.restart_s:g} s to restart and "
            f"{storage.save_s:.3g} s to save, the run never reaches its next checkpoint"
        )
    scaled = _scaled(config, cluster, chosen, samples, length, n)
    return Plan(config, cluster, length, n, ways, chosen, storage, survival, scaled)


def _length(config: PlanConfig) -> Length:
    """From data.shards, or as given."""
    given, batch = config.length, config.train.global_batch
    recordings, rate_hz = given.recordings, given.rate_hz
    plain = len(LEADS) * given.record_s * rate_hz * 2
    stored = plain * given.compressed
    if config.data.shards:
        shards = ShardSet.open(config.data.shards, config.data.cache)
        selection = Selection(shards, config.data, "train")
        selection.refuse_empty()
        recordings, rate_hz = recordings or len(selection), shards.rate_hz
        samples = shards.column("samples").astype(np.int64)
        plain = 2 * float((np.bitwise_count(shards.column("leads")) * samples).sum()) / len(shards)
        stored = sum(shard.bytes for shard in shards.shards) / len(shards)
    if given.epochs and not recordings:
        raise InputError(f"length.epochs {given.epochs:g}: give length.recordings or data.shards too")
    if recordings and recordings < batch:
        raise InputError(f"train.global_batch {batch}: more than the {recordings} recordings; give at most so many")
    a_pass = recordings // batch
    steps = ceil(given.epochs * a_pass) if given.epochs else config.train.steps
    epochs = steps / a_pass if a_pass else 0.0
    return Length(recordings, rate_hz, steps, epochs, stored, plain)


def _storage(config: PlanConfig, cluster: Cluster, chosen: Candidate, length: Length, n: int, trained: int) -> Traffic:
    size = 4 * (n + MOMENTS * trained)
    rate = config.train.global_batch / chosen.step.total
    cores = rate * length.plain_bytes * DECODE_S_PER_BYTE / cluster.config.nodes
    return Traffic(size, save_s(cluster, chosen.zero_stage, n), rate * length.stored_bytes, cores)


def save_s(cluster: Cluster, zero_stage: int, n: int) -> float:
    """Seconds of a checkpoint: tensors are gathered by name, written and hashed by all, verified by the first rank."""
    size = (1 + MOMENTS) * 4 * n
    config = cluster.config
    gathered = (1 + MOMENTS) * collective_s("all-reduce", 4 * n, cluster.network) if zero_stage else 0.0
    hashed = size / cluster.gpus + size
    return gathered + size / (config.storage_gb_per_s * 1e9) + hashed / (config.hash_gb_per_s * 1e9)


def survival_of(cluster: Cluster, saving_s: float) -> Survival:
    """With checkpoints at Daly's interval, half an hour at most."""
    config = cluster.config
    between_s = config.mtbf_hours * 3600 / cluster.gpus
    daly_s = daly_interval_s(saving_s, between_s)
    interval_s = min(daly_s, LONGEST_INTERVAL_S)
    effective = effective_share(interval_s, saving_s, config.restart_s, between_s)
    simulated = simulated_share(interval_s, saving_s, config.restart_s, between_s, _SIMULATED_FAILURES, seed=0)
    return Survival(between_s, young_interval_s(saving_s, between_s), daly_s, interval_s, effective, simulated)


def _scaled(
    config: PlanConfig, cluster: Cluster, chosen: Candidate, samples: int, length: Length, n: int
) -> list[Scaled]:
    """The recommended way on 1, 2, 4 … machines, each GPU with as many recordings as on the cluster; not for a CPU."""
    if cluster.kind == "cpu":
        return []
    train = config.train
    found: list[Scaled] = []
    nodes = 1
    while nodes * cluster.config.gpus_per_node <= MOST_GPUS:
        other = cluster.of_nodes(nodes)
        contrast = train.contrast // cluster.gpus * other.gpus
        batch = contrast * train.accumulation
        larger = replace(config, train=replace(train, global_batch=batch, contrast_batch=contrast, lanes=0))
        way = candidate(larger, other, samples, chosen.zero_stage, chosen.checkpointed_layers)
        step = way.step
        survival = survival_of(other, save_s(other, chosen.zero_stage, n))
        each = batch / step.total / other.gpus
        first = found[0].global_batch / found[0].step_s / found[0].gpus if found else each
        kept = batch / step.total * survival.effective
        same = None
        if train.contrast % other.gpus == 0:
            same = candidate(config, other, samples, chosen.zero_stage, chosen.checkpointed_layers).step.total
        found.append(
            Scaled(
                gpus=other.gpus,
                global_batch=batch,
                step_s=step.total,
                communication_s=step.communication,
                efficiency=each / first,
                same_batch_step_s=same,
                peak_bytes=way.memory.peak,
                fits=way.fits and possible(config, chosen.zero_stage, other.gpus),
                survival=survival,
                recordings_per_s=kept,
            )
        )
        nodes *= 2
    return found
