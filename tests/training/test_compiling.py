"""Compiled layers: the same losses and gradients, and one clear line where they cannot be."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from ecgscale.errors import InputError
from ecgscale.model.base import mean_over_time
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.training.compiling import compile_layers
from ecgscale.training.engine import EngineConfig

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_layers_give_the_same_losses_and_gradients(small_model_config, make_batch) -> None:
    whole = ModelConfig(**vars(small_model_config) | {"dropout": 0.0, "attention_dropout": 0.0, "feature_dropout": 0.0})
    signal_BLT = torch.randint(-2000, 2000, (3, 12, 800), generator=torch.Generator().manual_seed(0))
    batch, found = make_batch(signal_BLT.short(), gain_BL=torch.full((3, 12), 1e-3)), []
    for compiled in (False, True):
        torch.manual_seed(0)
        encoder = ECGEncoder(whole)
        names = list(encoder.state_dict())
        if compiled:
            compile_layers(encoder, CPU)
            assert list(encoder.state_dict()) == names
        loss = mean_over_time(*encoder(batch)).sin().sum()
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}))
    (loss, gradients), (compiled_loss, compiled_gradients) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (compiled_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


def test_no_compiler_is_said_in_one_line(monkeypatch, small_model_config) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"engine\.compile: .*no C\+\+ compiler no-such-compiler"):
        compile_layers(ECGEncoder(small_model_config), CPU)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"engine\.compile: not with engine\.zero_stage 3"):
        EngineConfig(compile=True, zero_stage=3)
    with pytest.raises(InputError, match=r"engine\.activation_checkpointing -1: give 0 or more layers"):
        EngineConfig(activation_checkpointing=-1)
