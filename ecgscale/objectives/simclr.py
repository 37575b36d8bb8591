"""SimCLR on ECGs: two noisy views of one segment against the views of all others (Chen et al. 2020; Oh et al. 2022).

Embeddings are contrasted as they are, without a projection head, as in the reference implementation.

Shape suffixes: B rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.objectives.augmentation import NOISE
from ecgscale.objectives.gather import gather_rows
from ecgscale.objectives.keys import GlobalContrast, LeadMasking, Noise
from ecgscale.objectives.objective import Draws, Encoded, Objective


def nt_xent_loss(embedding_BD: Tensor, group_B: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row's positives, the other rows of its group, against the rows of all other groups.

    A positive is set against the negatives alone: where a row has several, they do not push each other away. The mean
    is over all (row, positive) pairs, so that a group of n rows has n·(n − 1) votes. With two rows in each group this
    is NT-Xent over all 2N − 1 others. Both choices are the reference implementation's.

    Args:
        embedding_BD: (B, D) record embeddings, in any order.
        group_B: rows with the same number belong together.
    """
    embedding_BD = embedding_BD.float()
    # The reference takes the norm as a constant in the gradient; so do we, for equal training.
    unit_BD = embedding_BD / embedding_BD.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
    logit_BB = unit_BD @ unit_BD.T / temperature
    alike_BB = group_B[:, None] == group_B[None, :]
    against_B1 = logit_BB.masked_fill(alike_BB, float("-inf")).logsumexp(dim=1, keepdim=True)
    loss_BB = torch.logaddexp(logit_BB, against_B1) - logit_BB
    positive_BB = alike_BB & ~torch.eye(len(group_B), dtype=torch.bool, device=group_B.device)
    return torch.where(positive_BB, loss_BB, 0.0).sum() / positive_BB.sum().clamp(min=1)


def two_views(batch: ECGBatch) -> ECGBatch:
    """A batch of segment pairs with the first segment in the place of the second too.

    Rows keep their segment number, by which everything is drawn: so the two views differ in all that is random, and a
    step costs what it costs with two segments.
    """
    half = batch.rows // 2
    signal_BLT, gain_BL, offset_BL, length_B = (
        torch.cat([rows[:half]] * 2) for rows in (batch.signal_BLT, batch.gain_BL, batch.offset_BL, batch.length_B)
    )
    return replace(batch, signal_BLT=signal_BLT, gain_BL=gain_BL, offset_BL=offset_BL, length_B=length_B)


class SimCLR(Objective):
    """Tells the two views of a segment from those of all others."""

    @dataclass(frozen=True)
    class Config(GlobalContrast, Noise, LeadMasking):
        """simclr: two noisy views of a segment, told from those of all others."""

        name: str = "simclr"

    augmentations = tuple(NOISE)
    named_losses = ("simclr",)
    config: Config

    def view(self, batch: ECGBatch) -> ECGBatch:
        """Two noisy views of each first segment."""
        return super().view(two_views(batch))

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent over the rows of all ranks; views of one position belong together."""
        embedding_BD, position_B = (gather_rows(rows, share) for rows in (encoded.embedding_BD, batch.position_B))
        loss = nt_xent_loss(embedding_BD, position_B, self.config.global_temperature)
        return loss, {"simclr": loss}
