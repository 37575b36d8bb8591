"""Watching jobs: the `status`, `logs`, `cancel` and `resume` subcommands of `ecgscale-launch`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ecgscale.errors import InputError, one_line
from ecgscale.settings import Given, option
from ecgscale_launch import slurm
from ecgscale_launch.follow import follow, print_file, rank_log
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.listing import details, screen, short_path, table
from ecgscale_launch.runs import find_runs
from ecgscale_launch.standing import Standing, is_process, orphans, standings
from ecgscale_launch.subcommand import ClusterSubcommand, Subcommand


@dataclass(frozen=True, kw_only=True)
class Status(Subcommand):
    """Show where jobs stand: all below a folder, or the given ones; one alone in detail."""

    runs: list[Path] = option(positional=True, several=True, default_factory=list)
    """Run folders, or folders of several."""
    folder: Path | None = option(None, name="runs", metavar="FOLDER")
    """Where to look for all; by default runs."""
    json: bool = False
    """For programs: a list of objects with the names of `Standing`'s fields, in seconds and Unix times."""

    def __post_init__(self) -> None:
        if self.runs and self.folder:
            raise InputError("--runs: give it or RUN, not both")

    def run(self) -> int:
        jobs, complaint = standings(jobs_of(self.runs) if self.runs else _all_jobs(self.folder or Path("runs")))
        jobs.sort(key=lambda one: one.submitted or 0.0, reverse=True)
        if complaint:
            print(f"ecgscale-launch: {one_line(complaint)}; shown is what was written last", file=sys.stderr)
        if self.json:
            print(json.dumps([asdict(one) for one in jobs], indent=1))
            return 0
        if not jobs:
            print(f"no jobs below {one_line(str(self.folder or 'runs'))}")
            return 0
        now = time.time()
        print("\n".join(table(jobs, now, *screen(sys.stdout))))
        if len(self.runs) == len(jobs) == 1 and jobs[0].run == str(self.runs[0].absolute()):
            print("\n".join(["", *details(jobs[0], now)]))
        return 0


@dataclass(frozen=True, kw_only=True)
class Logs(Subcommand):
    """Print the log of a rank, or of the supervisor: what started, ended and why."""

    job: Path = option(positional=True, name="run")
    """Run folder."""
    rank: int | None = option(None, metavar="R")
    """Whose log; by default 0."""
    supervisor: bool = False
    """The supervisor's log: attempts, saves, requeues."""
    attempt: int | None = option(None, metavar="N")
    """Of which start of the ranks; by default the newest."""
    follow: bool = option(False, letter="f")
    """Go on with what is written, until the job is over."""

    def __post_init__(self) -> None:
        if self.supervisor and self.rank is not None:
            raise InputError("--supervisor: not with --rank; give one of them")
        if self.supervisor and self.attempt is not None:
            raise InputError("--attempt: the supervisor's log is one for all attempts; leave it out")

    def run(self) -> int:
        run = _one_job(self.job)
        folder, rank = JobFolder.of(run), self.rank or 0

        def look() -> Standing:
            return standings([run])[0][0]

        if self.follow:
            try:
                follow(folder, None if self.supervisor else rank, self.attempt, look)
            except KeyboardInterrupt:  # the usual end of watching, and none of the job's business
                return 130
            return 0
        path = folder.log if self.supervisor else rank_log(folder, rank, self.attempt, look)
        print_file(path)
        if not path.stat().st_size and look().where == "local" and rank == 0:
            shown = short_path(str(path))
            print(f"{shown} is empty: a local job shows its rank 0 where it was started", file=sys.stderr)
        return 0


@dataclass(frozen=True, kw_only=True)
class Cancel(Subcommand):
    """End jobs, or take them out of the queue. A job that runs is asked to save first.

    That is as ahead of its time limit; `resume` goes on from there.
    """

    runs: list[Path] = option(positional=True, several=True)
    """Run folders, or folders of several."""
    now: bool = False
    """Do not wait for it to save: lose what is not saved."""

    def run(self) -> int:
        jobs, complaint = standings(jobs_of(self.runs))
        if complaint:
            raise InputError(complaint)
        active = [one for one in jobs if not one.over]
        ids = {one.job_id for one in active if one.job_id}
        refused = []
        for one in active:
            try:
                print(one_line(f"{short_path(one.run)}: {end_job(one, self.now, ids)}"), flush=True)
            except InputError as error:
                refused.append(str(error))
        for given in self.runs:
            below = [one for one in jobs if Path(one.run).is_relative_to(given.absolute())]
            if all(one.over for one in below):
                refused.append(f"{given}: nothing to cancel, it is {', '.join(sorted({one.state for one in below}))}")
        if refused:
            raise InputError("; ".join(refused))
        return 0


