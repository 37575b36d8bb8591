"""Jobs as a table for people: as wide as the terminal, in colour where there is one."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from ecgscale.errors import one_line
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.standing import Standing

_COLOURS = {
    "done": "32",
    "running": "36",
    "starting": "36",
    "saving": "36",
    "queued": "33",
    "requeued": "33",
    "failed": "31",
    "lost": "31",
    "orphaned": "31",
    "damaged": "31",
}
_LEAST_RUN = 16  # characters that a run's name keeps
_SHOWN_ATTEMPTS = 10

Column = tuple[str, Callable[[Standing, float], str]]
_COLUMNS: list[Column] = [
    ("run", lambda one, _: short_path(one.run)),
    ("job", lambda one, _: one.job_id or ("local" if one.where == "local" else "-")),
    ("state", lambda one, _: f"{one.state} ({one.reason})" if one.reason else one.state),
    ("step", lambda one, _: _progress(one)),
    ("ECG/s", lambda one, _: "-" if one.ecg_per_s is None else f"{one.ecg_per_s:.{0 if one.ecg_per_s >= 10 else 1}f}"),
    ("MFU", lambda one, _: "-" if one.mfu is None else f"{one.mfu:.1%}"),
    ("saved", lambda one, now: "-" if one.checkpoint_time is None else f"{duration(now - one.checkpoint_time)} ago"),
    ("restarts", lambda one, _: str(one.restarts)),
    ("requeues", lambda one, _: str(one.requeues)),
    ("end", lambda one, now: "-" if one.estimated_end is None else f"in {duration(one.estimated_end - now)}"),
]  # fmt: skip
_DROPPED_FIRST = ("requeues", "MFU", "job", "restarts", "ECG/s", "saved")  # where the terminal is too narrow


def table(jobs: Sequence[Standing], now: float, width: int | None, coloured: bool) -> list[str]:
    """Lines of at most ``width`` characters (None: no limit), the first with the columns' names."""
    columns = list(_COLUMNS)
    cells = {name: [name, *(one_line(cell(one, now)) for one in jobs)] for name, cell in columns}
    widths = {name: max(map(len, column)) for name, column in cells.items()}
    if width is not None:
        for name in _DROPPED_FIRST:
            least = sum(widths.values()) + 2 * (len(widths) - 1)
            least -= max(0, widths["run"] - _LEAST_RUN) + max(0, widths["state"] - _LEAST_RUN)
            if least > width:
                del widths[name]
        for name in ("state", "run"):
            over = sum(widths.values()) + 2 * (len(widths) - 1) - width
            widths[name] = max(min(widths[name], _LEAST_RUN), widths[name] - max(0, over))
    lines = []
    for row in range(len(jobs) + 1):
        shown = [_fit(cells[name][row], widths[name], from_end=name == "run") for name in widths]
        if coloured:
            code = "1" if row == 0 else _COLOURS.get(jobs[row - 1].state, "")
            at = list(widths).index("state")
            shown = [
                f"\x1b[{code}m{cell}\x1b[0m" if code and row * (i - at) == 0 else cell for i, cell in enumerate(shown)
            ]
        lines.append("  ".join(shown).rstrip())
    return lines


def details(one: Standing, now: float) -> list[str]:
    """What the row of a job does not say."""
    lines = [f"command   ecgscale {shlex.join(one.command)}"] if one.command else []
    if one.nodes:
        lines.append(f"nodes     {', '.join(one.nodes)}")
    if one.ecg_per_s is not None:
        lines.append(f"speed     {one.ecg_per_s:.1f} ECG/s" + ("" if one.mfu is None else f", MFU {one.mfu:.1%}"))
    if one.attempts:
        lines.append(f"starts    {len(one.attempts)}, of them {one.restarts} restarts; {one.requeues} requeues")
    if one.submitted:
        lines.append(f"submitted {clock(one.submitted)}")
    if one.expected_start and one.expected_start > now:
        lines.append(f"start     {clock(one.expected_start)}, SLURM expects")
    if one.estimated_end:
        lines.append(f"end       {clock(one.estimated_end)}, at this pace")
    hidden = max(0, len(one.attempts) - _SHOWN_ATTEMPTS)
    if hidden:
        lines.append(f"attempts  {hidden} earlier ones")
    for attempt in one.attempts[hidden:]:
        ended = attempt.get("ended")
        lasted = duration((ended or now) - attempt["began"])
        outcome = attempt.get("outcome") or ("runs" if attempt is one.attempts[-1] and not one.over else "lost")
        steps = f"from step {attempt['step_from']}" + (f" to {attempt['step_to']}" if ended else "")
        what = f": {attempt['what']}" if attempt.get("what") else ""
        lines.append(f"attempt {attempt['number']:<2}{clock(attempt['began'])}, {lasted}, {outcome}, {steps}{what}")
    if one.error:
        where = f" on {one.error['host']}" if one.error.get("host") else ""
        rank = "" if one.error.get("rank") is None else f"rank {one.error['rank']}{where}: "
        lines.append(f"error     {rank}{one.error.get('line')}")
    folder, of_array = JobFolder.of(Path(one.run)), JobFolder.of(Path(one.run).parent)
    if one.logs:
        lines.append(f"logs      {short_path(one.logs)}, {short_path(str(folder.log))}")
    elif one.state in ("failed", "lost") and one.where == "slurm":
        for batch in [*folder.batch_folders(), *of_array.batch_folders()]:
            lines.append(f"logs      {short_path(str(batch))}: ended before its ranks were started")
    return [one_line(line) for line in lines]


def screen(stream: TextIO) -> tuple[int | None, bool]:
    """Width of the terminal that a stream goes to, None where it goes elsewhere, and whether colours are wanted."""
    if not stream.isatty():
        return None, False
    coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return shutil.get_terminal_size().columns, coloured


def short_path(path: str) -> str:
    """Relative to the current folder where it is below, as it can be given to other commands."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return path


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(0, int(seconds))} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(moment: float) -> str:
    """Local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _progress(one: Standing) -> str:
    if one.step is None or not one.steps:
        return "-"
    return f"{one.step}/{one.steps} {100 * one.step // one.steps}%"


def _fit(text: str, width: int, from_end: bool) -> str:
    """Padded, or cut where it is too long; of a path the end tells more."""
    if len(text) <= width:
        return text.ljust(width)
    return "…" + text[-(width - 1) :] if from_end else text[: width - 1] + "…"
