"""SIGKILL at random moments: a run goes on with exactly the recordings that it would have had."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from small_jobs import SMALL, recordings

STEPS, GLOBAL_BATCH, KILLS = 60, 8, 20


@pytest.fixture(scope="module")
def job(shards):
    def make(run: Path) -> list[str]:
        more = [f"--train.steps={STEPS}", "--train.checkpoint_every=2", "--train.log_recordings=true"]
        more += ["--train.contrast_batch=4", "--train.lanes=4", "--data.shuffle_window=3", "--model.depth=1"]
        return ["pretrain", *SMALL, *more, f"--data.shards={shards}", f"--run.dir={run}"]

    return make


@pytest.fixture(scope="module")
def undisturbed(jobs, job, tmp_path_factory) -> dict[int, int]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    jobs.run(1, job(run))
    read = recordings(run)
    assert [position for position, _ in read] == list(range(STEPS * GLOBAL_BATCH))
    return dict(read)


@pytest.mark.parametrize("world_sizes", [[2], [1, 2, 4]], ids=["two ranks", "changing ranks"])
def test_twenty_kills_change_no_sample(jobs, job, undisturbed, tmp_path, world_sizes) -> None:
    chosen, run = random.Random(str(world_sizes)), tmp_path / "run"
    for step in sorted(chosen.sample(range(1, STEPS - 4), KILLS)):
        jobs.killed_after(step, run, chosen.choice(world_sizes), job(run), later_s=chosen.uniform(0, 0.1))
    jobs.run(world_sizes[-1], job(run))
    read = recordings(run)
    assert all(undisturbed[position] == recording for position, recording in read)
    assert {position for position, _ in read} == undisturbed.keys()
    assert len(read) > len(undisturbed)  # what came after a checkpoint was read again
