"""How a run begins, or goes on from its newest checkpoint; and what a checkpoint says of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from ecgscale.errors import InputError
from ecgscale.provenance import versions
from ecgscale.run_folder import empty_checkpoints
from ecgscale.training import checkpoint
from ecgscale.training.checkpoint import Checkpoint
from ecgscale.training.engine import Engine
from ecgscale.training.following import Standing
from ecgscale.training.job import Job
from ecgscale.training.ranks import Ranks, log
from ecgscale.training.schedule import falls

_VERSIONS_OF = ("ecgscale", "torch", "deepspeed")


class Beginning(NamedTuple):
    """What a start of a run has to work with."""

    engine: Engine
    standing: Standing
    anew: bool
    """Whether there was no checkpoint to go on from."""


def begin(job: Job, ranks: Ranks) -> Beginning:
    """The engine with the newest checkpoint's state, if there is one. All ranks call it together.

    Raises InputError where that is not of this model and this data.
    """
    for empty in empty_checkpoints(job.checkpoints):
        log(ranks, f"{empty}: empty, so it is passed over; remove it")
    resumed = checkpoint.latest(job.checkpoints)
    micro_rows = job.train.contrast // ranks.world_size
    if resumed is None:
        engine = Engine(job.objective, job.engine, ranks, job.train.accumulation, micro_rows)
        return Beginning(engine, Standing(), anew=True)
    if resumed.state.get("data") != job.identity:
        raise InputError(
            f"{resumed.folder}: was trained on other data than data.shards now names; take another run.dir"
        )
    resumed.check_fits(job.objective)
    state = resumed.module_state()
    engine = Engine(job.objective, job.engine, ranks, job.train.accumulation, micro_rows, state)
    engine.set_optimizer(resumed.reader(), resumed.optimizer())
    for line in _told(job, resumed):
        log(ranks, line)
    return Beginning(engine, Standing.of(resumed.state), anew=False)


def state_of(job: Job, engine: Engine, standing: Standing) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint says beside its step, for ``begin`` to go on from."""
    return {
        "validation_due": standing.validation_due,
        "position": standing.step * job.train.global_batch,
        "skipped": standing.skipped,
        "skipped_in_a_row": standing.skipped_in_a_row,
        "optimizer_steps": standing.updates,
        "optimizer": asdict(engine.optimizer_state()),
        "data": job.identity,
        "config": job.config,
        "about": job.about,
        "world_size": engine.ranks.world_size,
        "versions": versions(_VERSIONS_OF),
    }


def _told(job: Job, resumed: Checkpoint) -> list[str]:
    """What the person at the terminal should know of a run that goes on."""
    done = ": nothing to do" if resumed.step >= job.train.steps else ""
    lines = [f"going on from {resumed.folder}{done}"]
    if changed := _changed_versions(resumed.state):
        lines.append(f"versions have changed since: {changed}")
    if bent := _bent_schedule(job, resumed):
        lines.append(bent)
    return lines


def _changed_versions(state: dict[str, Any]) -> str:
    """Which versions differ from those that a checkpoint was written with; empty where none does."""
    before, now = state.get("versions", {}), versions(_VERSIONS_OF)
    names = sorted(name for name in now if before.get(name) != now[name])
    return ", ".join(f"{name} {str(before.get(name))[:40]} -> {now[name]}" for name in names)


def _bent_schedule(job: Job, resumed: Checkpoint) -> str:
    """What another train.steps than the checkpoint's does to the learning rate; empty where it does nothing."""
    before, now, step = resumed.state["config"].get("train", {}).get("steps"), job.train.steps, resumed.step
    known = type(before) is int and 0 < before < 1 << 63  # it may differ, so nobody has compared it
    if not known or before == now or step >= now or not falls(job.train.schedule):
        return ""
    old_rate, new_rate = (job.learning_rate(step, steps) for steps in (before, now))
    return (
        f"train.steps was {before}, now it is {now}: the learning rate of step {step + 1} was {old_rate:.4g}, "
        f"now it is {new_rate:.4g} and falls until step {now} ({job.train.schedule})"
    )
