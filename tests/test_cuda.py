"""On a GPU: the model's losses and gradients as on the CPU, a real bf16 ZeRO-1 run, and the kernels at model size.

Run by `make gpu`.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.objectives import OBJECTIVES, build_objective, objective_config
from ecgscale.simulate import Simulation
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.ranks import exact_fp32, start_ranks
from ecgscale.training.transfer import Transfer
from ecgscale_kernels import forced, lead_masked_conv_stem, lead_masked_patch_embed
from small_jobs import config_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and ECGSCALE_GPU=1; `make gpu` sets it"),
    pytest.mark.filterwarnings("ignore"),  # of deepspeed, in this process
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_equal_those_of_the_cpu(small_model_config, make_batch, name) -> None:
    config = config_of(name, codes=16, code_width=16, negatives=20)
    objective = build_objective(small_model_config, config, seed=3, rate_hz=500).eval()
    counts_BLT = torch.randint(-2000, 2000, (8, 12, 1003), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    pairs = {"segment_B": torch.arange(2).repeat_interleave(4), "position_B": torch.arange(4).repeat(2)}
    batch = make_batch(counts_BLT, gain_BL=torch.full((8, 12), 1e-3), patient_B=pairs["position_B"], **pairs)
    found = []
    exact_fp32()
    for device in ("cpu", "cuda"):
        objective.to(device).zero_grad()
        loss, _ = objective(batch.to(torch.device(device)), share=False)
        loss.backward()
        found.append((loss.item(), {n: p.grad.cpu() for n, p in objective.named_parameters() if p.grad is not None}))
    (loss_cpu, grad_cpu), (loss_cuda, grad_cuda) = found
    assert loss_cuda == pytest.approx(loss_cpu, rel=1e-4)
    largest = max(grad.norm() for grad in grad_cpu.values())
    for name, grad in grad_cpu.items():
        assert (grad_cuda[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-5 * largest, name


def test_bf16_zero_1_run(tmp_path) -> None:
    ingest(Simulation(patients=32), tmp_path / "data", IngestOptions())
    arguments = ["--config", "configs/pretrain/tiny.yaml", "--engine.precision=bf16", "--train.steps=40"]
    assert main(["pretrain", *arguments, f"--data.shards={tmp_path / 'data'}", f"--run.dir={tmp_path / 'run'}"]) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = [event["train/loss"] for event in events if "train/loss" in event]
    assert losses[-1] < losses[0]


def test_kernels_give_the_same_bits_twice() -> None:
    """At the size of a model, where every multiprocessor has work."""
    torch.manual_seed(0)
    signal_BLT = torch.randint(-2000, 2000, (128, 12, 2500), dtype=torch.int16, device="cuda")
    gain_BL = torch.rand(128, 12, device="cuda").round() * 1e-3
    rows = (signal_BLT, gain_BL, torch.zeros_like(gain_BL))

    def learned(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16().requires_grad_()

    patch = [learned(768, 12, 16), learned(768)]
    stem = [learned(256, 12 if block == 0 else 256, 2) for block in range(4)] + [learned(256), learned(256)]

    def both() -> list[Tensor]:
        with forced("triton"):
            token_BND = lead_masked_patch_embed(*rows, *patch)
            feature_BNC = lead_masked_conv_stem(*rows, stem[:4], [None] * 4, *stem[4:])
        total = token_BND.float().square().sum() + feature_BNC.float().square().sum()
        return [token_BND, feature_BNC, *torch.autograd.grad(total, patch + stem)]

    first = both()
    for _ in range(3):
        assert all(torch.equal(one, again) for one, again in zip(first, both(), strict=True))


def test_kernel_bench_measures_triton(tmp_path) -> None:
    assert main(["bench", "kernel", "--quick", "--no-compile", "--device=cuda", f"--out={tmp_path}"]) == 0
    report = json.loads(next(tmp_path.glob("kernel-*.json")).read_text())
    ops = [section for section in report["sections"] if section["title"].startswith(("Patch", "Convolutional"))]
    for section in ops:
        assert section["rows"][0][0] == "ecgscale, Triton"
        assert not any("WRONG" in cell for row in section["rows"] for cell in row)
        assert all(check["passed"] for check in section["checks"])
    scalars = {name: value for section in report["sections"] for name, value in section["scalars"].items()}
    kept = [name for name in scalars if name.endswith("kept_mb")]
    assert kept
    assert all(0 < scalars[name] <= scalars[name.replace("kept", "peak")] for name in kept)
    assert {"step/triton/ms", "step/reference/ms"} <= set(scalars)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_micro_step_never_waits_for_the_gpu(small_model_config, make_batch, precision) -> None:
    """Forward and backward are only queued; tests/training/test_waits.py counts what the update reads."""
    ranks = start_ranks()
    config = objective_config(codes=16, code_width=16, negatives=20)
    objective = build_objective(small_model_config, config, seed=3, rate_hz=500)
    engine = Engine(objective, EngineConfig(precision=precision, zero_stage=1), ranks, accumulation=1, micro_batch=8)
    pairs = {"segment_B": torch.arange(2).repeat_interleave(4), "position_B": torch.arange(4).repeat(2)}
    counts_BLT = torch.randint(-2000, 2000, (8, 12, 1000), dtype=torch.int16)
    batch = make_batch(counts_BLT, gain_BL=torch.full((8, 12), 1e-3), patient_B=pairs["position_B"], **pairs)
    pinned = batch.pin_memory()

    def micro_step() -> None:
        loss, _ = engine.forward(engine.put(pinned))
        engine.backward(loss)

    for _ in range(5):  # kernels are compiled, cuBLAS is set up, and what DeepSpeed does from some step on has begun
        micro_step()
        assert engine.step(1e-4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.step(1e-4)


A_SECOND = 2_000_000_000  # about, in a GPU's cycles


@pytest.fixture
def random_batch(make_batch):
    return lambda: make_batch(torch.randint(-2000, 2000, (64, 12, 2500), dtype=torch.int16)).pin_memory()


@pytest.fixture
def put() -> Transfer:
    return Transfer(torch.device("cuda", torch.cuda.current_device()))


def test_a_batch_is_copied_beside_what_the_gpu_computes(random_batch, put) -> None:
    torch.cuda._sleep(A_SECOND)
    put(random_batch())
    copied = put.copied()
    copied.synchronize()
    assert not torch.cuda.current_stream().query(), "the copy is through before the computation"


def test_what_computes_with_a_batch_waits_for_its_copy(random_batch, put) -> None:
    batch = random_batch()
    with torch.cuda.stream(put.stream):
        torch.cuda._sleep(A_SECOND)
    moved = put(batch)
    assert torch.equal((moved.signal_BLT + 0).cpu(), batch.signal_BLT)


def test_memory_of_a_batch_is_not_given_away_while_it_is_still_read(random_batch, put) -> None:
    first, others = random_batch(), [random_batch() for _ in range(4)]
    moved = put(first)
    torch.cuda._sleep(A_SECOND)
    read = moved.signal_BLT + 0  # queued behind the sleep
    del moved
    kept = [put(other) for other in others]
    put.copied().synchronize()
    assert not torch.cuda.current_stream().query(), "the others were copied before the first was read"
    assert torch.equal(read.cpu(), first.signal_BLT)
    assert len(kept) == len(others)


def test_autocast_reaches_the_stem_in_triton(small_model_config, random_batch, put) -> None:
    stem = build_objective(small_model_config, objective_config(), seed=3, rate_hz=500).encoder.stem.cuda()
    with torch.autocast("cuda", torch.bfloat16), forced("triton"):
        assert stem(put(random_batch())).dtype == torch.bfloat16


def test_step_bench_measures_every_way(tmp_path) -> None:
    options = ["--quick", "--preset=tiny", "--batch=4", "--precision=bf16", "--device=cuda", f"--out={tmp_path}"]
    assert main(["bench", "step", *options]) == 0
    (section,) = json.loads(next(tmp_path.glob("step-*.json")).read_text())["sections"]
    label = "tiny/conv/b4/bf16/zero1/r1/cuda"
    ways = ("ecgscale", "ddp", "straightforward")
    assert all(section["scalars"][f"{label}/{way}/ecg_per_s"] > 0 for way in ways)
    assert all(0 < section["scalars"][f"{label}/{way}/peak_gb"] < 10 for way in ways)
    assert all(check["passed"] for check in section["checks"]), "losses or gradients differ"


def test_largest_batch_is_found_where_memory_runs_out(tmp_path) -> None:
    """By a limit, which takes fewer trials than the GPU's own."""
    options = ["--quick", "--preset=tiny", "--find-batch", "--memory-gb=0.5", f"--out={tmp_path}"]
    assert main(["bench", "step", *options, "--device=cuda", "--against"]) == 0
    (section,) = json.loads(next(tmp_path.glob("step-*.json")).read_text())["sections"]
    (largest,) = [value for name, value in section["scalars"].items() if name.endswith("largest_batch")]
    (peak,) = [value for name, value in section["scalars"].items() if name.endswith("peak_gb")]
    assert largest >= 1
    assert peak <= 0.5 * 1.01
