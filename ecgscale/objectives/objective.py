"""What every objective is: a module that owns the encoder and its heads and maps a batch to one loss with named parts.

Shape suffixes: B rows, M masked places, K negatives, G code groups, V codes of a group, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.model.encoder import ECGEncoder, Features, ModelConfig, mean_over_time
from ecgscale.objectives.augmentation import add_noise, check_noise, check_rate
from ecgscale.objectives.masking import TimeMask, draw_leads
from ecgscale_kernels import LeadDraw

CODES = ("code_groups", "codes", "code_width")  # keys that the local head's shape depends on
NONE = ["none"]  # no augmentation, where the objective has some of its own


@dataclass(frozen=True)
class ObjectiveConfig:
    """The pretraining objective; ``name`` chooses it, and most other keys belong to some of them."""

    name: str = "wav2vec2+cmsc"
    """wav2vec2 (local), cmsc (global), wav2vec2+cmsc, simclr or 3kg."""
    lead_mask_probability: float = 0.5
    """Random lead masking: each lead of each segment is dropped with this probability; 0 turns it off."""
    augmentations: list[str] = field(default_factory=list)
    """Noise that is added before leads are masked: any of power_line, emg, baseline_shift, baseline_wander. Empty: the
    objective's own, which is all four for simclr and none for the others. none alone: none for simclr either."""
    augmentation_probability: float = 1.0
    """Each augmentation is added to each segment with this probability."""
    time_mask_share: float = 0.35
    """Share of the tokens that are masked."""
    time_mask_span: int = 10
    """Tokens of one masked span."""
    negatives: int = 100
    """Negatives of each masked place."""
    local_temperature: float = 0.1
    """Temperature of the local contrast."""
    global_temperature: float = 0.1
    """Temperature of the global contrast: of cmsc, simclr and 3kg."""
    time_mask_rule: Literal["fixed", "reference"] = "fixed"
    """fixed: the same number of masked tokens in each row. reference: spans for 0.65 of the tokens before overlap, then
    every row of the contrast batch is trimmed to the least covered one; the number differs from step to step."""
    global_form: Literal["reference", "nt_xent"] = "reference"
    """Of cmsc. reference: each segment against the other segments of all pairs. nt_xent: against all others, as in the
    paper."""
    code_groups: int = 2
    """Codebooks of the quantizer."""
    codes: int = 320
    """Codes of each codebook."""
    code_width: int = 256
    """Width of the quantised targets and of the predictions."""
    gumbel_start: float = 2.0
    """Gumbel temperature at the first step."""
    gumbel_end: float = 0.5
    """Lowest Gumbel temperature."""
    gumbel_factor: float = 0.999995
    """Factor on the Gumbel temperature per step."""
    diversity_weight: float = 0.1
    """Weight of the code diversity penalty."""
    feature_weight: float = 10.0
    """Weight of the mean square of the stem's output."""

    def __post_init__(self) -> None:
        for name in ("lead_mask_probability", "time_mask_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"objective.{name} {getattr(self, name)}: give a probability below 1")
        if not 0 <= self.augmentation_probability <= 1:
            raise InputError(
                f"objective.augmentation_probability {self.augmentation_probability}: give a probability from 0 to 1"
            )
        if self.augmentations != NONE:
            check_noise(self.augmentations)
        for name in ("negatives", "time_mask_span", "code_groups", "codes", "code_width"):
            if getattr(self, name) < 1:
                raise InputError(f"objective.{name} {getattr(self, name)}: give 1 or more")
        for name in ("local_temperature", "global_temperature", "gumbel_start", "gumbel_end", "gumbel_factor"):
            if getattr(self, name) <= 0:
                raise InputError(f"objective.{name} {getattr(self, name):g}: give a positive number")
        for name in ("diversity_weight", "feature_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"objective.{name} {getattr(self, name):g}: give 0 or more")
        if self.code_width % self.code_groups:
            raise InputError(f"objective.code_width {self.code_width} is no multiple of code_groups {self.code_groups}")


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


class Objective(nn.Module):
    """Owns the encoder; objectives add their heads, and say what a batch becomes and what its loss is."""

    augmentations: ClassVar[tuple[str, ...]] = ()
    """What an empty ``objective.augmentations`` stands for."""
    named_losses: ClassVar[tuple[str, ...]] = ()
    """Those of the parts that `loss` gives which are losses of their own."""

    def __init__(
        self,
        model: ModelConfig,
        config: ObjectiveConfig,
        seed: int,
        rate_hz: float,
        activation_checkpointing: bool | int = False,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.rate_hz = config, seed, rate_hz
        self.encoder = ECGEncoder(model, activation_checkpointing)

    @classmethod
    def check(cls, model: ModelConfig, config: ObjectiveConfig, data: DataConfig, rate_hz: float) -> None:
        """Raises InputError, naming the key, where nothing can be learnt from segments such as these."""
        check_rate(cls.noise(config), rate_hz)

    @classmethod
    def noise(cls, config: ObjectiveConfig) -> tuple[str, ...]:
        """The augmentations that are added, by name."""
        if config.augmentations == NONE:
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

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What an objective is about."""
        raise NotImplementedError

    @torch.no_grad()
    def view(self, batch: ECGBatch) -> ECGBatch:
        """The batch with its augmentations, before leads and tokens are masked; itself where there are none."""
        noise = self.noise(self.config)
        if not noise:
            return batch
        return add_noise(batch, noise, self.seed, self.config.augmentation_probability, self.rate_hz)

    def draw(self, batch: ECGBatch, share: bool) -> Draws:
        """Masks and noise of a batch, from the seed and the rows' positions alone."""
        probability = self.config.lead_mask_probability
        return Draws(draw_leads(batch, self.seed, probability) if probability else None)

    def encode(self, batch: ECGBatch, draws: Draws) -> Encoded:
        """One pass of the encoder over what the draws leave of a batch."""
        features = self.encoder.features(batch.with_lead_draw(draws.lead_draw))
        masked_BN = draws.time_mask.masked_BN if draws.time_mask else None
        return Encoded(features, self.encoder.contextualise(features.token_BND, features.valid_BN, masked_BN))

    def after_step(self, step: int) -> None:
        """Update what is not trained, such as a teacher's frozen parameters or a buffer; called after each update.

        All ranks call it together, without gradients, and its parameters are whole and in fp32 meanwhile. What it
        writes must be the same on all ranks. Steps that were skipped do not call it.
        """
