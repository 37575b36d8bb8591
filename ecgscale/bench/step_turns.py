"""Ways of taking a step in turns, so that what slows the machine down hits all alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from ecgscale.bench.measure import Round, interleaved
from ecgscale.bench.step_case import Case
from ecgscale.bench.step_ranks import FailedError, Group
from ecgscale.bench.step_ways import SHARDS

_MADE_AHEAD = 4  # batches


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int  # of every way, after one that is thrown away
    steps: int  # of a way in a round
    untimed: int  # before them
    warm_up: int  # before everything
    quick: bool = False  # only to show that everything runs: no bound is held against the numbers

    @staticmethod
    def usual(cuda: bool) -> Effort:
        """Steps of a GPU are short, and there the memory that others had meanwhile is taken anew first."""
        return Effort(9, 10, 2, 3) if cuda else Effort(7, 1, 0, 2)

    @staticmethod
    def least() -> Effort:
        """Shows that everything runs; the numbers are worth nothing, so no bound is held against them."""
        return Effort(1, 1, 0, 1, quick=True)


@dataclass
class Taken:
    """What each way did, by its name."""

    rounds: dict[str, list[Round]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)  # of the rank that needs most
    failed: dict[str, str] = field(default_factory=dict)  # why


def take_turns(wanted: Mapping[str, tuple[Case, str]], effort: Effort, title: str) -> Taken:
    """Interleaved steps of ways of cases. A way that fails is noted, and the others go on."""
    taken = Taken()
    with ExitStack() as stack:
        groups = {name: stack.enter_context(Group(case, way)) for name, (case, way) in wanted.items()}

        def turn(name: str, steps: int, untimed: int) -> Round:
            try:
                return groups[name].take(steps, untimed)
            except FailedError as error:
                taken.failed[name] = str(error)
                groups.pop(name).close()
                raise

        # While others have their turn, the stream makes batches ahead of need: those do not count.
        untimed = {n: effort.untimed + (_MADE_AHEAD if way == SHARDS else 0) for n, (_, way) in wanted.items()}
        for name in wanted:
            print(f"warming up {title}: {name}", file=sys.stderr, flush=True)
            try:
                turn(name, effort.warm_up, 0)
            except FailedError:
                continue
        while groups and not taken.rounds:
            calls = {name: partial(turn, name, effort.steps, untimed[name]) for name in groups}
            try:
                taken.rounds = interleaved(calls, effort.rounds, title)
            except FailedError:
                continue
        taken.peak_bytes = {name: max(group.peak_bytes) for name, group in groups.items()}
    return taken
