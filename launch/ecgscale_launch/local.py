"""The ranks of a job as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from ecgscale_launch.rank import QUIET


class LocalRanks:
    """Started ranks, each in a session of its own: Ctrl-C reaches the supervisor alone, which asks them to stop."""

    def __init__(self, folder: Path, argv: list[str], env: dict[str, str], world_size: int, shown: bool) -> None:
        """``argv`` is each rank's; ``shown``: what the first rank says appears here, not in its log in ``folder``."""
        self._ranks = []
        cores = max(1, (os.cpu_count() or 1) // world_size)
        of_all = {"OMP_NUM_THREADS": str(cores)} | os.environ | env
        of_all |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        for rank in range(world_size):
            own = of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"rank-{rank}.log").open("ab") as log:
                out = None if shown and rank == 0 else log
                started = subprocess.Popen(
                    [*QUIET, *argv], env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            self._ranks.append(started)

    def ended(self) -> bool:
        """Whether no rank runs any more."""
        return all(rank.poll() is not None for rank in self._ranks)

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, negative for a signal."""
        codes = {rank: process.poll() for rank, process in enumerate(self._ranks)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def kill(self) -> None:
        """End all ranks and what they have started, at once."""
        for rank in self._ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()
