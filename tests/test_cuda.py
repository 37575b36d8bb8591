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
from ecgscale.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from ecgscale.simulate import Simulation
from ecgscale.training.transfer import Transfer
from ecgscale_kernels import forced, lead_masked_conv_stem, lead_masked_patch_embed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and ECGSCALE_GPU=1; `make gpu` sets it"),
    pytest.mark.filterwarnings("ignore"),  # of deepspeed, in this process
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_equal_those_of_the_cpu(small_model_config, make_batch, name) -> None:
    config = ObjectiveConfig(name=name, codes=16, code_width=16, negatives=20)
    objective = build_objective(small_model_config, config, seed=3, rate_hz=500).eval()
    counts_BLT = torch.randint(-2000, 2000, (8, 12, 1003), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    pairs = {"segment_B": torch.arange(2).repeat_interleave(4), "position_B": torch.arange(4).repeat(2)}
    batch = make_batch(counts_BLT, gain_BL=torch.full((8, 12), 1e-3), patient_B=pairs["position_B"], **pairs)
    found = []
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


def test_a_micro_step_never_waits_for_the_gpu(small_model_config, make_batch) -> None:
    """Forward and backward are only queued. DeepSpeed's update reads the gradient's norm, once per step."""
    config = ObjectiveConfig(codes=16, code_width=16, negatives=20)
    objective = build_objective(small_model_config, config, seed=3, rate_hz=500).cuda().train()
    pairs = {"segment_B": torch.arange(2).repeat_interleave(4), "position_B": torch.arange(4).repeat(2)}
    counts_BLT = torch.randint(-2000, 2000, (8, 12, 1000), dtype=torch.int16)
    batch = make_batch(counts_BLT, gain_BL=torch.full((8, 12), 1e-3), patient_B=pairs["position_B"], **pairs)
    pinned = batch.pin_memory()

    def micro_step() -> None:
        loss, _ = objective(pinned.to(torch.device("cuda")), share=False)
        (loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))).backward()

    micro_step()  # kernels are compiled and cuBLAS is set up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in objective.parameters())


def test_a_batch_is_copied_beside_what_the_gpu_computes(make_batch) -> None:
    batch = make_batch(torch.randint(-2000, 2000, (64, 12, 2500), dtype=torch.int16)).pin_memory()
    put = Transfer(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda._sleep(2_000_000_000)  # about a second
    moved = put(batch)
    put.stream.synchronize()
    assert not torch.cuda.current_stream().query(), "the copy is through before the computation"
    assert torch.equal(moved.signal_BLT.cpu(), batch.signal_BLT)


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
