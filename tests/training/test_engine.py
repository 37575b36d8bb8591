"""The engine's arithmetic on a model whose gradient is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch, synthetic_batch
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.ranks import start_ranks

ROWS, NUMBERS, BETA1 = 2, 16, 0.75


class Line(nn.Module):
    """A loss whose gradient is the batch's gain, in each of NUMBERS weights."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(NUMBERS))

    def forward(self, batch: ECGBatch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.slope * batch.gain_BL.mean().to(self.slope.dtype)).sum().float()
        return loss, {"loss": loss.detach()}


@pytest.mark.parametrize("gains", [(3.0,), (1.0, 5.0), (1.0, 2.0, 3.0, 10.0)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_is_the_mean_over_the_micro_steps(stage, precision, gains) -> None:
    config = EngineConfig(zero_stage=stage, precision=precision, beta1=BETA1)
    engine = Engine(Line(), config, start_ranks(), len(gains), ROWS)
    batch = engine.put(synthetic_batch(ROWS, 40))
    for gain in gains:
        loss, _ = engine.forward(batch.with_gain(torch.full_like(batch.gain_BL, gain)))
        engine.backward(loss)
        assert engine.step(learning_rate=0.1)
    mean = sum(gains) / len(gains)
    assert engine.gradient_norm() == pytest.approx(mean * math.sqrt(NUMBERS), rel=1e-6)
    expected = torch.full((NUMBERS,), (1 - BETA1) * mean)
    torch.testing.assert_close(engine.slot("slope", "exp_avg"), expected, rtol=1e-6, atol=0)
