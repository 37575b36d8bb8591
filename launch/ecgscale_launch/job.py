"""Jobs in SLURM's queue, through submitit: the only place that knows it.

submitit writes the batch script and keeps what the batch process runs; that process is the supervisor, which starts
the ranks itself. The script `exec`s it, so that the warning signal, which goes to the script alone, reaches it.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecgscale.errors import InputError
from ecgscale_launch import slurm
from ecgscale_launch.folder import JobFolder, code_environment

# Of what a shell inside of another job has, and what sites set for all: only this reaches a new job.
_KEPT = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_QOS", "SBATCH_RESERVATION")
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Batch:
    """What submitit keeps and runs on the first node of a job. Plain values: the job's own code reads them."""

    folder: str
    srun: list[str]  # with its options
    rank: list[str]  # the command of a rank, before the attempt's folder
    command: list[str]
    world_size: int
    interface: str
    meeting_timeout_s: float
    save_s: float
    hang_s: float
    retries: int
    requeue_crashed: bool

    def __call__(self) -> None:
        asked: list[int] = []  # meanwhile; submitit's own handlers would requeue
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda number, _: asked.append(number))
        from ecgscale_launch.results import collect_above
        from ecgscale_launch.step import StepRanks
        from ecgscale_launch.supervisor import Limits, Supervisor

        folder, job_id = JobFolder(Path(self.folder)), shown_id(os.environ)
        code = code_environment(folder, os.environ)

        def start(attempt: Path, env: dict[str, str]) -> StepRanks:
            output = f"--output={attempt}/rank-%t.log"
            argv = [*self.srun, output, *self.rank, str(attempt), "--", *self.command]
            return StepRanks(job_id, attempt, argv, code | env, self.world_size)

        limits = Limits(self.save_s, self.hang_s, self.retries, self.requeue_crashed)
        nodes = slurm.expand(os.environ["SLURM_JOB_NODELIST"])
        supervisor = Supervisor(folder, limits, start, nodes, job_id, asked)
        ended = supervisor.run(self.interface, self.meeting_timeout_s, lambda: slurm.requeue(job_id))
        if supervisor.done:
            collect_above(folder.run)
        sys.stderr.flush()
        os._exit(ended)  # submitit would pickle a result and print a traceback of its own


def shown_id(environment: os._Environ[str]) -> str:
    """The job's number as SLURM shows it: that of an array's task is ``ARRAY_TASK``."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM for one job, or for each task of an array."""

    name: str
    folder: Path  # of submitit: pickles and batch logs
    python: str
    setup: list[str]  # lines of shell
    options: dict[str, Any]  # of sbatch, by long name; None and "" are left out
    signal_s: int
    after: tuple[str, ...] = ()  # jobs that must have succeeded
    at_once: int = 0  # tasks of an array that run at the same time; 0: all
    requeue: bool = True  # after a preemption or the loss of a node

    def executor(self) -> Any:
        import submitit

        try:
            executor = submitit.SlurmExecutor(folder=self.folder, python=f"exec {shlex.quote(self.python)}")
        except RuntimeError as error:
            raise InputError("srun is not on the PATH: is this a SLURM cluster? --local N runs here") from error
        own: dict[str, Any] = {"signal": f"B:USR2@{self.signal_s}", "requeue" if self.requeue else "no-requeue": True}
        if self.after:
            own |= {"dependency": f"afterok:{':'.join(self.after)}", "kill-on-invalid-dep": "yes"}
        given = {name: value for name, value in self.options.items() if value not in (None, "", 0)}
        executor.update_parameters(
            job_name=self.name,
            time=None,
            wckey=None,
            use_srun=False,
            stderr_to_stdout=True,
            setup=self.setup,
            additional_parameters=given | own,
            array_parallelism=self.at_once or 1_000_000,
        )
        return executor


def script(request: Request, tasks: int = 1) -> str:
    """The batch script, as `submit` will hand it to sbatch."""
    executor = request.executor()
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def test(request: Request, tasks: int) -> None:
    """Let sbatch look at a job, or an array of ``tasks``, without submitting it; InputError with its complaint."""
    with _as_from_a_login_shell(request):
        slurm.test(script(request, tasks))


@contextmanager
def _as_from_a_login_shell(request: Request) -> Iterator[None]:
    """Without the variables of a job around this one, and without those that sbatch would hold above the script."""
    before = dict(os.environ)
    kept = {name for name in _KEPT if name.removeprefix("SBATCH_").lower() not in request.options}
    for name in before:
        if (name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_")) and name not in kept) or name in _OF_A_RANK:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def submit(request: Request, batches: Sequence[Callable[[], None]]) -> list[str]:
    """Put one job, or an array of several, into the queue; their numbers."""
    from submitit.core.utils import FailedJobError

    request.folder.mkdir(exist_ok=True, mode=0o700)
    executor = request.executor()
    try:
        with _as_from_a_login_shell(request):
            if len(batches) == 1:
                jobs = [executor.submit(batches[0])]
            else:
                with executor.batch():
                    jobs = [executor.submit(batch) for batch in batches]
    except FailedJobError as error:
        raise InputError(f"sbatch: {_complaint(str(error))}") from error
    return [str(job.job_id) for job in jobs]


def _complaint(text: str) -> str:
    lines = [line.partition("error: ")[2] for line in text.splitlines() if "sbatch: error: " in line]
    return "; ".join(lines) or text.splitlines()[0]
