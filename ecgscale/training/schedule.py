"""Learning rates over a run, as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "tri_stage"]


def falls(schedule: Schedule) -> bool:
    """Whether rates fall towards the last step, so that another number of steps gives other rates."""
    return schedule != "constant"


def learning_rate_factor(step: int, steps: int, schedule: Schedule, warmup_steps: int, final: float) -> float:
    """The share of the peak learning rate at ``step`` (from 0) of ``steps``.

    All rise linearly over ``warmup_steps``. Then constant stays; linear and cosine fall to ``final`` at the end;
    tri_stage stays until 30 % of the run and falls exponentially to ``final`` (0.1/0.2/0.7 with a warm-up of 10 %,
    as wav2vec 2.0 fine-tunes).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = max(warmup_steps, round(0.3 * steps)) if schedule == "tri_stage" else warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    if schedule == "linear":
        return 1.0 + (final - 1.0) * progress
    if schedule == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return math.exp(math.log(max(final, 1e-8)) * progress)
