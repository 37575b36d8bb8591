"""What every objective is: a module that owns the encoder and its heads and maps a batch to one loss with named parts.

Shape suffixes: B rows, M masked places, K negatives, G code groups, V codes of a group, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.model import ENCODERS, Encoder, EncoderConfig, build_encoder
from ecgscale.model.base import Features, mean_over_time
from ecgscale.objectives.augmentation import NO_NOISE, add_noise, check_rate
from ecgscale.objectives.keys import LeadMasking, Noise, ObjectiveConfig
from ecgscale.objectives.masking import TimeMask, draw_leads
from ecgscale_kernels import LeadDraw


class Draws(NamedTuple):
    """What is hidden from the encoder and drawn for the heads: everything random about one pass, but dropout."""

    lead_draw: LeadDraw | None = None  # None where no lead is masked
    time_mask: TimeMask | None = None  # these three where there is a local part
    negative_BMK: Tensor | None = None
    gumbel_BMGV: Tensor | None = None  # None out of training: the best code


class Encoded(NamedTuple):
    """What the encoder gives for a batch."""

    features: Features  # before any masking in time
    context_BND: Tensor  # after the transformer

    @property
    def embedding_BD(self) -> Tensor:
        """Mean of the transformer's output over the valid tokens, float32."""
        return mean_over_time(self.context_BND, self.features.valid_BN)


class Objective(nn.Module, ABC):
    """Owns the encoder; objectives add their heads, and say what a batch becomes and what its loss is.

    Leads are masked and noise is added where the objective's ``Config`` has the keys of it: LeadMasking, Noise.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    """A frozen dataclass of the keys that the objective has, each with a default but ``name``."""
    augmentations: ClassVar[tuple[str, ...]] = ()
    """What an empty ``objective.augmentations`` stands for."""
    named_losses: ClassVar[tuple[str, ...]] = ()
    """Those of the parts that `loss` gives which are losses of their own."""
    segments: ClassVar[int] = 2
    """Adjacent segments of a recording that are read at each position, one row of the batch for each: 1 or 2, as many
    as random numbers are kept apart for (see ``rng``)."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Parts, the first words of their weights' names, that an export leaves out: it holds all others."""
    shape_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of ``Config`` that the shapes of its heads depend on."""

    config: ObjectiveConfig

    def __init__(
        self,
        model: EncoderConfig,
        config: ObjectiveConfig,
        seed: int,
        rate_hz: float,
        activation_checkpointing: bool | int = False,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.rate_hz = config, seed, rate_hz
        self.encoder = build_encoder(model, activation_checkpointing)

    @classmethod
    def check(cls, model: EncoderConfig, config: ObjectiveConfig, data: DataConfig, rate_hz: float) -> None:
        """Raises InputError, naming the key, where nothing can be learnt from segments such as these."""
        if cls.segments not in (1, 2):
            raise InputError(f"objective.name {config.name}: reads {cls.segments} segments; give its class 1 or 2")
        if why := cls.misfit(ENCODERS.find(model.encoder)):
            raise InputError(f"model.encoder {model.encoder}: does not go with objective.name {config.name}, {why}")
        check_rate(cls.noise(config), rate_hz)

    @classmethod
    def misfit(cls, encoder: type[Encoder]) -> str:
        """Why an encoder does not fit; nothing where it does."""
        return ""

    @classmethod
    def noise(cls, config: ObjectiveConfig) -> tuple[str, ...]:
        """The augmentations that are added, by name."""
        if not isinstance(config, Noise) or config.augmentations == NO_NOISE:
            return ()
        return tuple(config.augmentations) or cls.augmentations

    def forward(self, batch: ECGBatch, step: int = 0, share: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named parts. ``share``: the rows are a part of a contrast batch that is spread over the ranks."""
        batch = self.view(batch)
        return self.losses(batch, self.draw(batch, share), step, share)

    def losses(self, batch: ECGBatch, draws: Draws, step: int, share: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, with it among its parts, of a batch as ``view`` gives it and for given draws."""
        loss, parts = self.loss(self.encode(batch, draws), batch, draws, step, share)
        return loss, {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}

    @abstractmethod
    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What an objective is about: the loss of the whole batch, on each rank, and its named parts."""

    @torch.no_grad()
    def view(self, batch: ECGBatch) -> ECGBatch:
        """The batch with its augmentations, before leads and tokens are masked; itself where there are none."""
        config, noise = self.config, self.noise(self.config)
        if not isinstance(config, Noise) or not noise:
            return batch
        return add_noise(batch, noise, self.seed, config.augmentation_probability, self.rate_hz)

    def draw(self, batch: ECGBatch, share: bool) -> Draws:
        """Masks and noise of a batch, from the seed and the rows' positions alone."""
        config = self.config
        if not isinstance(config, LeadMasking) or not config.lead_mask_probability:
            return Draws()
        return Draws(draw_leads(batch, self.seed, config.lead_mask_probability))

    def encode(self, batch: ECGBatch, draws: Draws) -> Encoded:
        """One pass of the encoder over what the draws leave of a batch."""
        features = self.encoder.features(batch.with_lead_draw(draws.lead_draw))
        masked_BN = draws.time_mask.masked_BN if draws.time_mask else None
        return Encoded(features, self.encoder.contextualise(features.token_BND, features.valid_BN, masked_BN))

    def at_start(self) -> None:
        """Set what depends on the weights that a run begins with, such as a teacher that is a copy of the encoder.

        Called once, before the first step of a new run, when the weights of ``init.model`` are there.
        """

    def after_step(self, step: int) -> None:
        """Update what is not trained, such as a teacher's frozen parameters or a buffer; called after each update.

        All ranks call it together, without gradients, and its parameters are whole and in fp32 meanwhile. What it
        writes must be the same on all ranks. Steps that were skipped do not call it.
        """
