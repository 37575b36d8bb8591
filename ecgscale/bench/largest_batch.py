"""The largest batch of a case that fits into memory, by trying: doubled until it does not fit, then bisected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from ecgscale.bench.step_case import Case
from ecgscale.bench.step_ranks import Group, TooLargeError
from ecgscale.bench.step_ways import OURS
from ecgscale.errors import InputError

_MOST = 1 << 16  # recordings of a rank; nothing is gained beyond


class NothingFitsError(Exception):
    """Not even one recording."""


def largest_batch(case: Case, within_gb: float) -> int:
    """Recordings of a rank with which ecgscale's step fits; the batch that the case has does not matter.

    Args:
        within_gb: what all ranks' processes may hold on a CPU, or each rank on its GPU; 0: what the GPU has.

    Raises NothingFitsError where not even one recording fits, InputError on a CPU where no limit is given.
    """
    if case.device == "cpu" and within_gb <= 0:
        raise InputError("bench: --find-batch on a CPU needs --memory-gb, what all ranks together may hold")

    def fits(batch: int) -> bool:
        tried = replace(case, batch=batch)
        print(f"trying {tried.title}: ", end="", file=sys.stderr, flush=True)
        fitting = _fits(tried, round(within_gb * 1e9))
        print("fits" if fitting else "does not fit", file=sys.stderr, flush=True)
        return fitting

    found = largest(fits, _MOST)
    if not found:
        raise NothingFitsError(
            f"not even a batch of 1 fits{f' into {within_gb:g} GB' if within_gb else ''}; "
            "give more memory, a smaller model or --checkpointing"
        )
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones fit too; 0 where none does.

    None is tried that is more than twice as large as one that fits: what is far too large takes longest to fail.
    """
    good, bad = 0, most + 1
    trial = 1
    while bad - good > 1:
        if fits(trial):
            good = trial
        else:
            bad = trial
        trial = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


def _fits(case: Case, within_bytes: int) -> bool:
    """Two steps: the first makes the optimizer's state, the second has it beside the activations."""
    try:
        with Group(case, OURS, limit_bytes=within_bytes) as group:
            group.take(2)
            needed = sum(group.peak_bytes) if case.device == "cpu" else max(group.peak_bytes)
    except TooLargeError:
        return False
    return not within_bytes or needed <= within_bytes
