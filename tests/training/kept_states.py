"""A rank that trains ``own_parts.Teaching`` by the engine alone, and goes on from what lies in a run's folder.

Its argument is a task {run, engine, until, save} in JSON: train to step ``until``, with checkpoints after the steps in
``save``. The argument ``kill`` ends the process by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecgscale import progress
from ecgscale.data.batch import ECGBatch, synthetic_batch
from ecgscale.training import checkpoint
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.ranks import Ranks, start_ranks
from own_parts import MOMENTUM, Teaching

ROWS, SKIPPED = 8, 3  # over all ranks; the step that has no finite gradient


def batch_of(step: int, ranks: Ranks) -> ECGBatch:
    """A rank's rows of a step's batch, which is the same on any number of ranks."""
    torch.manual_seed(step)
    batch = synthetic_batch(ROWS, 2)
    if step + 1 == SKIPPED:
        batch = batch.with_gain(torch.full_like(batch.gain_BL, float("nan")))
    elif step >= 0:
        batch = batch.with_gain(torch.ones_like(batch.gain_BL))
    return batch.each(lambda tensor: tensor.chunk(ranks.world_size)[ranks.rank])


def train(run: str, engine: dict[str, Any], until: int, save: list[int]) -> None:
    ranks = start_ranks()
    config = EngineConfig(clip_norm=1.0, **engine)
    resumed = checkpoint.latest(Path(run))
    torch.manual_seed(0)
    module = Teaching()
    if resumed:
        resumed.check_fits(module)
    ours = Engine(module, config, ranks, 1, ROWS // ranks.world_size, resumed.module_state() if resumed else None)
    if resumed:
        ours.set_optimizer(resumed.reader(), resumed.optimizer())
    teacher = {name: ours.weight(name).clone() for name in ours.shapes if name in ours.untrained}
    for step in range(resumed.step if resumed else 0, until):
        loss, _ = ours.forward(ours.put(batch_of(step, ranks)), step=step)
        ours.backward(loss)
        updated = ours.step(1e-2, step)
        assert updated == (step + 1 != SKIPPED)
        check_teacher(ours, teacher, updated)
        assert ours.untrained.buffer("of_a_rank").item() == 1
        if step + 1 in save:
            state = {"about": {}, "position": 0, "skipped": 0, "skipped_in_a_row": 0, "data": "", "config": {}}
            state |= {"optimizer_steps": 0, "optimizer": vars(ours.optimizer_state())}
            checkpoint.save(Path(run), ours, step + 1, state)


def check_teacher(ours: Engine, teacher: dict[str, Tensor], updated: bool) -> None:
    """It is the average of the fp32 weights, to the bit."""
    for name, average in teacher.items():
        if updated:
            average.lerp_(ours.weight(name.replace("teacher", "student")), 1 - MOMENTUM)
        assert torch.equal(ours.weight(name), average), name


def main(arguments: list[str]) -> int:
    if arguments == ["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    train(**json.loads(arguments[0]))
    progress.at(0, "")
    return 0
