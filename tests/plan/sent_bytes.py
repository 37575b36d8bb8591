"""What really goes through torch.distributed in a step of two ranks, for each stage: JSON lines.

Two processes, forked from one that has done the slow imports.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ecgscale.data.batch import synthetic_batch
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import build_objective, objective_config
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.ranks import start_ranks

COUNTED = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
KEYWORD = {"all_reduce": "tensor", "all_gather": "tensor_list", "all_gather_into_tensor": "output_tensor"}
sent: Counter[str] = Counter()


def size(value: Tensor | list[Tensor]) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(map(size, value))


def count(name: str) -> None:
    """Whole tensors, as every rank has them before or behind."""
    plain, place = getattr(dist, name), 1 if name.startswith("reduce_scatter") else 0

    def counted(*args, **kwargs):
        sent[name] += size(args[place] if len(args) > place else kwargs[KEYWORD.get(name, "input")])
        return plain(*args, **kwargs)

    setattr(dist, name, counted)


def step_of(stage: int, accumulation: int) -> dict[str, int]:
    ranks = start_ranks()
    module = build_objective(replace(PRESETS["tiny"], depth=2), objective_config(), 0, 500.0)
    engine = Engine(module, EngineConfig(zero_stage=stage, whole_below=1000), ranks, accumulation, 2)
    batch = engine.put(synthetic_batch(4, 320))
    for step in range(2):  # the first makes buffers
        if step:
            sent.clear()
        for _ in range(accumulation):
            engine.backward(engine.forward(batch)[0])
            engine.step(1e-4)
    return dict(sent)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401

    rank = "0" if os.fork() else "1"
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name in COUNTED:
        count(name)
    for stage, accumulation in json.loads(sys.argv[1]):
        counted = step_of(stage, accumulation)
        if rank == "0":
            print(json.dumps(counted), flush=True)
    dist.barrier()
    os._exit(0)
