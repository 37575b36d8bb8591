"""A trial's child process: what it does before it measures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ecgscale.model.presets import PRESETS
from ecgscale.plan.trial import Trial, _small, engine_of
from ecgscale.process import memory_bytes
from ecgscale.training.engine import EngineConfig


@pytest.mark.parametrize(("layers", "recomputed"), [(False, 0), (1, 1), (3, 1), (True, 1)])
def test_a_trial_is_warmed_up_however_many_of_its_layers_are_recomputed(layers: bool | int, recomputed: int) -> None:
    """The model of the warm-up has one layer."""
    engine = EngineConfig(zero_stage=0, activation_checkpointing=layers)
    small = _small(Trial(replace(PRESETS["small"], depth=3), engine, rows=64, samples=320))
    assert (small.model.depth, small.rows) == (1, 2)
    assert engine_of(small)[0]._engine.module.encoder.recomputed_layers == recomputed


def test_memory_of_this_process_is_in_bytes() -> None:
    assert 50e6 < memory_bytes("RssAnon") < memory_bytes("VmRSS") <= memory_bytes("VmHWM") < 1e12
