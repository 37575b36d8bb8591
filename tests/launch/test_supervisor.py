"""What follows when an attempt ends: the decisions alone, with made-up ranks; real ones are in test_slurm_jobs.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ecgscale.errors import InputError
from ecgscale.files import read_json_if_there
from ecgscale_launch import supervisor as module
from ecgscale_launch.attempt import first_error
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.launch_config import LaunchConfig, NetworkConfig
from ecgscale_launch.step import codes_in
from ecgscale_launch.supervisor import Place, Supervisor
from small_jobs import put_checkpoint

KILLED = -int(signal.SIGKILL)


class MadeUp:
    """Ranks that do what a script says: run for some looks, then end with these codes."""

    def __init__(self, codes: dict[int, int], looks: int = 1, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._codes, self._looks, self._meanwhile = codes, looks, meanwhile
        self.told: list[signal.Signals] = []

    def ended(self) -> bool:
        self._looks -= 1
        if self._looks == 0:
            self._meanwhile()
        return self._looks < 0

    def codes(self) -> dict[int, int]:
        return self._codes if self._looks < 0 else {}

    def tell(self, number: signal.Signals) -> None:
        self.told.append(number)

    def kill(self) -> None:
        self._looks, self._codes = -1, dict.fromkeys(self._codes, KILLED)


class AskedMeanwhile(MadeUp):
    """The warning comes while the ranks run."""

    def codes(self) -> dict[int, int]:
        signal.raise_signal(signal.SIGUSR2)
        return super().codes()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The supervisor is alone in its process; here it is not."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Trial:
    """A job folder, and a supervisor whose attempts are made up."""

    def __init__(self, run: Path) -> None:
        self.folder = JobFolder.of(run)
        self.folder.path.mkdir(parents=True)
        self.requeued = 0
        self.ranks: list[MadeUp] = []

    def run(self, *attempts: MadeUp, in_queue: bool = True, retries: int = 2, hang_s: float = 0, **more: str) -> int:
        left = iter(attempts)

        def start(_: Path, env: dict[str, str]) -> MadeUp:
            assert env["MASTER_PORT"].isdecimal()
            self.ranks.append(next(left))
            return self.ranks[-1]

        def requeue() -> None:
            self.requeued += 1

        cluster = LaunchConfig(save_s=1, hang_s=hang_s, retries=retries, **more)
        place = Place(["n1", "n2"], start, "7", requeue if in_queue else None)
        code = Supervisor(self.folder, cluster, place).run()
        assert next(left, None) is None, "not all attempts were made"
        return code

    def checkpoint(self, step: int) -> None:
        put_checkpoint(self.folder.run / "checkpoints", step)

    def error(self, attempt: int, rank: int, kind: str, line: str, time: float) -> None:
        path = self.folder.attempt(attempt) / f"rank-{rank}.error.json"
        path.write_text(
            json.dumps({"rank": rank, "host": "n", "kind": kind, "line": line, "time": time, "traceback": "x"})
        )

    @property
    def state(self) -> dict:
        return read_json_if_there(self.folder.state) or {}

    @property
    def outcomes(self) -> list[str]:
        return [attempt["outcome"] for attempt in self.state["attempts"]]


@pytest.fixture
def trial(tmp_path, monkeypatch) -> Trial:
    monkeypatch.setattr(module, "_LOOK_S", 0.001)
    monkeypatch.setattr(module, "_SETTLE_S", 0.01)
    monkeypatch.setattr(module, "_DUMP_S", 0.0)
    monkeypatch.setattr(module, "_KEPT_S", 0.5)
    return Trial(tmp_path / "run")


def asks(number: signal.Signals) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def test_done(trial) -> None:
    assert trial.run(MadeUp({0: 0, 1: 0})) == 0
    assert (trial.state["phase"], trial.outcomes, trial.requeued) == ("done", ["done"], 0)


def test_a_warning_saves_and_requeues_once(trial) -> None:
    ranks = AskedMeanwhile({0: 75, 1: 75}, looks=20)
    assert trial.run(ranks) == 0
    assert ranks.told == [signal.SIGUSR2]
    assert (trial.state["phase"], trial.outcomes, trial.requeued) == ("requeued", ["stopped"], 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_job_requeues_it_or_not(trial, number) -> None:
    """SIGTERM comes from scancel or from a requeue that is already under way."""
    assert trial.run(MadeUp({0: 75}, 5, asks(number))) == 75
    assert (trial.state["phase"], trial.requeued) == ("stopped", 0)


def test_nobody_requeues_on_one_machine(trial) -> None:
    assert trial.run(MadeUp({0: 75}, 5, asks(signal.SIGUSR2)), in_queue=False) == 75
    assert trial.state["phase"] == "stopped"


def test_too_late_a_save_is_cut_off_and_requeued(trial) -> None:
    assert trial.run(AskedMeanwhile({0: 75}, looks=10**9)) == 0
    assert (trial.outcomes, trial.requeued) == (["killed"], 1)


def test_bad_input_is_not_tried_again(trial) -> None:
    ranks = MadeUp({0: 2, 1: 2}, 3, lambda: trial.error(1, 1, "input", "shards: nowhere", 1.0))
    assert trial.run(ranks) == 2
    assert trial.state["error"]["line"] == "shards: nowhere"
    assert (trial.state["phase"], trial.outcomes) == ("failed", ["refused"])


def test_crashes_without_progress_are_bounded(trial) -> None:
    assert trial.run(*(MadeUp({0: 1, 1: KILLED}) for _ in range(3))) == 1
    assert (trial.state["phase"], trial.state["restarts"], trial.requeued) == ("failed", 2, 0)
    assert trial.state["error"]["line"] == "rank 1 was killed (SIGKILL), by somebody or for want of memory"


def test_an_interface_that_is_not_there_is_told_where_people_look(trial) -> None:
    place = Place(["n1"], lambda *_: MadeUp({0: 0}), "7", lambda: None)
    cluster = LaunchConfig(network=NetworkConfig(interface="nowhere0"))
    assert Supervisor(trial.folder, cluster, place).run() == 2
    assert (trial.state["phase"], trial.outcomes) == ("failed", ["refused"])
    assert trial.state["error"]["line"].startswith("network.interface nowhere0: ")


def test_a_failing_disk_is_tried_again(trial) -> None:
    """It ends with the exit code of bad input too."""
    ranks = MadeUp({0: 2}, 3, lambda: trial.error(1, 0, "error", "OSError: [Errno 5]", 1.0))
    assert trial.run(ranks, MadeUp({0: 0})) == 0
    assert trial.outcomes == ["crashed", "done"]


def test_the_rank_that_was_killed_is_named_not_those_that_were_ended_for_it(trial) -> None:
    class KilledFirst(MadeUp):
        def codes(self) -> dict[int, int]:
            return super().codes() or {5: KILLED}

    assert trial.run(KilledFirst({0: 0, 1: 0, 5: KILLED}, 10**9), retries=0) == 1
    assert trial.state["error"]["line"].startswith("rank 5 was killed")


def test_a_warning_that_came_before_anybody_listened(trial) -> None:
    ranks = MadeUp({0: 75}, 20)
    early = [signal.SIGUSR2]
    place = Place(["n1"], lambda *_: ranks, "7", lambda: None)
    assert Supervisor(trial.folder, LaunchConfig(save_s=5, hang_s=0, retries=1), place, early).run() == 0
    assert (ranks.told[0], trial.state["phase"]) == (signal.SIGUSR2, "requeued")


def test_crashing_when_asked_to_stop_is_no_failure(trial) -> None:
    assert trial.run(AskedMeanwhile({0: 1}, looks=20), retries=0) == 0
    assert (trial.state["phase"], trial.state["failures_without_progress"], trial.requeued) == ("requeued", 0, 1)


def test_ranks_that_never_begin_are_a_hang(trial) -> None:
    assert trial.run(MadeUp({0: 0}, 10**9), hang_s=0.1) == 0
    assert "no rank has begun within 0.1 s" in trial.state["attempts"][0]["what"]


def test_a_checkpoint_between_crashes_is_progress(trial) -> None:
    attempts = [MadeUp({0: KILLED}, 3, lambda step=step: trial.checkpoint(step)) for step in range(1, 7)]
    assert trial.run(*attempts, MadeUp({0: 0})) == 0
    assert trial.outcomes == ["crashed"] * 6 + ["done"]


def test_crashes_are_requeued_where_asked(trial) -> None:
    assert trial.run(MadeUp({0: 1}), after_failure="requeue") == 0
    assert trial.requeued == 1


def test_failures_are_counted_over_requeues(trial, monkeypatch) -> None:
    for start in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        code = trial.run(MadeUp({0: 1}), after_failure="requeue")
    assert (code, trial.requeued, trial.state["requeues"], trial.state["phase"]) == (1, 2, 2, "failed")


def test_a_hang_is_named_dumped_and_requeued(trial) -> None:
    folder = trial.folder.attempt(1)
    ranks = MadeUp({0: 0, 1: 0}, 10**9)

    def alive(rank: int, count: int, phase: str) -> None:
        about = {"rank": rank, "host": f"n{rank}", "count": count, "phase": phase, "step": 9, "time": 1.0}
        (folder / f"rank-{rank}.alive.json").write_text(json.dumps(about | {"first_step": None}))

    folder.mkdir(parents=True)
    alive(0, 41, "backward")
    alive(1, 39, "batch")
    assert trial.run(ranks, hang_s=0.2) == 0
    assert (trial.outcomes, trial.requeued) == (["hung"], 1)
    assert signal.SIGUSR1 in ranks.told
    assert "rank 1 on n1 is stuck in batch at step 9" in trial.state["attempts"][0]["what"]


def test_a_hang_names_no_rank_that_has_ended(trial) -> None:
    folder = trial.folder.attempt(1)
    folder.mkdir(parents=True)
    for rank, count, phase, ended in ((0, 40, "", True), (1, 44, "save", False)):
        about = {"rank": rank, "host": f"n{rank}", "count": count, "phase": phase, "step": 9, "time": 1.0}
        about |= {"first_step": None, "ended": ended}
        (folder / f"rank-{rank}.alive.json").write_text(json.dumps(about))
    trial.run(MadeUp({0: 0, 1: 0}, 10**9), hang_s=0.2)
    assert "rank 1 on n1 is stuck in save at step 9" in trial.state["attempts"][0]["what"]


def test_what_is_outside_of_steps_is_no_hang(trial) -> None:
    folder = trial.folder.attempt(1)
    folder.mkdir(parents=True)
    about = {"rank": 0, "host": "n", "count": 5, "phase": "", "step": 9, "time": 1.0, "first_step": None}
    (folder / "rank-0.alive.json").write_text(json.dumps(about))
    assert trial.run(MadeUp({0: 0}, 500), hang_s=0.1) == 0
    assert trial.outcomes == ["done"]


def test_a_job_that_cannot_be_requeued_says_how_to_go_on(trial, monkeypatch, capsys) -> None:
    monkeypatch.setattr(module, "_REQUEUE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "_REQUEUE_TRIES", 3)

    def requeue() -> None:
        raise InputError("scontrol requeue failed: no answer")

    place = Place(["n1"], lambda *_: MadeUp({0: 1}), "7", requeue)
    cluster = LaunchConfig(save_s=1, hang_s=0, retries=1, after_failure="requeue")
    assert Supervisor(trial.folder, cluster, place).run() == 75
    assert f"ecgscale-launch resume {trial.folder.run}" in capsys.readouterr().err


def test_the_first_error_that_follows_from_no_other(trial) -> None:
    trial.folder.attempt(1).mkdir(parents=True)
    trial.error(1, 0, "lost", "lost another rank", 10.0)
    trial.error(1, 2, "error", "OutOfMemoryError: 4 GiB", 11.0)
    trial.error(1, 3, "error", "ValueError: later", 12.0)
    folder = trial.folder.attempt(1)
    assert first_error(folder, {0: 1, 2: 1, 3: 1})["line"] == "OutOfMemoryError: 4 GiB"
    assert first_error(folder, {0: 1, 1: KILLED})["line"].startswith("rank 1 was killed")
    assert first_error(folder, {0: 1})["line"] == "lost another rank"


def test_what_srun_says_of_tasks() -> None:
    log = """\
srun: error: n2: task 1: Killed
srun: error: n1: tasks 0,2-3: Exited with exit code 75
srun: error: n4: task 7: Segmentation fault (core dumped)
srun: error: n4: task 8: Out Of Memory
srun: Force Terminated StepId=1.0
"""
    assert codes_in(log) == {0: 75, 1: KILLED, 2: 75, 3: 75, 7: -int(signal.SIGSEGV), 8: KILLED}
