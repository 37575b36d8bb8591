"""Where this process is in its work, for whoever watches it from outside: `ecgscale-launch` finds hangs by it.

All ranks of a job report the same sequence of phases, so that the one with the lowest count is the one that is stuck.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

START_UP, SAVE = "start-up", "save"
OF_A_STEP = ("batch", "forward", "backward", "update")  # whoever has begun one of these trains


@dataclass(frozen=True)
class Progress:
    """A phase that this process has begun."""

    step: int = 0
    phase: str = ""  # empty: outside of what ranks do together, and not to be watched
    count: int = 0  # phases begun so far
    since: float = field(default_factory=time.time)  # seconds since the epoch


_now = Progress()


def at(step: int, phase: str) -> None:
    """A phase begins: start-up, batch, forward, backward, update, save, validate; empty when all of it is over."""
    global _now
    _now = Progress(step, phase, _now.count + 1)


def now() -> Progress:
    """The phase that was begun last."""
    return _now
