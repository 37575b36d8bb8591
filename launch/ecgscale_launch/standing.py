"""Where jobs stand, from what lies in their run folders and what SLURM knows of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecgscale.errors import InputError, MachineError
from ecgscale.files import read_json_if_there, read_json_now
from ecgscale.progress import SAVE, START_UP
from ecgscale.run_folder import EVENTS, newest_checkpoint, step_of
from ecgscale_launch import slurm
from ecgscale_launch.commands import OF_RANKS
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.runs import estimated_end, steps_to_do, tail_events

OVER = ("done", "failed", "stopped", "cancelled", "lost", "unsubmitted", "damaged")
_OWN_END = ("done", "failed", "stopped")  # phases in which the supervisor leaves a job
_BEGINS_S = 60.0  # a local supervisor has written where it stands by then
_SILENT_S = 120.0  # a rank writes every few seconds that it is alive
_SAME_S = 300.0  # between sbatch's answer and the time that SLURM keeps
_CLOCK_S = 1.0  # /proc tells in such steps when a process began


@dataclass
class Standing:
    """Where a job stands. Times are Unix times in seconds; None: unknown. These are the names of `status --json`."""

    run: str
    """The run folder."""
    name: str | None = None
    """Of the job."""
    where: str | None = None
    """slurm or local."""
    job_id: str | None = None
    """SLURM's number of the newest submission."""
    state: str = "damaged"
    """queued, starting, running, saving, requeued, done, failed, stopped (saved when asked), cancelled, lost (gone
    without having said so), orphaned (lost, but ranks of it still run here; they save and end by themselves),
    unsubmitted or damaged; suspended and the like are SLURM's own."""
    reason: str = ""
    """Why it waits, or how SLURM says that it ended."""
    submitted: float | None = None
    """When it was submitted last."""
    step: int | None = None
    """Steps done; of a job that does not run, those that are saved."""
    steps: int | None = None
    """Steps that the run is to do."""
    ecg_per_s: float | None = None
    """Recordings per second over all ranks, by the newest log line."""
    mfu: float | None = None
    """Share of the devices' peak, by the newest log line."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint."""
    checkpoint_time: float | None = None
    """When that was written."""
    restarts: int = 0
    """Attempts after the first one within an allocation."""
    requeues: int = 0
    """Times that SLURM has started the job again, or is to."""
    estimated_end: float | None = None
    """By the pace of the current attempt; of a job that waits, None."""
    expected_start: float | None = None
    """SLURM's guess for a job that waits."""
    nodes: list[str] = field(default_factory=list)
    """Of the newest attempt."""
    command: list[str] = field(default_factory=list)
    """Arguments of `ecgscale`."""
    error: dict[str, Any] | None = None
    """The first error of the newest attempt: rank, host, line, traceback."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """number, began, ended, outcome, what, step_from, step_to and more of each start of the ranks."""
    logs: str | None = None
    """The folder of the newest attempt's logs."""
    host: str | None = None
    """Where the supervisor runs."""
    pid: int | None = None
    """Of the supervisor."""
    state_time: float | None = None
    """When the supervisor wrote last."""

    @property
    def over(self) -> bool:
        """Whether it will not go on by itself."""
        return self.state in OVER


def standings(runs: Sequence[Path], now: float | None = None) -> tuple[list[Standing], str | None]:
    """Where each run's job stands, and SLURM's complaint where it does not answer."""
    now = time.time() if now is None else now
    read = [_read(run) for run in runs]
    known, complaint = None, None
    try:
        known = slurm.known([one.job_id for one, _, _ in read if one.job_id and one.where == "slurm"])
    except InputError as error:
        complaint = str(error)
    for one, folder, written in read:
        if one.where is None:
            continue
        phase = _phase(one, folder, written)
        if one.where == "local":
            one.state = local_word(phase, _alive(one, folder, now), now - (one.submitted or 0.0))
            if one.state == "lost" and orphans(folder):
                one.state = "orphaned"
        elif one.job_id is None:
            one.state = "unsubmitted"
        elif known is None:
            one.state, one.reason = phase or "queued", "SLURM does not answer"
        else:
            _add_slurm(one, phase, _same_job(known.get(one.job_id), one))
        _add_progress(one, folder, now, stops=written in ("stopping", "stopped"))
    return [one for one, _, _ in read], complaint


def slurm_word(phase: str | None, written: float | None, job: slurm.Known | None) -> str:
    """One word for what the supervisor wrote at a time and what SLURM says; None: nothing of this job."""
    if job is None:
        return phase if phase in _OWN_END else "lost"
    if job.state == "PENDING":
        return "requeued" if phase else "queued"
    if "REQUEUE" in job.state or job.state == "SPECIAL_EXIT":
        return "requeued"
    if job.state == "CANCELLED":
        return phase if phase in ("done", "failed") else "cancelled"
    if job.state in slurm.OVER:
        return phase if phase in _OWN_END else "failed" if phase is None and job.state != "COMPLETED" else "lost"
    if job.state not in ("CONFIGURING", "RUNNING", "COMPLETING"):
        return job.state.lower()
    began_again = written is not None and job.began is not None and job.began > written
    if phase is None or (began_again and job.state != "COMPLETING"):
        return "starting"
    return "saving" if phase == "stopped" else phase  # SLURM will say whether that was for a requeue or for good


def local_word(phase: str | None, alive: bool, age_s: float) -> str:
    """One word for a job of this machine or another one without SLURM."""
    if phase in _OWN_END:
        return str(phase)
    if phase is None:
        return "starting" if age_s < _BEGINS_S else "lost"
    return phase if alive else "lost"


