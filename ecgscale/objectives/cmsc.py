"""The global objective: contrastive multi-segment coding (CLOCS, Kiyasseh et al. 2021; Oh et al. 2022).

Shape suffixes: B rows, P positions (pairs of segments), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.objectives.gather import gather_rows
from ecgscale.objectives.keys import GlobalContrast, LeadMasking, Noise
from ecgscale.objectives.objective import Draws, Encoded, Objective


def cmsc_loss(
    embedding_BD: Tensor, patient_B: Tensor, segment_B: Tensor, temperature: float, nt_xent: bool = False
) -> Tensor:
    """Cross-entropy of segment A against all segments B and back; positives are segments of the same patient.

    Averaged over all positive pairs and both directions. This is the N × N form of the reference implementation.
    With ``nt_xent`` each segment is set against all 2N − 1 others, as in the paper's equation.

    Args:
        embedding_BD: (B, D) record embeddings of both segments of all pairs, in any order.
        patient_B, segment_B: whose they are, and which segment (0 or 1).
    """
    embedding_BD = embedding_BD.float()
    # The reference takes the norm as a constant in the gradient; so do we, for equal training.
    unit_BD = embedding_BD / embedding_BD.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
    # Half of the rows belong to each segment; a stable sort brings the groups together with a static shape.
    first_P, second_P = segment_B.argsort(stable=True).chunk(2)
    logit_PP = unit_BD[first_P] @ unit_BD[second_P].T / temperature
    positive_PP = patient_B[first_P][:, None] == patient_B[second_P][None, :]
    if nt_xent:
        others_P, others_Q = (_log_sum_others(unit_BD[half], temperature) for half in (first_P, second_P))
        forth_P1 = torch.logaddexp(logit_PP.logsumexp(dim=1), others_P)[:, None]
        back_1P = torch.logaddexp(logit_PP.logsumexp(dim=0), others_Q)[None, :]
        log_likelihood_PP = 2 * logit_PP - forth_P1 - back_1P
    else:
        log_likelihood_PP = F.log_softmax(logit_PP, dim=1) + F.log_softmax(logit_PP, dim=0)
    return -torch.where(positive_PP, log_likelihood_PP, 0.0).sum() / (2 * positive_PP.sum())


def _log_sum_others(unit_PD: Tensor, temperature: float) -> Tensor:
    """(P,) log of the sum of exp(logit) over the other rows of the same segment."""
    logit_PP = unit_PD @ unit_PD.T / temperature
    own_PP = torch.eye(len(unit_PD), dtype=torch.bool, device=unit_PD.device)
    return logit_PP.masked_fill(own_PP, float("-inf")).logsumexp(dim=1)


class CMSC(Objective):
    """The global objective: two adjacent segments of a patient, told from those of others."""

    @dataclass(frozen=True)
    class Config(GlobalContrast, Noise, LeadMasking):
        """cmsc: two adjacent segments of a patient, told from those of others."""

        name: str = "cmsc"
        global_form: Literal["reference", "nt_xent"] = "reference"
        """reference: each segment against the other segments of all pairs. nt_xent: against all others, as in
        the paper."""

    named_losses = ("cmsc",)
    config: Config

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast of segments."""
        loss = global_loss(encoded, batch, self.config, share)
        return loss, {"cmsc": loss}


def global_loss(encoded: Encoded, batch: ECGBatch, config: CMSC.Config, share: bool) -> Tensor:
    """The loss of the embeddings of all ranks."""
    return cmsc_loss(
        gather_rows(encoded.embedding_BD, share),
        gather_rows(batch.patient_B, share),
        gather_rows(batch.segment_B, share),
        config.global_temperature,
        config.global_form == "nt_xent",
    )
