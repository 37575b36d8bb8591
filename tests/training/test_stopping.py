"""A run that is asked to stop, at any moment of a step: it saves, says so, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecgscale import progress, stopping
from ecgscale.cli import main
from ecgscale.run_folder import leave_run
from ecgscale.training import checkpoint
from small_jobs import NO_DROPOUT, SMALL, events, losses

EVERY = ["--train.steps=6", "--train.validate_every=4", "--train.validation_recordings=2"]


def job(shards: Path, run: Path) -> list[str]:
    return ["pretrain", *SMALL, *NO_DROPOUT, *EVERY, f"--data.shards={shards}", f"--run.dir={run}"]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(job(shards, run)) == 0
    return run


@pytest.fixture(autouse=True)
def ask(monkeypatch, tmp_path) -> Iterator[list[tuple[int, str]]]:
    """Where this process is asked to stop: each (steps done, phase) once."""
    asked: list[tuple[int, str]] = []
    at = progress.at

    def then_ask(step: int, phase: str) -> None:
        at(step, phase)
        if (step, phase) in asked:
            asked.remove((step, phase))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress, "at", then_ask)
    yield asked
    stopping._asked = False
    leave_run(tmp_path / "run")


def go_on(shards: Path, run: Path) -> int:
    """The same command, in what would be a new process."""
    stopping._asked = False
    leave_run(run)
    return main(job(shards, run))


def validations(run: Path) -> dict[int, float]:
    return {event["step"]: event["validation/loss"] for event in events(run) if event["event"] == "validation"}


@pytest.mark.parametrize("phase", ["batch", "update"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_within_a_step_it_is_finished_and_saved(step, phase, shards, undisturbed, ask, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    ask.append((step, phase))
    assert main(job(shards, run)) == 75
    assert f"stopped as asked at step {step + 1} of 6, which is saved" in capsys.readouterr().err.splitlines()[-1]
    state = checkpoint.latest(run / "checkpoints").state
    assert (state["step"], state["validation_due"]) == (step + 1, step + 1 in (4, 6))
    assert [event["step"] for event in events(run) if event["event"] == "stopped"] == [step + 1]
    assert go_on(shards, run) == 0
    assert losses(run) == losses(undisturbed)
    assert validations(run) == validations(undisturbed)


@pytest.mark.parametrize("step", [4, 6])
def test_within_a_validation_it_is_left_to_the_next_start(step, shards, undisturbed, ask, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    ask += [(step, "validate"), (step, "validate")]
    assert main(job(shards, run)) == 75
    assert checkpoint.latest(run / "checkpoints").state["validation_due"]
    assert step not in validations(run)
    assert go_on(shards, run) == 75
    assert f"stopped before the validation at step {step};" in capsys.readouterr().err.splitlines()[-1]
    assert go_on(shards, run) == 0
    assert losses(run) == losses(undisturbed)
    assert validations(run) == validations(undisturbed)