def is_process(pid: int, written: float) -> bool:
    """Whether the process that wrote its number at a time is still the one that has it."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.create_time() <= written + _CLOCK_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def orphans(folder: JobFolder) -> list[int]:
    """Processes of the newest attempt's ranks that run on this machine."""
    newest, here = folder.latest_attempt(), socket.gethostname()
    told = [read_json_now(path) for path in sorted(newest.glob("rank-*.alive.json"))] if newest else []
    own = [one for one in told if one is not None and one.get("host") == here and not one.get("ended")]
    return [one["pid"] for one in own if is_process(one["pid"], one["time"])]


def _read(run: Path) -> tuple[Standing, JobFolder, str | None]:
    """What job.json, submitted.json and state.json say, with the phase of the latter."""
    folder, one = JobFolder.of(run), Standing(str(run))
    try:
        job, submitted, state = (
            read_json_if_there(path) or {} for path in (folder.job, folder.submitted, folder.state)
        )
        one.where = {"slurm": "slurm", "local": "local"}[job["where"]]
    except (InputError, MachineError, KeyError) as error:
        one.reason = f"{folder.job}: damaged" if isinstance(error, KeyError) else str(error)
        return one, folder, None
    one.name, one.command = job.get("name"), job.get("command", [])
    one.submitted = job["time"]
    if one.where == "slurm" and submitted.get("time", 0.0) >= job["time"]:  # else it is of a job before
        one.job_id, one.submitted = submitted["job_id"], submitted["time"]
    one.attempts = state.get("attempts", [])
    one.restarts, one.requeues = state.get("restarts", 0), state.get("requeues", 0)
    if newest := folder.latest_attempt():
        one.logs = str(newest)
    old = state.get("time", 0.0) < one.submitted if one.where == "local" else state.get("job_id") != one.job_id
    if old or not state:
        return one, folder, None  # of before it was submitted again
    one.nodes, one.error = state.get("nodes", []), state.get("error")
    one.host, one.pid, one.state_time = state.get("host"), state.get("pid"), state.get("time")
    return one, folder, state.get("phase")


def _phase(one: Standing, folder: JobFolder, written: str | None) -> str | None:
    """What the supervisor wrote, told apart by what rank 0 does; None where it has written nothing yet."""
    if written != "running":
        return "saving" if written == "stopping" else written
    rank = _rank(folder) or {"phase": START_UP}
    trains = one.command[:1] and one.command[0] in OF_RANKS
    moves = rank.get("first_step") or (one.attempts and rank.get("step", 0) > one.attempts[-1]["step_from"])
    if rank.get("phase") == START_UP or (trains and not moves):
        return "starting"
    return "saving" if rank.get("phase") == SAVE else "running"


def _add_slurm(one: Standing, phase: str | None, job: slurm.Known | None) -> None:
    one.state = slurm_word(phase, one.state_time, job)
    one.requeues = max(one.requeues, job.restarts if job else 0)
    if job is None:
        one.reason = "unknown to SLURM" if one.state == "lost" else ""
    elif job.state == "PENDING":
        one.reason, one.expected_start = job.reason, job.began
    elif one.state in ("failed", "lost") and phase != "failed":
        one.reason = job.state


def _alive(one: Standing, folder: JobFolder, now: float) -> bool:
    if one.pid is None or one.state_time is None:
        return False
    if one.host == socket.gethostname():
        return is_process(one.pid, one.state_time)
    heard = (_rank(folder) or {}).get("time", one.state_time)  # on another machine
    return bool(now - max(heard, one.state_time) < _SILENT_S)


def _same_job(job: slurm.Known | None, one: Standing) -> slurm.Known | None:
    """None where another cluster, or the same after a reset, has given the number to another job."""
    if job is None or job.submitted is None or one.submitted is None or job.restarts:
        return job
    apart_s = abs(job.submitted - one.submitted)
    return job if min(apart_s, abs(apart_s - 3600.0)) < _SAME_S else None  # an hour: when the clocks go back


def _add_progress(one: Standing, folder: JobFolder, now: float, stops: bool) -> None:
    if saved := newest_checkpoint(folder.run):
        one.checkpoint_step = step_of(saved)
        with suppress(FileNotFoundError):  # removed meanwhile, for newer ones
            one.checkpoint_time = saved.stat().st_mtime
    events = tail_events(folder.run / EVENTS)
    logged = [event for event in events if event.get("throughput/ecg_per_s") is not None]
    if logged:
        one.ecg_per_s, one.mfu = logged[-1]["throughput/ecg_per_s"], logged[-1].get("throughput/mfu")
    one.steps = steps_to_do(folder)
    if one.steps is None:
        return
    one.step = one.checkpoint_step or 0
    if one.state not in ("starting", "running", "saving") or one.state_time is None or not one.attempts:
        return
    attempt, rank = one.attempts[-1], _rank(folder) or {}
    current = [event for event in events if event["time"] >= attempt["began"]]
    one.step = max([one.step, rank.get("step", 0), *(event["step"] for event in current[-1:])])
    points = [(event["time"], event["step"]) for event in current if event["event"] == "step"]
    if rank.get("first_step") and len({step for _, step in points}) < 2:
        points.insert(0, (rank["first_step"], attempt["step_from"] + 1))
    one.estimated_end = None if stops else estimated_end(points, one.steps, now)


def _rank(folder: JobFolder) -> dict[str, Any] | None:
    """Where rank 0 of the newest attempt stands."""
    newest = folder.latest_attempt()
    return read_json_now(newest / "rank-0.alive.json") if newest else None
