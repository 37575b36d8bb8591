"""Logs of ranks, printed as they are or followed while they grow."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ecgscale.errors import InputError, one_line
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.listing import short_path
from ecgscale_launch.standing import Standing

_LOOK_S = 0.3
_ASK_S = 10.0  # SLURM's controller serves everybody
_LAST_S = 1.0  # for what the ranks' file system still brings


def rank_log(folder: JobFolder, rank: int, attempt: int | None, look: Callable[[], Standing]) -> Path:
    """The log of a rank; raises InputError where there is none, with those that there are."""
    shown = short_path(str(folder.run))
    newest = folder.latest_attempt()
    chosen = newest if attempt is None else folder.attempt(attempt)
    if newest is None:
        raise InputError(f"{shown}: no log, the job is {_word(look())}")
    if chosen is None or not chosen.is_dir():
        raise InputError(f"--attempt {attempt}: there were 1 to {int(newest.name)}")
    path = chosen / f"rank-{rank}.log"
    if path.exists():
        return path
    if known := ranks_in(chosen):
        raise InputError(f"--rank {rank}: attempt {int(chosen.name)} has the ranks {_ranges(known)}")
    raise InputError(f"{shown}: no log in attempt {int(chosen.name)}, the job is {_word(look())}")


def ranks_in(attempt: Path) -> list[int]:
    """Ranks of which there is a log."""
    names = [path.stem.removeprefix("rank-") for path in attempt.glob("rank-*.log")]
    return sorted(int(name) for name in names if name.isdecimal())


def print_file(path: Path) -> None:
    """Print a file as it is."""
    sys.stdout.flush()
    try:
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    except FileNotFoundError as error:
        raise InputError(f"{short_path(str(path))}: not written yet") from error
    sys.stdout.buffer.flush()


def follow(folder: JobFolder, rank: int | None, attempt: int | None, look: Callable[[], Standing]) -> None:
    """Print a rank's log (None: the supervisor's) as it grows, attempt after attempt, until the job is over.

    ``look`` tells where the job stands; it is asked now and then. With ``attempt``, only that one's log until its end.
    """
    job = look()
    if rank is not None and (job.over or attempt is not None or _has_logs(folder)):
        rank_log(folder, rank, attempt, look)  # refuses
    asked, written = time.monotonic(), _written(folder)
    number, position, said = attempt or 0, 0, False
    while True:
        ends = job.over or (attempt is not None and _has_ended(folder, attempt, job))
        if ends:
            time.sleep(_LAST_S)
        newest = folder.latest_attempt()
        latest = attempt or (int(newest.name) if newest else 0)
        while True:  # all that is there of this attempt, and of those that began meanwhile
            path = folder.log if rank is None else folder.attempt(number) / f"rank-{rank}.log"
            position = _print_from(path, position)
            if rank is None or number >= latest:
                break
            number, position = number + 1 if number else latest, 0
            print(f"==> attempt {number} <==", file=sys.stderr, flush=True)
        if ends and rank is not None and not position:
            rank_log(folder, rank, attempt, look)  # refuses where there is none
        if ends:
            if attempt is None:
                print(one_line(f"{short_path(str(folder.run))}: {_word(job)}"), file=sys.stderr, flush=True)
            return
        if not said and not position:
            print(one_line(f"{short_path(str(folder.run))}: {_word(job)}, no log yet"), file=sys.stderr, flush=True)
        said = True
        time.sleep(_LOOK_S)
        if time.monotonic() - asked > _ASK_S or _written(folder) != written:
            job, asked, written = look(), time.monotonic(), _written(folder)


def _has_logs(folder: JobFolder) -> bool:
    """Whether the newest attempt has come so far that its logs are there: then a missing one is a wrong number."""
    newest = folder.latest_attempt()
    return newest is not None and bool(ranks_in(newest)) and (newest / "rank-0.alive.json").exists()


def _has_ended(folder: JobFolder, attempt: int, job: Standing) -> bool:
    newest = folder.latest_attempt()
    if newest is not None and int(newest.name) > attempt:
        return True
    return any(one["number"] == attempt and one.get("ended") for one in job.attempts)


def _written(folder: JobFolder) -> float:
    try:
        return folder.state.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _print_from(path: Path, position: int) -> int:
    """Print what a file has beyond a position; the new one."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            while block := file.read(2**20):
                sys.stdout.buffer.write(block)
                position += len(block)
    except FileNotFoundError:
        return position
    sys.stdout.buffer.flush()
    return position


def _word(job: Standing) -> str:
    return f"{job.state} ({job.reason})" if job.reason else job.state


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> ``0 to 2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in parts)
