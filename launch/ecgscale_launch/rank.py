"""What each task of a job runs: ``python -m ecgscale_launch.rank ATTEMPT_FOLDER COMMAND``.

What the command is given stands in config.yaml of the job's folder. The task takes its place among the ranks from what
srun (or the supervisor, on one machine) tells, and leaves in the attempt's folder what the supervisor and people want
to know: where it stands, its first error, its stacks when asked by SIGUSR1.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecgscale import progress, stopping, yaml_text
from ecgscale.cli import run_as_command, run_values
from ecgscale.errors import InputError, MachineError, one_line, system_error, tells_of_lost_rank
from ecgscale.files import write_json_or_say
from ecgscale.training.environment import HANG_S, SAVE_S, SUPERVISOR
from ecgscale_launch.commands import OF_RANKS
from ecgscale_launch.job_folder import JobFolder

_LOOK_S = 0.2
_LAST_WORD_S = 2.0  # for writing that this rank has ended


def main(arguments: list[str]) -> int:
    """Run the command as one rank; its exit code."""
    folder, command = Path(arguments[0]), arguments[1]
    # Before everything slow: until now signals were ignored.
    stopping.listen() if command in OF_RANKS else stopping.leave_when_asked()
    place_from_slurm()
    rank = int(os.environ.get("RANK", "0"))
    with (folder / f"rank-{rank}.stacks.txt").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        over = threading.Event()
        report = threading.Thread(target=_report, args=(folder / f"rank-{rank}.alive.json", rank, over), daemon=True)
        report.start()
        try:
            code = run_as_command("ecgscale", _recorded(folder, rank), [command])
        except BaseException:  # told here, since it must not wait at the exit for threads of the libraries
            traceback.print_exc()
            code = 1
        for number in (signal.SIGUSR2, signal.SIGTERM):  # Python's own end would let them kill
            signal.signal(number, signal.SIG_IGN)
        over.set()
        report.join(_LAST_WORD_S)
        if code not in (0, stopping.STOPPED_EXIT_CODE):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        faulthandler.unregister(signal.SIGUSR1)
        return code


def place_from_slurm() -> None:
    """RANK and its like, which PyTorch and DeepSpeed read, from what srun says. GPUs are hidden from nobody."""
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0]


def _recorded(attempt: Path, rank: int) -> Callable[[list[str]], int]:
    """The `ecgscale` command, with its error written down before it is told."""

    def run(command: list[str]) -> int:
        try:
            return run_values(command[0], yaml_text.read(JobFolder.of_attempt(attempt).config))
        except stopping.Stopped:
            raise
        except BaseException as error:
            about = {"rank": rank, "host": _node(), "time": time.time(), "kind": kind_of(error)}
            line = one_line(f"{type(error).__name__}: {error}" if about["kind"] == "error" else str(error))
            path = attempt / f"rank-{rank}.error.json"
            write_json_or_say(path, about | {"line": line, "traceback": traceback.format_exc()})
            raise

    return run


def kind_of(error: BaseException) -> str:
    """Who caused it.

    ``input``: the user, and no retry mends it. ``machine``: a disk or a network, told in one line. ``lost``: it follows
    from another rank's. ``error``: all others, told with their traceback.
    """
    if isinstance(error, OSError):
        error = system_error(error)
    if isinstance(error, InputError | MachineError):
        return "input" if isinstance(error, InputError) else "machine"
    return "lost" if tells_of_lost_rank(error) else "error"


def _report(path: Path, rank: int, over: threading.Event) -> None:
    """Write where this rank stands every few seconds, when the first step is done, and at its end."""
    # All ranks together write some 32 times per second at most: the folder is on a disk that all share.
    every_s = max(2.0, int(os.environ.get("WORLD_SIZE", "1")) / 32)
    every_s = min(every_s, float(os.environ.get(HANG_S, "0")) / 4 or every_s)
    about: dict[str, Any] = {"rank": rank, "host": _node(), "pid": os.getpid(), "first_step": None, "ended": False}
    first, written = None, 0.0
    orphans = _OrphanWatch()
    while not about["ended"]:
        orphans.look()
        about["ended"] = over.wait(_LOOK_S if written else 0.0)
        now = progress.now()
        if first is None and now.phase in progress.OF_A_STEP:
            first = now.step
        if about["first_step"] is None and first is not None and now.step > first:
            about["first_step"], written = now.since, 0.0
        if time.monotonic() - written >= every_s or not written or about["ended"]:
            said = {"step": now.step, "phase": now.phase, "count": now.count, "since": now.since, "time": time.time()}
            write_json_or_say(path, about | said)
            written = time.monotonic()


class _OrphanWatch:
    """Ends this rank where the process that started it on this machine is gone: first asks, then insists.

    No signal of the kernel (PR_SET_PDEATHSIG) does: one that comes while a rank starts would be ignored.
    """

    def __init__(self) -> None:
        self._parent = int(os.environ.get(SUPERVISOR, "0"))
        self._save_s = float(os.environ.get(SAVE_S, "60"))
        self._asked_at: float | None = None

    def look(self) -> None:
        if not self._parent or os.getppid() == self._parent:
            return
        now = time.monotonic()
        if self._asked_at is None:
            print(f"ecgscale-launch is gone (process {self._parent}): saving and ending", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            self._asked_at = now
        elif now - self._asked_at > self._save_s:
            os.killpg(0, signal.SIGKILL)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
