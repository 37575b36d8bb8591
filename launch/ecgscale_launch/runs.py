"""What run folders tell: where they are, what a run has reached and how fast it goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecgscale.errors import InputError, MachineError
from ecgscale.json_lines import last_json_lines
from ecgscale.run_folder import CONFIG, FOLDERS, LAUNCH
from ecgscale_launch.job_folder import JobFolder

_DEPTH = 4  # of run folders below the folder of all runs
_TAIL = 128 * 2**10  # bytes of events.jsonl that are read: some hundred lines


def find_runs(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Run folders with a job, ``folder`` itself or at most ``depth`` levels below."""
    runs: list[Path] = []
    try:
        if JobFolder.of(folder).job.exists():
            runs = [folder]
        if depth == 0:
            return runs
        of_the_run = FOLDERS if runs or (folder / CONFIG).exists() else {LAUNCH}
        with os.scandir(folder) as entries:
            below = [one.name for one in entries if one.name not in of_the_run and one.is_dir(follow_symlinks=False)]
    except OSError:  # not ours to read, or gone meanwhile
        return runs
    return runs + [run for name in sorted(below) for run in find_runs(folder / name, depth - 1)]


def tail_events(path: Path) -> list[dict[str, Any]]:
    """The newest events of a run; a line that is being written, or was cut off by a kill, is left out."""
    return [event for event in last_json_lines(path, _TAIL) if event.keys() >= {"event", "time", "step"}]


def estimated_end(points: Sequence[tuple[float, int]], steps: int, now: float) -> float | None:
    """When the last step is done by the pace between (time, step) points, in order; None with less than two steps."""
    if len(points) < 2 or points[-1][1] <= points[0][1]:
        return None
    (first, first_step), (last, last_step) = points[0], points[-1]
    return max(now, last + (steps - last_step) * (last - first) / (last_step - first_step))


def steps_to_do(folder: JobFolder) -> int | None:
    """Steps that a training run is to do, by the config that the job runs from, else by the run's; a probe has none."""
    from ecgscale import yaml_text

    for path in (folder.config, folder.run / CONFIG):
        try:
            tree = yaml_text.read(path)
            steps = tree["train"]["steps"]
        except (InputError, MachineError, KeyError, TypeError):
            continue
        if tree.get("task", {}).get("protocol", "finetune") != "finetune":
            return None
        if isinstance(steps, int):
            return steps
    return None
