"""ecgscale: pretrain ECG encoders without labels on millions of recordings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ecgscale.inference import ECGModel

__version__ = "0.1.0"


def load(path: str | Path, encoder: str = "") -> ECGModel:
    """A trained model from a run folder or an export folder; see ``ECGModel.embed``.

    ``encoder`` names the class of its encoder, package.module:Class, where that is not one of ours: a model's own word
    imports nothing. Raises InputError where the folder is neither.
    """
    from ecgscale import inference  # imports torch, which a version or a help text need not wait for

    return inference.load(path, encoder)
