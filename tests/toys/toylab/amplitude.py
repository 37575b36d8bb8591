"""A small objective of one's own: how large each lead is, told from the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model import EncoderConfig
from ecgscale.objectives import Objective
from ecgscale.objectives.augmentation import as_values
from ecgscale.objectives.keys import LeadMasking
from ecgscale.objectives.objective import Draws, Encoded


class Amplitude(Objective):
    """Regresses the deviation of each lead, seen through a fixed random mixture of the leads."""

    @dataclass(frozen=True)
    class Config(LeadMasking):
        """Keys of the amplitude objective."""

        mixtures: int = 5
        """Mixtures of leads whose deviations are told."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.mixtures < 1:
                raise InputError(f"objective.mixtures {self.mixtures}: give 1 or more")

    segments = 1
    named_losses = ("amplitude",)
    shape_keys = ("mixtures",)
    training_only = ("mixture",)
    config: Config

    def __init__(
        self,
        model: EncoderConfig,
        config: Config,
        seed: int,
        rate_hz: float,
        activation_checkpointing: bool | int = False,
    ) -> None:
        super().__init__(model, config, seed, rate_hz, activation_checkpointing)
        self.amplitude_head = nn.Linear(model.width, config.mixtures)
        self.mixture = nn.Linear(len(LEADS), config.mixtures, bias=False).requires_grad_(False)

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        deviation_BL = as_values(batch).signal_BLT.std(dim=2)
        right_BK = self.mixture(deviation_BL.to(self.mixture.weight.dtype)).float()
        told_BK = self.amplitude_head(encoded.embedding_BD.to(self.amplitude_head.weight.dtype)).float()
        loss = torch.nn.functional.mse_loss(told_BK, right_BK)
        return loss, {"amplitude": loss}
