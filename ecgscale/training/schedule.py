"""Learning rates over a run, as pure functions of the step. To add one: its function here, and its name below."""

from __future__ import annotations

import math
from collections.abc import Callable

from ecgscale.errors import InputError
from ecgscale.registry import find_function

Schedule = Callable[[int, int, int, float], float]
"""(step, steps, warmup_steps, final) -> the share of the peak learning rate at ``step`` (from 0) of ``steps``, behind
``warmup_steps``; ``final`` is the share that it should come to at the end."""


def constant(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Stays at the peak."""
    return 1.0


def linear(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Falls to ``final`` at the end, in a line."""
    return 1.0 + (final - 1.0) * _progress(step, steps, warmup_steps)


def cosine(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Falls to ``final`` at the end, along half a cosine."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps, warmup_steps)))


def tri_stage(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Stays until 30 % of the run and falls exponentially to ``final`` (0.1/0.2/0.7 with a warm-up of 10 %, as
    wav2vec 2.0 fine-tunes)."""
    progress = _progress(step, steps, max(warmup_steps, round(0.3 * steps)))
    return math.exp(math.log(max(final, 1e-8)) * progress)


def _progress(step: int, steps: int, begin: int) -> float:
    """From 0 at ``begin`` to 1 at the end and behind it."""
    return min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine, "tri_stage": tri_stage}


def falls(schedule: str) -> bool:
    """Whether rates depend on the last step, so that another number of steps gives other rates."""
    return schedule != "constant"


def learning_rate_factor(step: int, steps: int, schedule: str, warmup_steps: int, final: float) -> float:
    """The share of the peak learning rate at ``step`` (from 0) of ``steps``.

    All rise linearly over ``warmup_steps``; then it is the schedule's. Raises InputError for a schedule that is unknown
    or gives no share.
    """
    function = find_function("train.schedule", SCHEDULES, schedule)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    try:
        factor = float(function(step, steps, warmup_steps, final))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"train.schedule {schedule}: fails at step {step} ({reason})") from error
    if not 0 <= factor < math.inf:
        raise InputError(f"train.schedule {schedule}: gives {factor:g} at step {step}; give 0 or more of the peak rate")
    return factor
