"""A rank of a job whose state is not finite, at each stage: what a save says of it. Prints one JSON object.

For each stage and each way of spoiling, the message and the files that are left, and whether the optimizer's state
begins with nothing. At last a save that the disk of one rank refuses once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ecgscale import progress
from ecgscale.data.batch import ECGBatch
from ecgscale.errors import Diverged
from ecgscale.training import checkpoint
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.optimizers import OptimizerState
from ecgscale.training.ranks import start_ranks

ROWS = 4


class Sums(nn.Module):
    """Two linear layers, of which the last parameter is written by the last rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, batch: ECGBatch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        values_BL = (batch.gain_BL * batch.signal_BLT.float().mean(-1)).to(self.first.weight.dtype)
        loss = self.last(self.first(values_BL)).float().square().mean()
        return loss, {"loss": loss.detach()}


def spoilt(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def saved(folder: Path, stage: int, precision: str, what: str, value: float) -> dict[str, object]:
    """What comes of a save where one number of ``what`` of the last parameter is ``value``."""
    torch.manual_seed(0)
    module = Sums()
    weights = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    if what == "weight":
        weights["last.weight"] = spoilt(weights["last.weight"], value)
    config = EngineConfig(zero_stage=stage, precision=precision, whole_below=0)
    engine = Engine(module, config, ranks, accumulation=1, micro_batch=ROWS, weights=weights)
    fresh = vars(engine.optimizer_state()) == {"slots": [], "scalars": {}, "group": {}}

    def slot(name: str, kind: str) -> Tensor:
        zeros = torch.zeros(engine.shapes[name])
        return spoilt(zeros, value) if (name, kind) == ("last.weight", what) else zeros

    engine.set_optimizer(slot, OptimizerState(["exp_avg", "exp_avg_sq"], {"step": 3.0}, {}))
    said = ""
    try:
        checkpoint.save(folder, engine, 7, {"about": {}})
    except Diverged as error:
        said = str(error)
    return {"said": said, "fresh": fresh, "left": sorted(path.name for path in folder.glob("*"))}


def refuse_once() -> None:
    """The disk of this rank refuses its next flush."""
    fsync = os.fsync

    def failing(_: int) -> None:
        os.fsync = fsync
        raise OSError(5, "Input/output error")

    os.fsync = failing


if __name__ == "__main__":
    ranks = start_ranks()
    outcomes = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            for what, value in (("weight", float("inf")), ("exp_avg_sq", float("nan")), ("weight", 1.0)):
                name = f"{precision}-{stage}-{what}-{value}"
                outcomes[name] = saved(Path(sys.argv[1]) / name, stage, precision, what, value)
    if ranks.rank == ranks.world_size - 1:
        refuse_once()
    outcomes["fp32-1-weight-2.0"] = saved(Path(sys.argv[1]) / "refused", 1, "fp32", "weight", 2.0)
    print(json.dumps(outcomes))
    progress.at(0, "")
