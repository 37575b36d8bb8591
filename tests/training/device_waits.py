"""Where a step would wait for a GPU, found without one: JSON lines, one for each way.

Counted are values that the host reads (`item`, `bool`, `tolist`, `nonzero` …), shapes that depend on values (boolean
indices, counts of repeats), and DeepSpeed's calls of `synchronize`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave",
}
METHODS = ("tolist", "cpu", "numpy")
waits: Counter[str] = Counter()


class Counting(TorchDispatchMode):
    """Adds up what the host reads of tensors, in a phase."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_value = name.startswith("index") and any(one.dtype == torch.bool for one in _indices(args))
        if name in READS or by_value:
            waits[f"{self.phase} reads"] += 1
        return function(*args, **kwargs or {})


def _indices(args: tuple) -> list[torch.Tensor]:
    """Those of an indexing, which come as a list."""
    return [one for given in args if isinstance(given, list | tuple) for one in given if torch.is_tensor(one)]


@contextmanager
def counted(phase: str):
    from deepspeed.accelerator import get_accelerator

    def synchronize(*_: object) -> None:
        waits[f"{phase} synchronizes"] += 1

    def counting(plain):
        def read(*args, **kwargs):
            waits[f"{phase} reads"] += 1
            return plain(*args, **kwargs)

        return read

    accelerator, plain = get_accelerator(), {name: getattr(torch.Tensor, name) for name in METHODS}
    accelerator.synchronize = synchronize
    for name in METHODS:
        setattr(torch.Tensor, name, counting(plain[name]))
    with Counting(phase):
        yield
    for name in METHODS:
        setattr(torch.Tensor, name, plain[name])
    del accelerator.synchronize


def waits_of(stage: int, precision: str) -> dict[str, int]:
    """Of the fifth step, which has two micro-steps."""
    from ecgscale.data.batch import synthetic_batch
    from ecgscale.model.presets import PRESETS
    from ecgscale.objectives import build_objective, objective_config
    from ecgscale.training.engine import Engine, EngineConfig
    from ecgscale.training.ranks import start_ranks

    ranks = start_ranks()
    module = build_objective(replace(PRESETS["tiny"], depth=2), objective_config(), 0, 500.0)
    engine = Engine(module, EngineConfig(zero_stage=stage, precision=precision), ranks, 2, 2)
    batch = synthetic_batch(4, 320)
    for _ in range(5):
        waits.clear()
        for _ in range(2):
            with counted("forward"):
                loss, _ = engine.forward(engine.put(batch))
            with counted("backward"):
                engine.backward(loss)
            with counted("update"):
                engine.step(1e-4)
    return dict(waits) | {"parameters": len(engine.trained)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    for way in json.loads(sys.argv[1]):
        print(json.dumps(waits_of(*way)), flush=True)
    os._exit(0)
