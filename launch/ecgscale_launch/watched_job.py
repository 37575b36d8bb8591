"""The doctor's job in SLURM's queue, by what SLURM says and by what it writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from ecgscale.errors import InputError, one_line
from ecgscale.files import read_json_if_there
from ecgscale_launch import slurm
from ecgscale_launch.checkup_job import BEGAN, ENDED, results_of
from ecgscale_launch.diagnosis import Check, some
from ecgscale_launch.findings import doing_in, last_line
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.listing import duration

SEE_TASKS = "see the tasks below"
_GIVE_TIME = "try again with a longer --timeout-s, or ask for less: fewer nodes, another partition"
_LOOK_S = 0.2
_SAY_S = 1.0
_ASK_S = 2.0  # between two questions to SLURM


class WatchedJob:
    """See the module's docstring."""

    def __init__(self, job_id: str, folder: JobFolder) -> None:
        self._job_id, self._folder = job_id, folder
        self._submitted, self._asked = time.time(), 0.0
        self._known: slurm.Known | None = slurm.Known("PENDING")
        self._complaint = ""

    @property
    def began(self) -> dict[str, Any] | None:
        """What it wrote at its begin; None before."""
        return read_json_if_there(results_of(self._folder) / BEGAN)

    @property
    def ended(self) -> dict[str, Any] | None:
        """What it wrote at its end; None before."""
        return read_json_if_there(results_of(self._folder) / ENDED)

    @property
    def nodes(self) -> list[str]:
        """In the order of their ranks; empty where no rank was started."""
        refused = self.ended is not None and self.ended["error"]
        nodes: list[str] = [] if self.began is None or refused else self.began["nodes"]
        return nodes

    def over(self) -> bool:
        """Whether it has written that it has ended, or SLURM says so."""
        if self.ended is not None:
            return True
        if time.monotonic() - self._asked > _ASK_S:
            self._asked = time.monotonic()
            try:
                self._known, self._complaint = slurm.known([self._job_id]).get(self._job_id), ""
            except InputError as error:  # slurmctld restarts
                self._complaint = str(error)
        return self._known is None or self._known.state in slurm.OVER

    def told(self) -> str:
        """Where it stands, for people."""
        if self._complaint or self._known is None:
            return f"job {self._job_id}: {self._complaint or 'SLURM has forgotten it'}"
        if self.began is None:
            reason = f", {self._known.reason}" if self._known.reason else ""
            return f"job {self._job_id}: {self._known.state.lower()}{reason}"
        return f"job {self._job_id}: {doing_in(results_of(self._folder), len(self.began['nodes']))}"

    def judged(self, in_time: bool) -> Check:
        """How the job itself went."""
        began, ended = self.began, self.ended
        lasted = duration(time.time() - self._submitted)
        if ended is not None and began is not None and ended["error"]:
            return Check("job", "fail", one_line(ended["error"]), "mend network.interface in CLUSTER.yaml")
        if ended is not None and began is not None:
            queued, ran = (
                max(0.0, seconds) for seconds in (began["time"] - self._submitted, ended["time"] - began["time"])
            )
            nodes = f"{some(began['nodes'])}, {duration(ran)} after {duration(queued)} in the queue"
            return Check("job", "pass", f"job {self._job_id} on {nodes}")
        if not in_time:
            where = f"not done after {lasted}, cancelled: {self.told()}"
            return Check("job", "fail", where, _GIVE_TIME if began is None else SEE_TASKS)
        state = "GONE" if self._known is None else self._known.state
        words = last_line(sorted(self._folder.batch.glob("*.log")))
        advice = "check python, modules and setup in CLUSTER.yaml, and that the nodes see the folder"
        return Check("job", "fail", f"job {self._job_id} ended {state}" + (f": {words}" if words else ""), advice)


def wait(over: Callable[[], bool], told: Callable[[], str], deadline: float) -> bool:
    """Whether it is over before the deadline; what it is at appears on stderr whenever that changes."""
    shown, said_at = "", 0.0
    while not over():
        now = time.monotonic()
        if now > deadline:
            return False
        if now - said_at > _SAY_S:  # it reads a file of each task
            said_at, line = now, one_line(told())
            if line != shown:
                print(line, file=sys.stderr, flush=True)
            shown = line
        time.sleep(_LOOK_S)
    return True