@dataclass(frozen=True, kw_only=True)
class Resume(ClusterSubcommand):
    """Submit a job again that has ended: the same command, cluster config and code, from the newest checkpoint.

    Further options change the cluster config, as in launching: --time 8:00:00 --partition long
    """

    job: Path | None = option(None, positional=True, name="run")
    """Run folder, before all options."""
    new_code: bool = False
    """Take today's code, not the snapshot."""

    def __post_init__(self) -> None:
        if self.job is None:
            raise InputError("give RUN first, then options")

    def run(self, changes: Given) -> int:
        from ecgscale_launch.job_record import read_job
        from ecgscale_launch.launching import resubmit

        assert self.job is not None
        run = _one_job(self.job)
        refuse_active(run)
        number = resubmit(read_job(run), changes, self.new_code)
        print(one_line(f"{short_path(str(run))}: submitted again as job {number}"))
        return 0


def end_job(one: Standing, now: bool = False, others: Container[str] = ()) -> str:
    """End a job that is not over; what was done, also to jobs that wait for it, unless they are among ``others``."""
    save = "it saves and ends" if not now else "ended without saving"
    if one.state == "orphaned":
        return _end_orphans(orphans(JobFolder.of(Path(one.run))), now)
    if one.where == "local":
        if one.pid is None or one.state_time is None:
            raise InputError(f"{short_path(one.run)}: still starting; try again in a few seconds")
        if one.host != socket.gethostname():
            raise InputError(f"{short_path(one.run)}: runs on {one.host}; cancel it there")
        if not is_process(one.pid, one.state_time):
            raise InputError(f"{short_path(one.run)}: nothing to cancel, process {one.pid} is gone")
        _end_process(one.pid, now)
        return f"process {one.pid} was told: {save}"
    assert one.job_id is not None
    waiting = [job_id for job_id in slurm.dependents(one.job_id) if job_id not in others]
    if one.state_time is not None and one.state in ("starting", "running", "saving") and not now:
        slurm.ask_to_stop(one.job_id)
        said = f"job {one.job_id} was told: {save}"
    else:
        slurm.cancel(one.job_id)
        said = f"job {one.job_id} was cancelled" + ("" if one.state_time is None or not now else ", without waiting")
    if waiting:
        said += f"; {', '.join(waiting)}, depending on it, will not start"
    return said


def refuse_active(run: Path) -> None:
    """Raises InputError where the job of a run folder is queued or runs; a folder without a job passes."""
    if not JobFolder.of(run).job.exists():
        return
    ((one,), complaint) = standings([run])
    if one.where is not None and not one.over:
        if complaint and one.where == "slurm":
            raise InputError(f"{short_path(str(run))}: may still be in the queue: {complaint}")
        which = "" if one.job_id is None else f" as job {one.job_id}"
        raise InputError(f"{short_path(str(run))}: is {one.state}{which}; wait for its end or cancel it first")


def jobs_of(given: Sequence[Path]) -> list[Path]:
    """The run folders with a job that are meant; raises InputError where one is none and has none below."""
    found: dict[Path, None] = {}
    for folder in given:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a run folder, `ecgscale-launch status` lists them")
        folder = folder.absolute()
        own = [folder] if JobFolder.of(folder).job.exists() else find_runs(folder)
        if not own:
            raise InputError(f"{folder}: no job of ecgscale-launch; give a run folder that it made")
        found |= dict.fromkeys(own)
    return list(found)


def _all_jobs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"--runs {folder}: no such folder; give the one in which your run folders are")
    return find_runs(folder.absolute())


def _one_job(run: Path) -> Path:
    found = jobs_of([run])
    if len(found) > 1:
        raise InputError(f"{run}: holds {len(found)} jobs; give one of them, like {short_path(str(found[0]))}")
    return found[0]


def _end_orphans(pids: Sequence[int], now: bool) -> str:
    """SIGTERM asks ranks to save; SIGKILL, of each rank's own process group, does not."""
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(pid, signal.SIGKILL) if now else os.kill(pid, signal.SIGTERM)
    told = "ended without saving" if now else "told: save and end"
    return f"its launcher is gone; {len(pids)} ranks were {told}"


def _end_process(pid: int, now: bool) -> None:
    """SIGTERM asks a supervisor to save; SIGKILL, with all its ranks, does not."""
    if not now:
        os.kill(pid, signal.SIGTERM)
        return
    import psutil

    supervisor = psutil.Process(pid)
    for process in [supervisor, *supervisor.children(recursive=True)]:
        process.kill()
