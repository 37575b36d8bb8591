"""Memory of a plan against what autograd keeps, what DeepSpeed holds, and what a process takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ecgscale.cost import parameters
from ecgscale.data.batch import synthetic_batch
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import ObjectiveConfig, build_objective, objective_config
from ecgscale.objectives.cmsc import cmsc_loss
from ecgscale.plan.activations import Storage, layer_bytes, saved_bytes
from ecgscale.plan.check import predicted_memory
from ecgscale.plan.memory import Parallel, memory_of, share, sizes_of, state_bytes
from ecgscale.plan.trial import Trial, peak_bytes
from ecgscale.run_folder import checkpoints
from ecgscale.training.checkpoint import Checkpoint
from ecgscale.training.engine import BUCKET, EngineConfig
from small_jobs import NO_DROPOUT, SMALL

TINY = PRESETS["tiny"]
DRY = replace(TINY, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0)
CASES = {
    "fp32": (TINY, objective_config(), "fp32"),
    "no dropout": (DRY, objective_config(), "fp32"),
    "bf16": (TINY, objective_config(), "bf16"),
    "patch stem": (replace(TINY, stem="patch", patch_samples=25), objective_config(), "fp32"),
    "norm first": (replace(TINY, pre_norm=True), objective_config(), "fp32"),
    "direct convolution": (replace(TINY, position_kernel=15), objective_config(), "fp32"),
    "local alone": (TINY, objective_config(name="wav2vec2"), "fp32"),
    "global alone": (TINY, objective_config(name="cmsc"), "fp32"),
    "nt-xent": (TINY, objective_config(name="cmsc", global_form="nt_xent"), "fp32"),
    "simclr": (TINY, objective_config(name="simclr"), "fp32"),
}


def kept_for_backward(
    model: ModelConfig, objective: ObjectiveConfig, precision: str, layers: int = 0
) -> dict[str, int]:
    """Bytes of the storages that autograd keeps, weights left out, by part of the model."""
    module = build_objective(model, objective, seed=0, rate_hz=500.0, activation_checkpointing=layers)
    module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    batch = synthetic_batch(4, 1250)
    seen = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    alive, kept, inside = [], {}, [""]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            kept[part_of(inside[-1])] = kept.get(part_of(inside[-1]), 0) + storage.nbytes()
        return tensor

    def leave(*_: object) -> None:
        inside.pop()

    for name, one in module.named_modules():
        one.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        one.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch)
    return kept


def part_of(module: str) -> str:
    names = module.split(".")
    if names[0] == "local_head":
        return "local_head"
    return names[1] if len(names) > 1 and names[1] in ("stem", "position", "layers") else "features"


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_keeps(case):
    model, objective, precision = CASES[case]
    predicted = saved_bytes(model, objective, 4, 1250, Storage.on("cpu", precision, model))
    kept = kept_for_backward(model, objective, precision)
    assert predicted["stem"] == kept["stem"]
    assert predicted["layers"] == pytest.approx(kept["layers"], rel=0 if precision == "fp32" else 0.002)
    assert predicted["position"] == pytest.approx(kept["position"], rel=0.001)
    assert predicted.get("local_head", 0) == pytest.approx(kept.get("local_head", 0), rel=0.005)
    assert sum(predicted.values()) == pytest.approx(sum(kept.values()), rel=0.002)


@pytest.mark.parametrize("form", ["reference", "nt_xent"])
def test_a_large_contrast_keeps_what_is_counted(form):
    rows = 512
    batch = synthetic_batch(rows, 1)
    embedding_BD = torch.randn(rows, TINY.width, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cmsc_loss(embedding_BD, batch.patient_B, batch.segment_B, 0.1, form == "nt_xent")
    objective = objective_config(name="cmsc", global_form=form)
    counted = saved_bytes(TINY, objective, 2, 1250, Storage.on("cpu", "fp32", TINY), contrast_rows=rows)["contrast"]
    assert counted == pytest.approx(sum(one.untyped_storage().nbytes() for one in kept.values()), rel=0.02)


def test_checkpointed_layers_keep_their_input_only():
    predicted = saved_bytes(TINY, objective_config(), 4, 1250, Storage.on("cpu", "fp32", TINY), checkpointed_layers=2)
    kept = kept_for_backward(TINY, objective_config(), "fp32", layers=2)
    assert sum(predicted.values()) == pytest.approx(sum(kept.values()), rel=0.002)


def test_fused_attention_keeps_no_weights():
    storage, model = Storage.on("cuda", "fp32", DRY), DRY
    x_BND = torch.randn(2, 40, model.width)
    linear = torch.nn.Linear(model.width, 3 * model.width)
    seen: dict[int, int] = {linear.weight.untyped_storage()._cdata: 0}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        seen.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        q, k, v = linear(x_BND).view(2, 40, 3, model.heads, -1).permute(2, 0, 3, 1, 4)
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    whole = layer_bytes(model, 40, storage)
    without = 2 * 40 * (model.width + model.ffn_width) * 4 + 2 * (40 * (model.width + 2) * 4) - 40 * model.width * 4
    assert sum(seen.values()) == 2 * (whole - without)


def test_a_gpu_keeps_less():
    cpu, gpu = (sum(saved_bytes(TINY, objective_config(), 4, 1250, Storage.on(where, "fp32", TINY)).values())
                for where in ("cpu", "cuda"))  # fmt: skip
    assert gpu < 0.6 * cpu


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted_without_memory(preset):
    model = PRESETS[preset]
    assert sum(sizes_of(model, objective_config())) == sum(parameters(model, objective_config()).values())


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
    offloaded = state_bytes(sizes, Parallel(2, 4, "bf16", "cuda", offload=True))
    assert (offloaded.masters, offloaded.moments, offloaded.host) == (0, 0, 16 * n / 4)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (2, 8), (3, 8)])
def test_shares_are_padded_to_equal_ones(stage, ranks):
    sizes = (101, 50, 7)
    own = share(sizes, stage, ranks)
    assert sum(sizes) <= own * ranks <= sum(sizes) + (2 * ranks if stage < 3 else len(sizes) * ranks)


def test_peaks_grow_with_rows_and_shrink_with_checkpointing_and_stage():
    def peak(stage: int, rows: int, layers: int = 0) -> int:
        model = PRESETS["huge"]
        return memory_of(model, objective_config(), Parallel(stage, 64, "bf16", "cuda"), rows, 2500, layers).peak

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
    n = sum(sizes_of(model, objective))
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
        sizes = sizes_of(trial.model, trial.objective)
        assert sum(one["exp_avg"].numel() for one in held) == share(sizes, stage, 1)
        assert (
            4 * engine._engine.zero_reduce_bucket_size() == state_bytes(sizes, Parallel(stage, 1, "fp32", "cpu")).bucket
        )
