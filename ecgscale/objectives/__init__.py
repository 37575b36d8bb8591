"""Objectives: modules that own the encoder and its heads and map a batch to one loss with named parts."""

from __future__ import annotations

from difflib import get_close_matches

from ecgscale.errors import InputError
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives.pretraining import ObjectiveConfig, Pretraining

__all__ = ["OBJECTIVES", "ObjectiveConfig", "Pretraining", "build_objective"]

OBJECTIVES = {"wav2vec2": Pretraining, "cmsc": Pretraining, "wav2vec2+cmsc": Pretraining}


def build_objective(
    model: ModelConfig, config: ObjectiveConfig, seed: int, activation_checkpointing: bool = False
) -> Pretraining:
    """The objective that ``config.name`` names; raises InputError for an unknown one."""
    if config.name not in OBJECTIVES:
        near = get_close_matches(config.name, OBJECTIVES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(OBJECTIVES)}"
        raise InputError(f"objective.name {config.name!r} is unknown{hint}")
    return OBJECTIVES[config.name](model, config, seed, activation_checkpointing)
