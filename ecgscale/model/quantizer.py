"""Product quantizer with Gumbel-softmax codes (wav2vec 2.0; Jang et al. 2017).

Shape suffixes: B rows, M masked places, C stem channels, G groups, V codes of a group, Q code width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """Codes of (B, M) places."""

    code_BMQ: Tensor  # the chosen code vectors, groups side by side
    index_BMG: Tensor  # their numbers
    probability_BMGV: Tensor  # softmax of the logits, float32, with gradient: for the diversity penalty


class ProductQuantizer(nn.Module):
    """Picks one of V codes in each of G groups; straight-through Gumbel in training, the best code otherwise."""

    def __init__(self, channels: int, groups: int, codes: int, code_width: int) -> None:
        super().__init__()
        self.groups, self.codes = groups, codes
        self.codebook = nn.Parameter(torch.empty(groups * codes, code_width // groups).uniform_())
        self.logits = nn.Linear(channels, groups * codes)
        nn.init.normal_(self.logits.weight, mean=0, std=1)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x_BMC: Tensor, temperature: float, gumbel_BMGV: Tensor | None) -> Quantized:
        """``gumbel_BMGV`` is the noise of training; None chooses the best code, without gradient to the logits."""
        batch, places, _ = x_BMC.shape
        logit_BMGV = self.logits(x_BMC).view(batch, places, self.groups, self.codes).float()
        probability_BMGV = logit_BMGV.softmax(dim=-1)
        if gumbel_BMGV is None:
            index_BMG = logit_BMGV.argmax(dim=-1)
            choice_BMGV = one_hot(index_BMG, self.codes).to(x_BMC.dtype)
        else:
            soft_BMGV = ((logit_BMGV + gumbel_BMGV) / temperature).softmax(dim=-1)
            index_BMG = soft_BMGV.argmax(dim=-1)
            hard_BMGV = one_hot(index_BMG, self.codes).to(soft_BMGV.dtype)
            choice_BMGV = (hard_BMGV - soft_BMGV.detach() + soft_BMGV).to(x_BMC.dtype)
        book_GVW = self.codebook.view(self.groups, self.codes, -1)
        code_BMQ = torch.einsum("bmgv,gvw->bmgw", choice_BMGV, book_GVW).flatten(2)
        return Quantized(code_BMQ, index_BMG, probability_BMGV)


def one_hot(index_BMG: Tensor, codes: int) -> Tensor:
    """(B, M, G, V) bool. PyTorch's own is of int64, and reads on a CPU whether each index is in range."""
    return torch.eq(index_BMG[..., None], torch.arange(codes, device=index_BMG.device))


def perplexity(probability_GV: Tensor) -> Tensor:
    """Sum over the groups of exp(entropy): how many codes are in use, from G to G·V."""
    entropy_G = -(probability_GV * torch.log(probability_GV + 1e-7)).sum(dim=-1)
    return entropy_G.exp().sum()
