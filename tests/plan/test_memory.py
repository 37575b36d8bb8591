"""Memory of a plan against what DeepSpeed holds and what a process takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ecgscale.cost import Costs, parameters
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import objective_config
from ecgscale.plan.check import predicted_memory
from ecgscale.plan.memory import Parallel, memory_of, share, state_bytes
from ecgscale.plan.trial import Trial, peak_bytes
from ecgscale.run_folder import checkpoints
from ecgscale.training.checkpoint import Checkpoint
from ecgscale.training.engine import BUCKET, EngineConfig
from small_jobs import NO_DROPOUT, SMALL

TINY = PRESETS["tiny"]
DRY = replace(TINY, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0)


def test_state_of_each_stage_is_what_the_zero_paper_says():
    sizes, n, ranks = (600, 300, 100), 1000, 4
    expected = {
        0: (2, 2, 12),
        1: (2, 2, 12 / ranks),
        2: (2, 2 / ranks, 12 / ranks),
        3: (2 / ranks, 2 / ranks, 12 / ranks),
    }
    for stage, bytes_of_parameter in expected.items():
        state = state_bytes(sizes, Parallel(stage, ranks, "bf16", "cuda", whole_below=0))
        found = (state.weights, state.gradients, state.masters + state.moments)
        assert found == tuple(n * each for each in bytes_of_parameter)
    assert state_bytes(sizes, Parallel(0, 4, "fp32", "cuda")).masters == 0
    assert state_bytes(sizes, Parallel(1, 4, "bf16", "cuda")).bucket == 2 * n
    assert state_bytes((n, BUCKET), Parallel(1, 4, "bf16", "cuda")).bucket == 2 * BUCKET
    for stage, bytes_of_frozen in {1: 2 + 4, 3: 2 / ranks + 4}.items():
        assert state_bytes(sizes, Parallel(stage, ranks, "bf16", "cuda"), (400, 80)).frozen == 480 * bytes_of_frozen
    assert state_bytes(sizes, Parallel(1, ranks, "fp32", "cuda"), (400, 80)).frozen == 480 * 4
    offloaded = state_bytes(sizes, Parallel(2, 4, "bf16", "cuda", offload=True))
    assert (offloaded.masters, offloaded.moments, offloaded.host) == (0, 0, 16 * n / 4)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (2, 8), (3, 8)])
def test_shares_are_padded_to_equal_ones(stage, ranks):
    sizes = (101, 50, 7)
    own = share(sizes, stage, ranks)
    assert sum(sizes) <= own * ranks <= sum(sizes) + (2 * ranks if stage < 3 else len(sizes) * ranks)


def test_peaks_grow_with_rows_and_shrink_with_checkpointing_and_stage():
    costs = Costs(PRESETS["huge"], objective_config(), 2500)

    def peak(stage: int, rows: int, layers: int = 0) -> int:
        return memory_of(costs, Parallel(stage, 64, "bf16", "cuda"), rows, layers).peak

    assert peak(1, 16) < peak(1, 32) < peak(1, 64)
    assert peak(1, 64, layers=36) < peak(1, 64, layers=6) < peak(1, 64)
    assert peak(2, 2) < peak(1, 2) < peak(0, 2)


def test_peak_is_within_a_tenth_of_what_a_process_takes():
    trial = Trial(TINY, EngineConfig(zero_stage=1), rows=16)
    measured = max(peak_bytes(trial, threads=1).values())
    assert predicted_memory(trial).peak == pytest.approx(measured, rel=0.1)


def test_optimizer_state_and_checkpoint_are_exact(shards, jobs, tmp_path):
    run = tmp_path / "run"
    jobs.run(2, ["pretrain", *SMALL, *NO_DROPOUT, "--data.shards", str(shards), "--run.dir", str(run),
                 "--train.steps=1"])  # fmt: skip
    state = Checkpoint.open(checkpoints(run / "checkpoints")[-1])
    model = ModelConfig(**state.state["config"]["model"])
    objective = objective_config(**state.state["config"]["objective"])
    n = sum(parameters(model, objective).values())
    assert sum(t.numel() for t in state.tensors("weight").values()) == n
    tensor_bytes = 0
    for file, about in state.state["files"].items():
        with (state.folder / file).open("rb") as opened:
            tensor_bytes += about["bytes"] - 8 - int.from_bytes(opened.read(8), "little")
    assert tensor_bytes == 12 * n


def test_state_of_a_rank_is_what_deepspeed_holds():
    from ecgscale.plan.trial import engine_of

    for stage in (1, 2, 3):
        trial = Trial(replace(DRY, depth=1), EngineConfig(zero_stage=stage, whole_below=0), rows=2, samples=320)
        engine, batch = engine_of(trial)
        engine.backward(engine.forward(batch)[0])
        engine.step(0.0)
        held = engine._base_optimizer.state.values()
        sizes = tuple(parameters(trial.model, trial.objective).values())
        assert sum(one["exp_avg"].numel() for one in held) == share(sizes, stage, 1)
        assert (
            4 * engine._engine.zero_reduce_bucket_size() == state_bytes(sizes, Parallel(stage, 1, "fp32", "cpu")).bucket
        )
