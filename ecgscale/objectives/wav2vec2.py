"""The local objective: contrastive prediction of quantised features at masked places (wav2vec 2.0; Oh et al. 2022).

Shape suffixes: B rows, N tokens, M masked places, K negatives, C stem channels, D width, Q code width, G code groups,
V codes of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ecgscale.model.quantizer import ProductQuantizer, Quantized, perplexity
from ecgscale.objectives.gather import sum_over_ranks, world_size
from ecgscale_kernels import info_nce_logits


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
        one_hot = F.one_hot(quantized.index_BMG, self.quantizer.codes) * weight_BM[..., None, None]
        chosen_GV = sum_over_ranks(one_hot.sum(dim=(0, 1)), share) / total
        return perplexity(mean_GV), perplexity(chosen_GV)
