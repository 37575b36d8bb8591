"""An objective of one's own with state: the encoder follows its own average, which sees all leads (as in data2vec)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.model import EncoderConfig
from ecgscale.model.base import mean_over_time
from ecgscale.objectives import Objective
from ecgscale.objectives.keys import LeadMasking
from ecgscale.objectives.objective import Draws, Encoded


class Follow(Objective):
    """Regresses what an exponential moving average of the encoder says of the same segment."""

    @dataclass(frozen=True)
    class Config(LeadMasking):
        """Keys of the teacher."""

        teacher_momentum: float = 0.99
        """Share of the teacher that a step keeps."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.teacher_momentum <= 1:
                raise InputError(f"objective.teacher_momentum {self.teacher_momentum:g}: give 0 to 1")

    segments = 1
    training_only = ("teacher",)
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
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = nn.Linear(model.width, model.width)

    def at_start(self) -> None:
        self.teacher.load_state_dict(self.encoder.state_dict())

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.teacher.eval()  # the engine sets the training mode of all modules, and a teacher drops nothing
        with torch.no_grad():
            features = self.teacher.features(batch)
            context_BND = self.teacher.contextualise(features.token_BND, features.valid_BN, None)
            right_BD = mean_over_time(context_BND, features.valid_BN)
        told_BD = self.predictor(encoded.embedding_BD.to(self.predictor.weight.dtype)).float()
        return torch.nn.functional.mse_loss(told_BD, right_BD), {}

    def after_step(self, step: int) -> None:
        for average, weight in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            average.lerp_(weight, 1 - self.config.teacher_momentum)
