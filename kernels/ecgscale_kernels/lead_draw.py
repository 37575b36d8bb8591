"""Random lead masking as a draw: each lead of each row is dropped with one probability, independently (Oh et al. 2022).

The draw is a pure function of the seed and of the row's own identity, so it can be made wherever it is needed: in a
kernel without a tensor of masks, or here, with the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ecgscale_kernels import philox


class LeadDraw(NamedTuple):
    """What decides which leads of a batch are masked."""

    seed: int
    purpose: int  # which of the counter's streams, see ``philox.random_words``
    probability: float  # of a lead to be dropped
    segment_B: Tensor  # int64
    position_B: Tensor  # int64

    def keep_BL(self, leads: int) -> Tensor:
        """(B, L) bool: the leads that are kept."""
        words_BL = philox.random_words(self.seed, self.purpose, self.segment_B, self.position_B, leads)
        return philox.uniform(words_BL) >= self.probability
