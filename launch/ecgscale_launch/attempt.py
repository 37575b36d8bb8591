"""One start of all ranks of a job: what is written down of it, and which error ended it."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecgscale.files import read_json_now


@dataclass
class Attempt:
    """One start of all ranks."""

    number: int
    job_id: str | None
    nodes: list[str]
    step_from: int
    began: float = field(default_factory=time.time)
    first_step: float | None = None
    """When the first step of this attempt was done, by rank 0's clock."""
    ended: float | None = None
    outcome: str | None = None
    """done, stopped (saved when asked), crashed, hung, killed (did not save in time) or refused (bad input)."""
    what: str = ""
    step_to: int = 0

    @property
    def progress(self) -> bool:
        """Whether it has left a new checkpoint."""
        return self.step_to > self.step_from


def first_error(folder: Path, failures: dict[int, int]) -> dict[str, Any]:
    """The error that came first and follows from no other; of a rank that could not tell it, how it ended."""
    paths = {rank: folder / f"rank-{rank}.error.json" for rank in sorted(failures)}
    errors = sorted(filter(None, map(read_json_now, paths.values())), key=lambda error: float(error["time"]))
    if own := [error for error in errors if error["kind"] != "lost"]:
        return own[0]
    silent = [rank for rank, path in paths.items() if not path.exists()]
    killed = [rank for rank in silent if failures[rank] < 0] or silent
    if killed:
        return error_of(f"rank {killed[0]} {how_it_ended(failures[killed[0]])}", "error", killed[0])
    return errors[0]


def error_of(line: str, kind: str, rank: int | None = None) -> dict[str, Any]:
    """An error that no rank has written down, in the form of those."""
    return {"rank": rank, "host": None, "time": time.time(), "kind": kind, "line": line, "traceback": None}


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), by somebody or for want of memory"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
