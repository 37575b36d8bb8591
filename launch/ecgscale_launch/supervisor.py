"""Runs a job's ranks, attempt after attempt, and decides what follows when one ends: the one place that does.

On SLURM it is the batch process, on the first node; with ``--local`` it is `ecgscale-launch` itself. It never touches
what the ranks compute: they save at step boundaries (ecgscale.stopping), it tells them when.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ecgscale.errors import InputError, MachineError, one_line
from ecgscale.files import read_json_if_there, write_json
from ecgscale.run_folder import newest_step
from ecgscale.stopping import STOPPED_EXIT_CODE
from ecgscale.training.environment import HANG_S
from ecgscale_launch.attempt import Attempt, error_of, first_error
from ecgscale_launch.hangs import HangWatch
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.rendezvous import meeting_environment

_LOOK_S = 0.2
_SETTLE_S = 3.0  # after a rank has failed: for the others to tell their errors, of which the first one counts
_DUMP_S = 3.0  # for the ranks to write their stacks
_TELL_EVERY_S = 2.0  # a rank that is still being started ignores the signal
_KEPT_S = 5.0  # of the warning before the end, for killing what has not saved in time
_REFUSED = 2  # exit code of bad input
_REQUEUE_EVERY_S, _REQUEUE_TRIES = 20.0, 1000  # a controller may be away for long


class Started(Protocol):
    """Ranks that run."""

    def ended(self) -> bool: ...
    def codes(self) -> dict[int, int]: ...
    def tell(self, number: signal.Signals) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Place:
    """Where attempts run: in an allocation of SLURM, or on this machine."""

    nodes: list[str]
    start: Callable[[Path, dict[str, str]], Started]
    """(folder of the attempt, environment) -> its ranks."""
    job_id: str | None = None
    requeue: Callable[[], None] | None = None
    """Asks that the job be started again; None where nobody does."""


class Supervisor:
    """See the module's docstring."""

    def __init__(self, folder: JobFolder, cluster: LaunchConfig, place: Place, asked: Sequence[int] = ()) -> None:
        """``asked`` are signals that came before this could listen."""
        self._folder, self._cluster, self._place = folder, cluster, place
        self._run = folder.run
        self.done = False  # the command has come to its end
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._asked_early = asked
        before: dict[str, Any] = read_json_if_there(folder.state) or {}
        again = place.job_id is not None and before.get("job_id") == place.job_id
        requeued = again and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        self._attempts: list[dict[str, Any]] = before.get("attempts", [])
        if self._attempts and self._attempts[-1]["outcome"] is None:
            self._attempts[-1] |= {"outcome": "killed", "what": "the job was ended without a warning"}
            self._attempts[-1]["step_to"] = newest_step(self._run)
        self._counts = {
            "requeues": before.get("requeues", 0) + requeued,
            "restarts": before.get("restarts", 0),
            "failures_without_progress": before.get("failures_without_progress", 0) if requeued else 0,
        }
        self._error: dict[str, Any] | None = None

    def run(self) -> int:
        """Attempts until the job is done, has failed, was stopped, or is requeued; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._ask)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup
            signal.signal(signal.SIGHUP, self._ask)
        for early in self._asked_early:
            self._ask(early, None)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        while True:
            attempt = self._attempt()
            if attempt.outcome == "done":
                self.done = True
                return self._end("done", 0)
            if self._asked is None and attempt.outcome == "refused":
                return self._fail(attempt, _REFUSED)
            if self._counts_as_failure(attempt):
                self._counts["failures_without_progress"] += 1
                if self._counts["failures_without_progress"] > self._cluster.retries:
                    return self._fail(attempt, 1)
            asked = self._asked is not None or attempt.outcome == "stopped"
            requeue = self._place.requeue
            if (asked and requeue is None) or self._asked not in (None, signal.SIGUSR2):
                if requeue is not None:
                    self._say("SLURM requeues the job, or ends it")
                return self._end("stopped", STOPPED_EXIT_CODE)
            if requeue is not None and (asked or attempt.outcome == "hung" or self._cluster.after_failure == "requeue"):
                self._end("requeued", 0)
                return self._requeue(requeue)
            self._counts["restarts"] += 1
            self._say(f"starting again, failure {self._counts['failures_without_progress']} without a new checkpoint")

    def _counts_as_failure(self, attempt: Attempt) -> bool:
        """Whoever was asked to stop may end as it can; but a save that never fits would be tried for ever."""
        if self._asked is not None:
            return attempt.outcome == "killed" and attempt.first_step is not None and not attempt.progress
        return attempt.outcome in ("crashed", "hung")

    def _requeue(self, requeue: Callable[[], None]) -> int:
        """Ask until it is granted, or the job ends: a job that is not requeued is lost for the night."""
        for _ in range(_REQUEUE_TRIES):
            try:
                requeue()
            except InputError as error:
                if self._asked == signal.SIGTERM:  # has been requeued or cancelled meanwhile
                    return STOPPED_EXIT_CODE
                self._say(f"cannot requeue: {error}")
                time.sleep(_REQUEUE_EVERY_S)
            else:
                return 0
        self._say(f"not requeued; `ecgscale-launch resume {self._run}` goes on")
        return self._end("stopped", STOPPED_EXIT_CODE)

    def _ask(self, number: int, _: FrameType | None) -> None:
        """SIGTERM after SIGUSR2 takes over: whoever sent it ends or requeues the job without us."""
        if self._asked is None:
            self._asked_at = time.monotonic()
        elif self._asked == number == signal.SIGINT:
            self._asked_at = -math.inf  # Ctrl-C twice: at once
        self._asked = signal.Signals(number)

    def _attempt(self) -> Attempt:
        number = len(self._attempts) + 1
        attempt = Attempt(number, self._place.job_id, self._place.nodes, newest_step(self._run))
        self._attempts.append(asdict(attempt))
        folder = self._folder.attempt(number)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        nodes, network = self._place.nodes, self._cluster.network
        try:
            env = meeting_environment(nodes, network.interface, network.timeout_s)
        except InputError as error:
            attempt.outcome, attempt.what, attempt.ended = "refused", str(error), time.time()
            self._error = error_of(str(error), "input")
            return attempt
        meeting = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        self._say(f"attempt {number} on {', '.join(nodes)}, meeting at {meeting}, from step {attempt.step_from}")
        self._write("running")
        ranks = self._place.start(folder, env | {HANG_S: f"{self._cluster.hang_s:g}"})
        try:
            codes, stuck = self._watch(ranks, attempt, folder)
        finally:
            ranks.kill()  # nothing is left running, whatever went wrong here
        self._close(attempt, codes, folder, stuck)
        return attempt

    def _watch(self, ranks: Started, attempt: Attempt, folder: Path) -> tuple[dict[int, int], str | None]:
        """Wait for the end of all ranks, and help it along.

        Returns their exit codes, of those alone that ended by themselves where the others had to be killed; and what is
        stuck where nothing moved for too long.
        """
        told = failed = None
        hangs = HangWatch(folder, self._cluster.hang_s)
        while not ranks.ended():
            now = time.monotonic()
            if self._asked is not None and (told is None or now - told > _TELL_EVERY_S):
                if told is None:
                    self._say(f"{self._asked.name}: the ranks are told to save and stop")
                    self._write("stopping")
                told = now
                ranks.tell(signal.SIGUSR2)
            if self._asked is not None and now - self._asked_at > max(1.0, self._cluster.save_s - _KEPT_S):
                late = f"not saved within {self._cluster.save_s:g} s" if self._asked_at > 0 else "asked twice"
                self._say(f"{late}: the ranks are killed, what is not saved is lost")
                attempt.outcome = "killed"
                return ranks.codes(), None
            if failed is None and any(code not in (0, STOPPED_EXIT_CODE) for code in ranks.codes().values()):
                failed = now
            if failed is not None and now - failed > _SETTLE_S:
                return ranks.codes(), None
            if attempt.first_step is None and (first := hangs.first_step()):
                attempt.first_step = first
                self._write("running" if self._asked is None else "stopping", attempt)
            if failed is None and self._asked is None and (stuck := hangs.stuck()):
                self._say(f"{stuck}; stacks are in {folder}")
                ranks.tell(signal.SIGUSR1)
                time.sleep(_DUMP_S)
                return ranks.codes(), stuck
            time.sleep(_LOOK_S)
        return ranks.codes(), None

    def _close(self, attempt: Attempt, codes: dict[int, int], folder: Path, stuck: str | None) -> None:
        attempt.ended, attempt.step_to = time.time(), newest_step(self._run)
        attempt.first_step = attempt.first_step or HangWatch(folder, 0).first_step()
        if attempt.progress:
            self._counts["failures_without_progress"] = 0
        failures = {rank: code for rank, code in codes.items() if code not in (0, STOPPED_EXIT_CODE)}
        self._error = None
        if stuck:
            attempt.outcome, attempt.what = "hung", stuck
        elif failures and attempt.outcome is None:
            error = first_error(folder, failures)
            attempt.outcome, attempt.what = "refused" if error["kind"] == "input" else "crashed", error["line"]
            self._error = error
        elif attempt.outcome is None:
            attempt.outcome = "stopped" if STOPPED_EXIT_CODE in codes.values() else "done"
        steps = f"step {attempt.step_from} to {attempt.step_to}"
        self._say(f"attempt {attempt.number} {attempt.outcome}, {steps}" + (f": {attempt.what}" * bool(attempt.what)))
        self._write("running", attempt)

    def _fail(self, attempt: Attempt, code: int) -> int:
        rank = "" if self._error is None or self._error["rank"] is None else f"rank {self._error['rank']}: "
        times = self._counts["failures_without_progress"]
        often = f" ({times} failures without a new checkpoint)" if times else ""
        self._attempts[-1] = asdict(attempt)
        self._say(f"failed{often}: {rank}{attempt.what}")
        if self._error is not None and self._error["kind"] == "error" and self._error.get("traceback"):
            print(self._error["traceback"], file=sys.stderr)
        return self._end("failed", code)

    def _end(self, phase: str, code: int) -> int:
        self._say(phase)
        self._write(phase)
        return code

    def _write(self, phase: str, attempt: Attempt | None = None) -> None:
        """A disk that is full or gone must not end ranks that still work; the next change is written again."""
        if attempt is not None:
            self._attempts[-1] = asdict(attempt)
        with suppress(InputError, MachineError):
            write_json(self._folder.state, self._state(phase))

    def _state(self, phase: str) -> dict[str, Any]:
        return {
            "job_id": self._place.job_id,
            "phase": phase,
            "nodes": self._place.nodes,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
            "error": self._error,
            "attempts": self._attempts,
        } | self._counts

    def _say(self, line: str) -> None:
        """For people: the log, and the terminal or the batch log."""
        line = one_line(line)
        with suppress(OSError), self._folder.log.open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        with suppress(OSError):  # a terminal that has gone
            print(f"ecgscale-launch: {line}", file=sys.stderr, flush=True)
