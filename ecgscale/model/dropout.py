"""Dropout whose random numbers are cheap on a CPU.

PyTorch 2.13 draws each Bernoulli number there from a generator of its own, 6 ns a number; here four share one 64-bit
word of its default generator, 1 ns. On a GPU its own dropout is one kernel, and runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 2**16  # of a probability


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zeros for elements drawn with ``probability``, to 1 / 65,536; the others are scaled up, which keeps the mean."""
    if not (training and probability):
        return x
    if not draws_cheaply(x):
        return F.dropout(x, probability)
    kept, scale = kept_elements(x, probability)
    return x * kept * scale


def add_dropout(x: Tensor, y: Tensor, probability: float, training: bool) -> Tensor:
    """``x + dropout(y)``, on a CPU in one pass."""
    if not (training and probability):
        return x + y
    if not draws_cheaply(y):
        return x + F.dropout(y, probability)
    kept, scale = kept_elements(y, probability)
    return torch.addcmul(x, y, kept, value=scale)


def draws_cheaply(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def kept_elements(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """1 for kept elements and 0 for the others, in the shape and type of ``x``, and one over the share that is kept."""
    if not draws_cheaply(x):
        return torch.rand_like(x, dtype=torch.float32).ge(probability).to(x.dtype), 1 / (1 - probability)
    dropped = min(round(probability * _STEPS), _STEPS - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    number = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(number, dropped - _STEPS // 2, out=torch.empty_like(number, dtype=x.dtype))
    return kept, _STEPS / (_STEPS - dropped)
