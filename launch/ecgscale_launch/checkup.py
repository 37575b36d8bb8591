"""What each task of `ecgscale-launch doctor` runs: ``python -m ecgscale_launch.checkup FOLDER SHARDS``.

SHARDS is the JSON of a list; it is not in the folder, which a node may not see. Each measurement stands alone: what one
of them cannot do is written down, and the next begins. ``FOLDER/rank-R.json`` is written before and after each, so that
a task that hangs has said where.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ecgscale.errors import one_line
from ecgscale.files import write_json_or_say
from ecgscale.training.environment import MEETING_TIMEOUT_S
from ecgscale_launch import measurements
from ecgscale_launch.measurements import LATE_S, Task
from ecgscale_launch.rank import place_from_slurm

LIMIT_S = 120.0  # of one measurement, waiting for others apart
_END_S = 30.0


@dataclass
class Report:
    """What one task has found: check -> measurements, and check -> why it could not be done."""

    rank: int
    node: str
    host: str
    doing: str = ""
    """The check that it is at; empty when all are over."""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    """Do all checks; 0, whatever they find."""
    place_from_slurm()
    folder, shards = Path(arguments[0]), json.loads(arguments[1])
    rank, local_rank, world_size, local_world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    task = Task(folder, shards, rank, local_rank, world_size, local_world_size)
    report = Report(rank, os.environ.get("SLURMD_NODENAME", socket.gethostname()), socket.gethostname())
    meeting_s = float(os.environ.get(MEETING_TIMEOUT_S, "300"))
    _do(measurements.software, task, report)
    _do(measurements.machine, task, report)
    _do(measurements.gpus, task, report)
    _do(measurements.meeting, task, report, meeting_s + LIMIT_S)
    if task.store is not None:
        _do(measurements.shared_folder, task, report)
        _do(measurements.clocks, task, report)
    _do(measurements.disk, task, report)
    _do(measurements.shards, task, report)
    if task.store is not None:
        _do(measurements.all_reduce, task, report, LATE_S + LIMIT_S)  # last: what hangs hides nothing
    report.doing = ""
    _write(task, report)
    _leave(task)
    return 0


def _do(measure: Callable[[Task], dict[str, Any] | None], task: Task, report: Report, limit_s: float = LIMIT_S) -> None:
    report.doing = name = measure.__name__
    _write(task, report)
    limit = threading.Timer(limit_s, _give_up, (name, task, report, limit_s))
    limit.daemon = True
    limit.start()
    faulthandler.dump_traceback_later(limit_s + 5, exit=True)  # where even the timer's thread does not get to run
    try:
        found = measure(task)
    except Exception as error:  # of any kind: the next checks are done all the same
        report.failed[name] = one_line(f"{type(error).__name__}: {str(error).strip() or 'no message'}")[:500]
    else:
        if found is not None:
            report.found[name] = found
    finally:
        limit.cancel()
        faulthandler.cancel_dump_traceback_later()


def _give_up(name: str, task: Task, report: Report, limit_s: float) -> None:
    faulthandler.dump_traceback()
    report.failed[name] = f"not done after {limit_s:g} s"
    _write(task, report)
    os._exit(1)


def _leave(task: Task) -> None:
    """Rank 0 has the store that the others use: it leaves last."""
    if task.store is None:
        return
    from datetime import timedelta

    from torch.distributed import DistError

    try:
        task.store.set(f"end/{task.rank}", "")
        if task.rank == 0:
            task.store.wait([f"end/{rank}" for rank in range(task.world_size)], timedelta(seconds=_END_S))
    except DistError as error:
        print(one_line(str(error)), file=sys.stderr)


def _write(task: Task, report: Report) -> None:
    """Where the folder is not there the log tells, and the other ranks see that it is not."""
    write_json_or_say(task.folder / f"rank-{task.rank}.json", asdict(report))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
