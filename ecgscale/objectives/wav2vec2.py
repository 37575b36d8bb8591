"""The local objective: contrastive prediction of quantised features at masked places (wav2vec 2.0; Oh et al. 2022).

Shape suffixes: B rows, N tokens, M masked places, K negatives, C stem channels, D width, Q code width, G code groups,
V codes of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.model import Encoder, EncoderConfig
from ecgscale.model.dropout import dropout
from ecgscale.model.quantizer import ProductQuantizer, Quantized, one_hot, perplexity
from ecgscale.objectives.gather import sum_over_ranks, world_size
from ecgscale.objectives.keys import (
    LeadMasking,
    Noise,
    ObjectiveConfig,
    Quantizing,
    TimeMasking,
    refuse_below_one,
    refuse_negative,
    refuse_nonpositive,
)
from ecgscale.objectives.masking import TimeMask, gumbel_noise, negatives, reference_time_mask, time_mask
from ecgscale.objectives.objective import Draws, Encoded, Objective
from ecgscale_kernels import info_nce_logits

CODES = ("code_groups", "codes", "code_width")  # keys that the quantizer's shape depends on


class LocalLosses(NamedTuple):
    """Scalars of the local objective over the masked places of all ranks."""

    info_nce: Tensor  # mean over all masked places
    diversity: Tensor  # (V − perplexity) / V over all codes of all groups, in [0, 1)
    accuracy: Tensor  # share of places whose target scores above all negatives
    soft_perplexity: Tensor  # of the average code probabilities
    code_perplexity: Tensor  # of the codes that were chosen


class LocalHead(nn.Module):
    """Quantises targets, projects both sides and compares."""

    def __init__(self, channels: int, width: int, code_width: int, groups: int, codes: int) -> None:
        super().__init__()
        self.quantizer = ProductQuantizer(channels, groups, codes, code_width)
        self.target_projection = nn.Linear(code_width, code_width)
        self.prediction_projection = nn.Linear(width, code_width)

    def forward(
        self,
        context_BMD: Tensor,
        target_BMC: Tensor,
        negative_BMK: Tensor,
        weight_BM: Tensor,
        *,
        temperature: float,
        gumbel_temperature: float,
        gumbel_BMGV: Tensor | None,
        share: bool,
    ) -> LocalLosses:
        """Losses of the masked places: ``context`` from the transformer, ``target`` from the stem.

        ``weight_BM`` is 1 for a real place and 0 for a filler of a padded row; ``share`` says whether the rows are a
        part of a batch that is spread over the ranks.
        """
        quantized = self.quantizer(target_BMC, gumbel_temperature, gumbel_BMGV)
        prediction_BMQ = self.prediction_projection(context_BMD)
        logit_BMK1 = info_nce_logits(
            prediction_BMQ,
            self.target_projection(quantized.code_BMQ),
            quantized.index_BMG,
            negative_BMK,
            temperature,
        )
        total = sum_over_ranks(weight_BM.sum(), share)
        # The engine averages over ranks; times the number of shares, that is the mean over all places.
        scale = (world_size() if share else 1) / total
        loss_BM = logit_BMK1.logsumexp(dim=-1) - logit_BMK1[..., 0]
        right_BM = logit_BMK1[..., 0] > logit_BMK1[..., 1:].amax(dim=-1)
        soft, chosen = self._usage(quantized, weight_BM, total, share)
        codes = self.quantizer.groups * self.quantizer.codes
        return LocalLosses(
            info_nce=(loss_BM * weight_BM).sum() * scale,
            diversity=(codes - soft) / codes,
            accuracy=(right_BM * weight_BM).sum() * scale,
            soft_perplexity=soft.detach(),
            code_perplexity=chosen,
        )

    def _usage(self, quantized: Quantized, weight_BM: Tensor, total: Tensor, share: bool) -> tuple[Tensor, Tensor]:
        """Perplexity of the average probabilities (with gradient) and of the chosen codes, over all ranks."""
        mean_GV = (
            sum_over_ranks((quantized.probability_BMGV * weight_BM[..., None, None]).sum(dim=(0, 1)), share) / total
        )
        chosen_BMGV = one_hot(quantized.index_BMG, self.quantizer.codes) * weight_BM[..., None, None]
        chosen_GV = sum_over_ranks(chosen_BMGV.sum(dim=(0, 1)), share) / total
        return perplexity(mean_GV), perplexity(chosen_GV)


class Wav2Vec2(Objective):
    """The local objective: what stands at masked places, told from what stands at others of the same segment."""

    @dataclass(frozen=True)
    class Config(Quantizing, TimeMasking, Noise, LeadMasking):
        """wav2vec2: what stands at masked places, told from what stands at others of the same segment."""

        name: str = "wav2vec2"
        negatives: int = 100
        """Negatives of each masked place."""
        local_temperature: float = 0.1
        """Temperature of the local contrast."""
        feature_weight: float = 10.0
        """Weight of the mean square of the stem's output."""

        def __post_init__(self) -> None:
            super().__post_init__()
            refuse_below_one(self, "negatives")
            refuse_nonpositive(self, "local_temperature")
            refuse_negative(self, "feature_weight")

    named_losses: ClassVar[tuple[str, ...]] = ("local",)
    shape_keys = CODES
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
        self.local_head = LocalHead(
            self.encoder.feature_width, model.width, config.code_width, config.code_groups, config.codes
        )

    @classmethod
    def check(cls, model: EncoderConfig, config: ObjectiveConfig, data: DataConfig, rate_hz: float) -> None:
        """Raises InputError where a segment has too few masked tokens to tell one from another."""
        super().check(model, config, data, rate_hz)
        assert isinstance(config, TimeMasking)
        tokens = round(data.segment_s * rate_hz) // model.patch_samples
        if round(config.time_mask_share * tokens) < 2:
            raise InputError(
                f"a segment of {data.segment_s:g} s gives {tokens} tokens of {model.patch_samples} samples, "
                "but the local objective needs two masked ones; lower model.patch_samples, give a longer "
                "data.segment_s or choose objective.name cmsc"
            )

    @classmethod
    def misfit(cls, encoder: type[Encoder]) -> str:
        """Why an encoder does not fit."""
        return "" if encoder.masks_tokens else "which needs one that masks tokens"

    def draw(self, batch: ECGBatch, share: bool) -> Draws:
        """Lead masks, and with them time masks, negatives and the quantizer's noise."""
        config, mask = self.config, self._time_mask(batch, share)
        noise_shape = (mask.place_BM.shape[1], config.code_groups, config.codes)
        return Draws(
            super().draw(batch, share).lead_draw,
            mask,
            negatives(batch, self.seed, mask, config.negatives),
            gumbel_noise(batch, self.seed, noise_shape) if self.training else None,
        )

    def _time_mask(self, batch: ECGBatch, share: bool) -> TimeMask:
        patch_samples = self.encoder.config.patch_samples
        tokens = batch.signal_BLT.shape[-1] // patch_samples
        valid_B, span = batch.length_B // patch_samples, self.config.time_mask_span
        if self.config.time_mask_rule == "reference":
            return reference_time_mask(batch, self.seed, tokens, valid_B, span, share)
        return time_mask(batch, self.seed, tokens, valid_B, self.config.time_mask_share, span)

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE, plus the penalties on unused codes and on large features."""
        mask, config = draws.time_mask, self.config
        assert mask is not None
        assert draws.negative_BMK is not None
        target_BNC = dropout(encoded.features.normed_BNC, self.encoder.feature_dropout, self.training)
        local = self.local_head(
            _at(encoded.context_BND, mask.place_BM),
            _at(target_BNC, mask.place_BM),
            draws.negative_BMK,
            (torch.arange(mask.place_BM.shape[1], device=mask.count_B.device) < mask.count_B[:, None]).float(),
            temperature=config.local_temperature,
            gumbel_temperature=max(config.gumbel_end, config.gumbel_start * config.gumbel_factor**step),
            gumbel_BMGV=draws.gumbel_BMGV,
            share=share,
        )
        feature_penalty = encoded.features.stem_BNC.float().square().mean()
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


def _at(x_BNC: Tensor, place_BM: Tensor) -> Tensor:
    """(B, M, C) rows of ``x`` at the masked places."""
    return x_BNC.gather(1, place_BM[..., None].expand(-1, -1, x_BNC.shape[-1]))
