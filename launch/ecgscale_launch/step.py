"""The ranks of a job as the tasks of one step of SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ecgscale_launch import slurm

_ENDED = re.compile(r"srun: error: [^:]+: tasks? (?P<tasks>[\d,\-]+): (?P<how>.*)")
_HOW = {
    "Killed": -signal.SIGKILL,
    "Terminated": -signal.SIGTERM,
    "Aborted": -signal.SIGABRT,
    "Segmentation fault": -signal.SIGSEGV,
    "Bus error": -signal.SIGBUS,
    "Out Of Memory": -signal.SIGKILL,
}
_KILL_TIMEOUT_S = 60.0


class StepRanks:
    """A step that srun has started on all nodes of the allocation.

    What srun says of tasks that end is read from its log as it comes: it waits for all of them before it ends itself.
    """

    def __init__(self, job_id: str, folder: Path, argv: list[str], env: dict[str, str], world_size: int) -> None:
        """``job_id`` is the one shown; ``argv`` is srun with its options and the command of a task."""
        self._job_id = job_id
        self._log, self._world_size = folder / "srun.log", world_size
        self._telling: list[subprocess.Popen[bytes]] = []
        with self._log.open("ab") as log:
            self._srun = subprocess.Popen(
                argv, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether no task runs any more."""
        return self._srun.poll() is not None

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that are known to have ended, negative for a signal."""
        found = codes_in(self._log.read_text(errors="replace"))
        end = self._srun.poll()
        if end is None:
            return found
        if end and not found:  # srun itself failed, or tells nothing: no rank came to be, or its node is gone
            return dict.fromkeys(range(self._world_size), end if end > 0 else 1)
        return {rank: found.get(rank, 0) for rank in range(self._world_size)}

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to every task."""
        self._telling = [one for one in self._telling if one.poll() is None]
        if not self.ended() and (telling := slurm.signal_steps(self._job_id, number)):
            self._telling.append(telling)

    def kill(self) -> None:
        """End all tasks at once, and every signal that is still on its way."""
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while not self.ended() and time.monotonic() < deadline:
            self.tell(signal.SIGKILL)
            try:
                self._srun.wait(2.0)
            except subprocess.TimeoutExpired:
                continue
        if not self.ended():
            print("ecgscale-launch: a node does not answer; srun is killed", file=sys.stderr)
            self._srun.kill()
            self._srun.wait()
        for telling in self._telling:
            telling.terminate()
        for telling in self._telling:
            telling.wait()


def codes_in(log: str) -> dict[int, int]:
    """Exit codes of the tasks of which srun has said that they ended otherwise than with 0."""
    codes: dict[int, int] = {}
    for line in log.splitlines():
        if said := _ENDED.match(line):
            how = said["how"]
            number = re.search(r"Exited with exit code (\d+)", how)
            code = int(number[1]) if number else next((c for name, c in _HOW.items() if name in how), 1)
            for first, _, last in (part.partition("-") for part in said["tasks"].split(",")):
                codes |= dict.fromkeys(range(int(first), int(last or first) + 1), code)
    return codes
