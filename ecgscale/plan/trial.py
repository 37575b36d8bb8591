"""Real steps on this machine, to measure rates by and to hold predictions against.

Memory is measured in a process of its own: the most that it had at once above what it had before the model was built,
on a GPU what PyTorch allocated, on a CPU by VmHWM. glibc keeps freed memory below its mmap threshold for later, which
says more about the past than about the need, so the child runs with a low threshold, at which every larger tensor is
given back when it is freed.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ecgscale.data.batch import SYNTHETIC_RATE_HZ, ECGBatch, synthetic_batch
from ecgscale.errors import InputError
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import ObjectiveConfig, build_objective, objective_config
from ecgscale.process import STATUS, memory_bytes
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.ranks import start_ranks


@dataclass(frozen=True)
class Trial:
    """Some steps of a model on one rank, with random recordings."""

    model: ModelConfig
    engine: EngineConfig
    rows: int
    samples: int = 2500
    steps: int = 3
    objective: ObjectiveConfig = field(default_factory=objective_config)


@dataclass(frozen=True)
class Times:
    """Medians over the steps but the first, in seconds."""

    forward_backward: float
    update: float

    @property
    def total(self) -> float:
        return self.forward_backward + self.update


def engine_of(trial: Trial) -> tuple[Engine, ECGBatch]:
    """The model under DeepSpeed, on this process alone, and a batch."""
    ranks = start_ranks()
    torch.manual_seed(0)
    module = build_objective(trial.model, trial.objective, 0, SYNTHETIC_RATE_HZ, trial.engine.activation_checkpointing)
    engine = Engine(module, trial.engine, ranks, accumulation=1, micro_batch=trial.rows)
    return engine, engine.put(synthetic_batch(trial.rows, trial.samples))


def timed(trial: Trial) -> Times:
    """How long steps take, in this process."""
    gc.collect()  # engines hold themselves
    engine, batch = engine_of(trial)
    device, passes, updates = batch.signal_BLT.device, [], []
    for _ in range(trial.steps + 1):
        began = now_s(device)
        loss, _ = engine.forward(batch)
        engine.backward(loss)
        middle = now_s(device)
        engine.step(learning_rate=1e-5)
        passes.append(middle - began)
        updates.append(now_s(device) - middle)
    return Times(median(passes[1:]), median(updates[1:]))


def now_s(device: torch.device) -> float:
    """A clock. One thread alone on a CPU is timed by what it computes, which others on the machine do not disturb."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def peak_bytes(trial: Trial, threads: int, device: str = "cpu") -> dict[str, int]:
    """Most bytes above those before the model, in the phases of the second step, in a process of its own.

    On ``cpu`` or ``cuda``. Raises InputError where the system does not tell (it is Linux that has /proc).
    """
    if device == "cpu" and not STATUS.exists():
        raise InputError(f"{STATUS}: memory is measured on Linux only")
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(threads),
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "ecgscale.plan.trial", json.dumps(asdict(trial))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"a step of {trial.model.preset} could not be measured: {_last_line(done.stderr)}")
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["killed"])[-1]


def _measure(trial: Trial) -> dict[str, int]:
    """In the child: a step of the smallest model loads all libraries before the base line is taken."""
    _steps(*engine_of(_small(trial)), steps=2)
    gc.collect()
    base = _held()
    engine, batch = engine_of(trial)
    return {name: peak - base for name, peak in _steps(engine, batch, steps=2).items()}


def _small(trial: Trial) -> Trial:
    """The same with one layer and hardly any rows; that layer is recomputed where any of the trial's is."""
    engine = replace(trial.engine, activation_checkpointing=bool(trial.engine.activation_checkpointing))
    return replace(trial, model=replace(PRESETS["tiny"], depth=1), engine=engine, rows=2)


def _steps(engine: Engine, batch: ECGBatch, steps: int) -> dict[str, int]:
    """The peak of each phase of the last step."""
    peaks = {}
    for _ in range(steps):
        _forget_peak()
        loss, parts = engine.forward(batch)
        peaks["forward"] = _most_held()
        _forget_peak()
        engine.backward(loss)
        peaks["backward"] = _most_held()
        del loss, parts
        _forget_peak()
        engine.step(learning_rate=1e-5)
        peaks["update"] = _most_held()
    return peaks


def _held() -> int:
    """Bytes."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else memory_bytes("VmRSS")


def _most_held() -> int:
    """Bytes, since they were forgotten."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory_bytes("VmHWM")


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _read(text: str) -> Trial:
    tree: dict[str, Any] = json.loads(text)
    return Trial(
        **tree
        | {
            "model": ModelConfig(**tree["model"]),
            "engine": EngineConfig(**tree["engine"]),
            "objective": objective_config(**tree["objective"]),
        }
    )


if __name__ == "__main__":
    print(json.dumps(_measure(_read(sys.argv[1]))))
