"""The ranks of a job as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ecgscale.training.environment import SUPERVISOR


def rank_environment(rank: int, world_size: int, env: Mapping[str, str]) -> dict[str, str]:
    """What one of ``world_size`` ranks on this machine is told beside the environment of this process.

    ``env`` is the job's; of the number of threads alone anybody knows better than the default here.
    """
    cores = max(1, (os.cpu_count() or 1) // world_size)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return threads | dict(env) | {name: str(value) for name, value in place.items()} | {SUPERVISOR: str(os.getpid())}


class LocalRanks:
    """Started ranks, each in a session of its own: Ctrl-C reaches the supervisor alone, which asks them to stop."""

    def __init__(self, folder: Path, argv: list[str], env: dict[str, str], world_size: int, shown: bool) -> None:
        """``argv`` is each rank's; ``shown``: what the first rank says appears here, not in its log in ``folder``.

        Ranks whose starting process is gone save and end by themselves (ecgscale_launch.rank): nobody would see them
        hang.
        """
        self._ranks = []
        for rank in range(world_size):
            own = os.environ | rank_environment(rank, world_size, env)
            with (folder / f"rank-{rank}.log").open("ab") as log:
                out = None if shown and rank == 0 else log
                started = subprocess.Popen(
                    argv, env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
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
