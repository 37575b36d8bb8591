"""What SLURM says and does, by its own commands. No shell in between: every argument is passed as it is."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecgscale.errors import InputError

_TIMEOUT_S = 60.0
# Of what sacct and squeue say, the states in which a job will not run again by itself.
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """A partition and its nodes."""

    name: str
    default: bool
    nodes: int
    hosts: frozenset[str]


def run(*command: str, given: str | None = None, env: dict[str, str] | None = None) -> str:
    """What a command of SLURM prints; InputError with its own complaint where it fails. ``given`` is its input."""
    if (conf := os.environ.get("SLURM_CONF")) and not Path(conf).exists():
        raise InputError(f"SLURM_CONF {conf}: no such file; unset it, or start that cluster again")
    try:
        done = subprocess.run(
            command, input=given, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise InputError(f"{command[0]} is not on the PATH: is this a SLURM cluster? --local N runs here") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{command[0]} does not answer within {_TIMEOUT_S:g} s") from error
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        raise InputError(f"{command[0]}: {'; '.join(lines) or f'exit code {done.returncode}'}")
    return done.stdout


def partitions() -> list[Partition]:
    """All partitions that this user may see."""
    found: dict[str, Partition] = {}
    for line in run("sinfo", "--noheader", "--all", "--Node", "--format=%R|%P|%N|%n").splitlines():
        name, shown, _, host = line.split("|")
        known = found.get(name, Partition(name, shown.endswith("*"), 0, frozenset()))
        found[name] = Partition(name, known.default, known.nodes + 1, known.hosts | {host})
    return list(found.values())


@dataclass(frozen=True)
class Known:
    """What SLURM knows of a job."""

    state: str
    """PENDING, RUNNING, COMPLETED and so on."""
    reason: str = ""
    """Why it waits or how it ended, in SLURM's words."""
    restarts: int = 0
    submitted: float | None = None
    """Unix time; that of the last requeue where there was one."""
    began: float | None = None
    """Unix time of the start, expected where the job waits; None where nothing is known."""


_COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 10, "SubmitTime": 25, "StartTime": 25, "Reason": 200}


def known(job_ids: Sequence[str]) -> dict[str, Known]:
    """What SLURM knows of jobs, by two calls at most; those that it has forgotten are absent."""
    if not job_ids:
        return {}
    layout = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    # One unknown job alone is an error of squeue, among several it is left out: so each is asked for twice.
    wanted = ",".join([*job_ids, *job_ids])
    text = run("squeue", "--noheader", "--array", "--states=all", f"--Format={layout}", f"--jobs={wanted}")
    found = {}
    for line in text.splitlines():
        job_id, job = _known_from(line)
        found[job_id] = job
    forgotten = [job_id for job_id in job_ids if job_id not in found]
    if forgotten and shutil.which("sacct") is not None:
        found |= _accounted(forgotten)
    return found


def state(job_id: str) -> str | None:
    """PENDING, RUNNING, COMPLETED and so on; None where SLURM does not know the job.

    Of an array, where ``job_id`` is its number alone: the state of a task that has not succeeded, if there is one.
    """
    states = [job.state for name, job in known([job_id]).items() if job_id in (name, name.partition("_")[0])]
    failed = [one for one in states if one in OVER and one != "COMPLETED"]
    waiting = [one for one in states if one not in OVER]
    return next(iter([*failed, *waiting, *states]), None)


def _known_from(line: str) -> tuple[str, Known]:
    """A line of squeue in columns of fixed width."""
    words, at = [], 0
    for width in _COLUMNS.values():
        words.append(line[at : at + width].strip())
        at += width
    job_id, word, restarts, submitted, began, reason = words
    reason = "" if reason == "None" else reason
    return job_id, Known(word, reason, int(restarts or 0), _unix(submitted), _unix(began))


def _accounted(job_ids: Sequence[str]) -> dict[str, Known]:
    """What accounting remembers, empty where there is none."""
    wanted = f"--jobs={','.join(job_ids)}"
    try:
        text = run("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", wanted)
    except InputError:
        return {}
    found = {}
    for job_id, _, word in (line.partition("|") for line in text.splitlines()):
        if word.split() and {job_id, job_id.partition("_")[0]} & {*job_ids}:
            found[job_id] = Known(word.split()[0])
    return found


def _unix(text: str) -> float | None:
    """SLURM's local time, such as 2026-11-23T00:14:27."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # N/A
        return None


def dependents(job_id: str) -> list[str]:
    """This user's jobs that wait for another one."""
    text = run("squeue", "--noheader", "--me", "--states=PENDING", "--Format=JobArrayID:40,Dependency:2000")
    number, _, task = job_id.partition("_")
    ours = re.compile(rf"(?<![\d_]){number}(_\*|_{task})?(?![\d_])")  # 7_* is all of an array
    return [line[:40].strip() for line in text.splitlines() if ours.search(line[40:])]


def ask_to_stop(job_id: str) -> None:
    """SIGTERM for the batch process alone. Unlike scancel's, no SIGKILL follows after the cluster's KillWait."""
    run("scancel", "--batch", "--signal=TERM", job_id)


def requeue(job_id: str) -> None:
    """Put a running job back into the queue, under its own id."""
    run("scontrol", "requeue", job_id)


def cancel(*job_ids: str) -> None:
    """End jobs, or take them out of the queue."""
    run("scancel", *job_ids)


def own_id() -> str:
    """The number of the job that this process is in, as SLURM shows it: of an array's task ``ARRAY_TASK``."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def own_nodes() -> list[str]:
    """The names of the nodes of the job that this process is in, in the order of their ranks."""
    return run("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def signal_steps(job_id: str, number: signal.Signals) -> subprocess.Popen[bytes] | None:
    """Begin to send a signal to the tasks of a job's steps, not to its batch script. ``job_id`` is the one shown.

    Not waited for, and ended after a few seconds: while a job is being requeued, scancel tries again for half a minute,
    and would reach the next start. None where SLURM does not answer.
    """
    named = [job_id]
    if number == signal.SIGKILL:  # to a job, that cancels it, batch script and all
        try:
            steps = run("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i").split()
        except InputError:
            return None
        named = [step for step in steps if step.rpartition(".")[2].isdecimal()]
        if not named:
            return None
    command = ["timeout", "4", "scancel", "--quiet", f"--signal={number.name.removeprefix('SIG')}", *named]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
