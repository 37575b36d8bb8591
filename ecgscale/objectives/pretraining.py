"""Local + global self-supervision with random lead masking: W2V + CMSC + RLM (Oh et al. 2022), or any part of it.

Shape suffixes: B rows, L leads, N tokens, M masked places, K negatives, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.model.encoder import ECGEncoder, ModelConfig, mean_over_time
from ecgscale.objectives.cmsc import cmsc_loss
from ecgscale.objectives.gather import gather_rows
from ecgscale.objectives.masking import (
    TimeMask,
    draw_leads,
    gumbel_noise,
    negatives,
    reference_time_mask,
    time_mask,
)
from ecgscale.objectives.wav2vec2 import LocalHead
from ecgscale_kernels import LeadDraw


@dataclass(frozen=True)
class ObjectiveConfig:
    """The pretraining objective; ``name`` chooses its parts."""

    name: str = "wav2vec2+cmsc"
    """wav2vec2 (local), cmsc (global) or wav2vec2+cmsc."""
    lead_mask_probability: float = 0.5
    """Random lead masking: each lead of each segment is dropped with this probability; 0 turns it off."""
    time_mask_share: float = 0.35
    """Share of the tokens that are masked."""
    time_mask_span: int = 10
    """Tokens of one masked span."""
    negatives: int = 100
    """Negatives of each masked place."""
    local_temperature: float = 0.1
    """Temperature of the local contrast."""
    global_temperature: float = 0.1
    """Temperature of the global contrast."""
    time_mask_rule: Literal["fixed", "reference"] = "fixed"
    """fixed: the same number of masked tokens in each row. reference: spans for 0.65 of the tokens before overlap, then
    every row of the contrast batch is trimmed to the least covered one; the number differs from step to step."""
    global_form: Literal["reference", "nt_xent"] = "reference"
    """reference: each segment against the other segments of all pairs. nt_xent: against all others, as in the paper."""
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
    """Everything random about one pass, but dropout."""

    lead_draw: LeadDraw | None  # None where no lead is masked
    time_mask: TimeMask | None  # None where there is no local part
    negative_BMK: Tensor | None
    gumbel_BMGV: Tensor | None  # None out of training: the best code


class Pretraining(nn.Module):
    """Owns the encoder and the heads; maps a batch of segment pairs to one loss with named parts."""

    def __init__(
        self, model: ModelConfig, config: ObjectiveConfig, seed: int, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.encoder = ECGEncoder(model, activation_checkpointing)
        self.has_local, self.has_global = "wav2vec2" in config.name, "cmsc" in config.name
        if self.has_local:
            self.local_head = LocalHead(
                model.stem_channels, model.width, config.code_width, config.code_groups, config.codes
            )

    def forward(self, batch: ECGBatch, step: int = 0, share: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named parts. ``share``: the rows are a part of a contrast batch that is spread over the ranks."""
        return self.losses(batch, self.draw(batch, share), step, share)

    def draw(self, batch: ECGBatch, share: bool) -> Draws:
        """Masks, negatives and noise of a batch, from the seed and the rows' positions alone."""
        probability = self.config.lead_mask_probability
        lead_draw = draw_leads(batch, self.seed, probability) if probability else None
        if not self.has_local:
            return Draws(lead_draw, None, None, None)
        mask = self._time_mask(batch, share)
        negative_BMK = negatives(batch, self.seed, mask, self.config.negatives)
        noise_shape = (mask.place_BM.shape[1], self.config.code_groups, self.config.codes)
        gumbel_BMGV = gumbel_noise(batch, self.seed, noise_shape) if self.training else None
        return Draws(lead_draw, mask, negative_BMK, gumbel_BMGV)

    def _time_mask(self, batch: ECGBatch, share: bool) -> TimeMask:
        patch_samples = self.encoder.config.patch_samples
        tokens = batch.signal_BLT.shape[-1] // patch_samples
        valid_B, span = batch.length_B // patch_samples, self.config.time_mask_span
        if self.config.time_mask_rule == "reference":
            return reference_time_mask(batch, self.seed, tokens, valid_B, span, share)
        return time_mask(batch, self.seed, tokens, valid_B, self.config.time_mask_share, span)

    def losses(self, batch: ECGBatch, draws: Draws, step: int, share: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for given draws."""
        features = self.encoder.features(batch.with_lead_draw(draws.lead_draw))
        masked_BN = draws.time_mask.masked_BN if draws.time_mask else None
        context_BND = self.encoder.contextualise(features.token_BND, features.valid_BN, masked_BN)
        loss = torch.zeros((), device=context_BND.device)
        parts: dict[str, Tensor] = {}
        if draws.time_mask is not None:
            local_loss, parts = self._local(features.normed_BNC, features.stem_BNC, context_BND, draws, step, share)
            loss = loss + local_loss
        if self.has_global:
            embedding_BD = mean_over_time(context_BND, features.valid_BN)
            parts["cmsc"] = self._global(embedding_BD, batch, share)
            loss = loss + parts["cmsc"]
        return loss, {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}

    def _local(
        self, normed_BNC: Tensor, stem_BNC: Tensor, context_BND: Tensor, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask, config = draws.time_mask, self.config
        assert mask is not None
        assert draws.negative_BMK is not None
        dropout = self.encoder.config.feature_dropout
        target_BNC = nn.functional.dropout(normed_BNC, dropout, self.training)
        local = self.local_head(
            _at(context_BND, mask.place_BM),
            _at(target_BNC, mask.place_BM),
            draws.negative_BMK,
            (torch.arange(mask.place_BM.shape[1], device=mask.count_B.device) < mask.count_B[:, None]).float(),
            temperature=config.local_temperature,
            gumbel_temperature=max(config.gumbel_end, config.gumbel_start * config.gumbel_factor**step),
            gumbel_BMGV=draws.gumbel_BMGV,
            share=share,
        )
        feature_penalty = stem_BNC.float().square().mean()
        loss = local.info_nce + config.diversity_weight * local.diversity + config.feature_weight * feature_penalty
        parts = {
            "local": local.info_nce,
            "diversity": local.diversity,
            "feature_penalty": feature_penalty,
            "local_accuracy": local.accuracy,
            "soft_perplexity": local.soft_perplexity,
            "code_perplexity": local.code_perplexity,
        }
        return loss, parts

    def _global(self, embedding_BD: Tensor, batch: ECGBatch, share: bool) -> Tensor:
        return cmsc_loss(
            gather_rows(embedding_BD, share),
            gather_rows(batch.patient_B, share),
            gather_rows(batch.segment_B, share),
            self.config.global_temperature,
            self.config.global_form == "nt_xent",
        )


def _at(x_BNC: Tensor, place_BM: Tensor) -> Tensor:
    """(B, M, C) rows of ``x`` at the masked places."""
    return x_BNC.gather(1, place_BM[..., None].expand(-1, -1, x_BNC.shape[-1]))
