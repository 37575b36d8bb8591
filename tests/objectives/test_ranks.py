"""Real runs of the objectives with views: one rank and two, every ZeRO stage, each kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecgscale.training import checkpoint
from small_jobs import NO_DROPOUT, losses, small

STEPS = 2
# fp32 sums over ranks are added up in another order: 1e-7 relative per loss, which Adam amplifies.
TOLERANCE = 2e-5
KINDS = {
    "simclr": ["--objective.name=simclr", "--objective.augmentation_probability=0.7"],
    "3kg": ["--objective.name=3kg", "--objective.augmentations=baseline_wander"],
    "parted": ["--objective.name=simclr", "--objective.augmentation_probability=0.7", "--train.contrast_batch=4"],
}
ON_TWO_RANKS = [("simclr", 0), ("3kg", 1), ("parted", 2), ("simclr", 3), ("3kg", 3)]


def job(shards: Path, run: Path, kind: str, *more: str) -> list[str]:
    few = [f"--train.steps={STEPS}", "--train.validation_recordings=1", "--train.checkpoint_every=1"]
    data = [f"--data.shards={shards}", f"--run.dir={run}"]
    return ["pretrain", *small(*NO_DROPOUT, *KINDS[kind], *few, *data, *more)]


@pytest.fixture(scope="module")
def runs(shards, jobs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    jobs.run(1, *(job(shards, folder / kind, kind) for kind in KINDS))
    two = [job(shards, folder / f"{kind}-{s}", kind, f"--engine.zero_stage={s}") for kind, s in ON_TWO_RANKS]
    jobs.run(2, *two)
    return folder


@pytest.mark.parametrize(("kind", "stage"), ON_TWO_RANKS)
def test_losses_on_two_ranks_equal_those_on_one(runs, kind, stage):
    expected = losses(runs / kind)
    assert len(expected) == STEPS
    assert losses(runs / f"{kind}-{stage}") == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("kind", "stage"), ON_TWO_RANKS)
def test_gradients_on_two_ranks_equal_those_on_one(runs, kind, stage):
    """After the first step, Adam's first moment is a tenth of the gradient."""
    one, two = (
        checkpoint.Checkpoint.open(run / "checkpoints" / "step-00000001").tensors("exp_avg")
        for run in (runs / kind, runs / f"{kind}-{stage}")
    )
    assert one.keys() == two.keys()
    largest = max(gradient.norm() for gradient in one.values())
    assert largest > 0
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


def test_micro_steps_are_contrast_batches_of_their_own(runs):
    assert abs(losses(runs / "parted")[1] - losses(runs / "simclr")[1]) > 1e-3


@pytest.mark.usefixtures("interpreted_kernels")
def test_float_signals_train_alike_with_each_kernel(shards, jobs, tmp_path):
    tiny = ["--data.segment_s=0.3", "--train.global_batch=2", "--train.steps=1"]  # Triton's interpreter is slow
    said = jobs.run(1, job(shards, tmp_path / "triton", "simclr", *tiny), ECGSCALE_KERNELS="triton")
    jobs.run(1, job(shards, tmp_path / "reference", "simclr", *tiny), ECGSCALE_KERNELS="reference")
    assert "conv stem, triton kernels on cpu" in said
    assert losses(tmp_path / "triton")[1] == pytest.approx(losses(tmp_path / "reference")[1], rel=TOLERANCE)


def test_data_that_do_not_fit_are_refused_before_anything_is_written(shards, jobs, tmp_path):
    said = jobs.run(1, job(shards, tmp_path / "run", "3kg", "--data.leads=I,II,V2"), code=2)
    assert said.startswith("ecgscale: data.leads I,II,V2 lacks V1, V3, V4, V5, V6, but objective.name 3kg needs")
    assert not (tmp_path / "run").exists()
