"""The encoder and its parts.

To add one: a file with a subclass of Encoder, its ``Config`` in it, and its name here. One of your own needs no name
here: ``model.encoder: package.module:Class``.
"""

from __future__ import annotations

from ecgscale.model.base import Encoder, EncoderConfig
from ecgscale.registry import Registry

__all__ = ["DEFAULT", "ENCODERS", "Encoder", "EncoderConfig", "build_encoder"]

ENCODERS: Registry[Encoder] = Registry(
    "model.encoder",
    "ecgscale.model.base:Encoder",
    {"transformer": "ecgscale.model.encoder:ECGEncoder"},
    by="--encoder NAME; in a config init.encoder, or of pretraining model.encoder",
)
DEFAULT = "transformer"  # what models of earlier versions are, which do not say it


def build_encoder(config: EncoderConfig, activation_checkpointing: bool | int = False) -> Encoder:
    """The encoder that ``config.encoder`` names, of new weights; so many of its blocks are recomputed in training.

    Raises InputError for an unknown name, and where it has fewer blocks.
    """
    encoder = ENCODERS.find(config.encoder)(config)
    encoder.recompute(activation_checkpointing)
    return encoder
