"""`ecgscale plan --check`: predictions beside real steps on this machine.

Peak memory of several presets, stages and precisions, each in a process of its own; and the time of a step with rates
that were measured on one preset only. A machine that others share is now faster and now slower, so rates and steps are
measured in rounds: a prediction is held against the steps that follow its rates, and the median over rounds is told.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from statistics import median

import torch
from tqdm import tqdm

from ecgscale.cost import Costs, costs_of
from ecgscale.dry_run import Device
from ecgscale.model.base import recomputed_layers
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import objective_config
from ecgscale.plan.measure import measure_rates
from ecgscale.plan.memory import Memory, Parallel, memory_of
from ecgscale.plan.speed import Rates, micro_step, update_s
from ecgscale.plan.trial import Trial, peak_bytes, timed
from ecgscale.tables import aligned
from ecgscale.training.engine import EngineConfig

CALIBRATED = "small"
"""The preset by whose steps rates are measured."""
ROUNDS = 5
"""Of rates and of the steps that are predicted by them."""
MEMORY_CASES = (
    Trial(PRESETS["tiny"], EngineConfig(zero_stage=0), rows=32),
    Trial(PRESETS["tiny"], EngineConfig(zero_stage=1), rows=32),
    Trial(PRESETS["small"], EngineConfig(zero_stage=0), rows=16),
    Trial(PRESETS["small"], EngineConfig(zero_stage=1), rows=16),
    Trial(PRESETS["small"], EngineConfig(zero_stage=1, activation_checkpointing=True), rows=16),
    Trial(PRESETS["small"], EngineConfig(zero_stage=1, precision="bf16"), rows=16),
    Trial(PRESETS["base"], EngineConfig(zero_stage=0), rows=4),
    Trial(PRESETS["base"], EngineConfig(zero_stage=1), rows=4),
    Trial(PRESETS["base"], EngineConfig(zero_stage=1, precision="bf16"), rows=8),
)
TIME_CASES = (
    Trial(PRESETS["tiny"], EngineConfig(zero_stage=0), rows=16, steps=5),
    Trial(PRESETS["tiny"], EngineConfig(zero_stage=0), rows=64),
    Trial(PRESETS["small"], EngineConfig(zero_stage=0), rows=16),
    Trial(PRESETS["medium"], EngineConfig(zero_stage=0), rows=8),
    Trial(PRESETS["base"], EngineConfig(zero_stage=0), rows=4),
)


@dataclass(frozen=True)
class Checked:
    """Predictions and what was measured, one of each for every round: bytes or seconds."""

    what: str
    preset: str
    zero_stage: int
    precision: str
    rows: int
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def off(self) -> float:
        """Relative error of the prediction, the median over rounds."""
        return median(self.errors)

    @property
    def errors(self) -> list[float]:
        return [predicted / measured - 1 for predicted, measured in zip(self.predicted, self.measured, strict=True)]


def check_memory(trial: Trial, threads: int, device: Device) -> Checked:
    """Peak of a step beyond what the process had before."""
    peaks = peak_bytes(trial, threads, device)
    return _checked("peak bytes", trial, [(predicted_memory(trial, device).peak, max(peaks.values()))])


def predicted_memory(trial: Trial, device: Device = "cpu") -> Memory:
    """On one rank."""
    recomputed = recomputed_layers(trial.engine.activation_checkpointing, trial.model.depth)
    return memory_of(_costs(trial), _alone(trial, device), trial.rows, recomputed)


def predicted_s(trial: Trial, rates: Rates, device: Device) -> float:
    """A step of one rank."""
    costs, alone = _costs(trial), _alone(trial, device)
    return micro_step(costs, alone, rates, trial.rows).total + update_s(costs.sizes, alone, rates)


def _costs(trial: Trial) -> Costs:
    return costs_of(trial.model, trial.objective, trial.samples)


def _alone(trial: Trial, device: Device) -> Parallel:
    return Parallel(trial.engine.zero_stage, 1, trial.engine.precision, device, trial.engine.whole_below)


def _checked(what: str, trial: Trial, pairs: list[tuple[float, float]]) -> Checked:
    engine = trial.engine
    preset = trial.model.preset + (" checkpointed" if engine.activation_checkpointing else "")
    return Checked(what, preset, engine.zero_stage, engine.precision, trial.rows, *zip(*pairs, strict=True))


def check_all() -> tuple[Rates, list[Checked]]:
    """All cases on this machine's GPU, or its CPU where it has none, and the rates of the last round."""
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for trial in tqdm(MEMORY_CASES, desc="memory", unit="case", disable=None):
        found.append(check_memory(trial, torch.get_num_threads(), device))
        _log(f"memory of {trial.model.preset}: {found[-1].off:+.1%}")
    pairs: list[list[tuple[float, float]]] = [[] for _ in TIME_CASES]
    for _ in tqdm(range(ROUNDS), desc="time", unit="round", disable=None):
        rates = measure_rates(PRESETS[CALIBRATED], objective_config(), EngineConfig())
        for known, trial in zip(pairs, TIME_CASES, strict=True):
            known.append((predicted_s(trial, rates, device), timed(trial).total))
            _log(f"step of {trial.model.preset}: {known[-1][0] / known[-1][1] - 1:+.1%}")
    return rates, found + [_checked("step seconds", trial, each) for trial, each in zip(TIME_CASES, pairs, strict=True)]


def _log(line: str) -> None:
    """Where no terminal shows a bar."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def text(rates: Rates, found: list[Checked]) -> str:
    """A table of all cases."""
    rows = []
    for one in found:
        unit = 1e6 if one.what == "peak bytes" else 1e-3
        figures = [f"{median(each) / unit:,.1f}" for each in (one.predicted, one.measured)]
        span = f"{min(one.errors):+.1%} to {max(one.errors):+.1%}" if len(one.errors) > 1 else ""
        what = "peak MB" if one.what == "peak bytes" else "step ms"
        rows.append(
            [what, one.preset, f"{one.zero_stage}", one.precision, f"{one.rows}", *figures, f"{one.off:+.1%}", span]
        )
    head = ["", "preset", "ZeRO", "precision", "segments", "predicted", "measured", "off", "rounds"]
    return f"{aligned(head, rows)}\n\nTimes by rates {rates.source}."


def tree(rates: Rates, found: list[Checked]) -> dict[str, object]:
    """For programs."""
    return {"rates": asdict(rates), "cases": [asdict(one) | {"off": one.off} for one in found]}
