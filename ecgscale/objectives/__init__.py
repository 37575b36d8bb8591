"""Objectives: modules that own the encoder and its heads and map a batch to one loss with named parts.

To add one: a file with a subclass of Objective, and its name here.
"""

from __future__ import annotations

from difflib import get_close_matches

from ecgscale.errors import InputError
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives.cmsc import CMSC
from ecgscale.objectives.objective import CODES, Objective, ObjectiveConfig
from ecgscale.objectives.simclr import SimCLR
from ecgscale.objectives.three_kg import ThreeKG
from ecgscale.objectives.wav2vec2 import Wav2Vec2
from ecgscale.objectives.wav2vec2_cmsc import Wav2Vec2CMSC

__all__ = ["CODES", "OBJECTIVES", "Objective", "ObjectiveConfig", "build_objective", "objective_named"]

OBJECTIVES: dict[str, type[Objective]] = {
    "wav2vec2": Wav2Vec2,
    "cmsc": CMSC,
    "wav2vec2+cmsc": Wav2Vec2CMSC,
    "simclr": SimCLR,
    "3kg": ThreeKG,
}


def objective_named(name: str) -> type[Objective]:
    """The objective of that name; raises InputError for an unknown one."""
    if name not in OBJECTIVES:
        near = get_close_matches(name, OBJECTIVES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(OBJECTIVES)}"
        raise InputError(f"objective.name {name!r} is unknown{hint}")
    return OBJECTIVES[name]


def build_objective(
    model: ModelConfig, config: ObjectiveConfig, seed: int, rate_hz: float, activation_checkpointing: bool | int = False
) -> Objective:
    """The objective that ``config.name`` names, for signals of ``rate_hz``; raises InputError for an unknown one."""
    return objective_named(config.name)(model, config, seed, rate_hz, activation_checkpointing)
