"""Objectives: modules that own the encoder and its heads and map a batch to one loss with named parts.

To add one: a file with a subclass of Objective, its ``Config`` in it, and its name here. One of your own needs no name
here: ``objective.name: package.module:Class``.
"""

from __future__ import annotations

from typing import Any

from ecgscale.model import EncoderConfig
from ecgscale.objectives.keys import ObjectiveConfig
from ecgscale.objectives.objective import Objective
from ecgscale.registry import Registry

__all__ = ["DEFAULT", "OBJECTIVES", "Objective", "ObjectiveConfig", "build_objective", "objective_config"]

OBJECTIVES: Registry[Objective] = Registry(
    "objective.name",
    "ecgscale.objectives.objective:Objective",
    {
        "wav2vec2": "ecgscale.objectives.wav2vec2:Wav2Vec2",
        "cmsc": "ecgscale.objectives.cmsc:CMSC",
        "wav2vec2+cmsc": "ecgscale.objectives.wav2vec2_cmsc:Wav2Vec2CMSC",
        "simclr": "ecgscale.objectives.simclr:SimCLR",
        "3kg": "ecgscale.objectives.three_kg:ThreeKG",
    },
)
DEFAULT = "wav2vec2+cmsc"


def objective_config(name: str = DEFAULT, **keys: Any) -> ObjectiveConfig:
    """The config of a named objective. Raises InputError for an unknown one and for values out of range."""
    return OBJECTIVES.find(name).Config(name=name, **keys)


def build_objective(
    model: EncoderConfig,
    config: ObjectiveConfig,
    seed: int,
    rate_hz: float,
    activation_checkpointing: bool | int = False,
) -> Objective:
    """The objective that ``config.name`` names, for signals of ``rate_hz``; raises InputError for an unknown one."""
    return OBJECTIVES.find(config.name)(model, config, seed, rate_hz, activation_checkpointing)
