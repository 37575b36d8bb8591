"""Local + global: W2V + CMSC (Oh et al. 2022), by one pass of the encoder over time-masked segments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.objectives.cmsc import CMSC, global_loss
from ecgscale.objectives.objective import Draws, Encoded
from ecgscale.objectives.wav2vec2 import Wav2Vec2


class Wav2Vec2CMSC(Wav2Vec2):
    """The sum of both; the global one too sees what the time masks leave."""

    @dataclass(frozen=True)
    class Config(Wav2Vec2.Config, CMSC.Config):
        """wav2vec2+cmsc: the sum of the local and the global objective."""

        name: str = "wav2vec2+cmsc"

    named_losses = ("local", "cmsc")
    config: Config

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The two losses, each a mean over its own places or pairs."""
        local_loss, parts = super().loss(encoded, batch, draws, step, share)
        cmsc = global_loss(encoded, batch, self.config, share)
        return local_loss + cmsc, parts | {"cmsc": cmsc}
