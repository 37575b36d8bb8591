"""The model on a GPU: same losses and gradients as on the CPU, and a real bf16 ZeRO-1 run. Run by `make gpu`."""

from __future__ import annotations

import json

import pytest
import torch

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.objectives import ObjectiveConfig, Pretraining
from ecgscale.simulate import Simulation

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and ECGSCALE_GPU=1; `make gpu` sets it"),
    pytest.mark.filterwarnings("ignore"),  # of deepspeed, in this process
]


def test_losses_and_gradients_equal_those_of_the_cpu(small_model_config, make_batch) -> None:
    objective = Pretraining(small_model_config, ObjectiveConfig(codes=16, code_width=16, negatives=20), seed=3).eval()
    counts_BLT = torch.randint(-2000, 2000, (8, 12, 1003), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    batch = make_batch(counts_BLT, gain_BL=torch.full((8, 12), 1e-3), segment_B=torch.arange(2).repeat_interleave(4))
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
