"""Philox4x32-10 in PyTorch: counter-based random words, the same bits on every device and world size.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Words are held in int64 tensors with values in [0, 2³²), since PyTorch has no arithmetic on uint32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter. Counter words broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words wraps in int64, yet its bits are right: the mask undoes the sign.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def random_words(seed: int, purpose: int, segment_B: Tensor, position_B: Tensor, draws: int) -> Tensor:
    """(B, draws) random words in [0, 2³²) as int64.

    Draw e of a row is word ``e mod 4`` of the counter ``(e div 4, 2·purpose + segment, position low, position high)``
    under the key ``seed``, so it depends on nothing but the seed, the purpose and the row's own identity.
    """
    element_E = torch.arange((draws + 3) // 4, device=position_B.device)
    counter = (
        element_E[None, :],
        (2 * purpose + segment_B)[:, None],
        (position_B & _WORD)[:, None],
        ((position_B >> 32) & _WORD)[:, None],
    )
    words = philox_4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(words, dim=-1).flatten(1)[:, :draws]


def uniform(words: Tensor) -> Tensor:
    """Random words -> float32 uniform in (0, 1), never 0 or 1: 23 bits, centred in their interval.

    With 24 bits the largest centre would need a 25th and round to 1, whose Gumbel noise is infinite.
    """
    return ((words >> 9).float() + 0.5) * 2.0**-23


def below(words: Tensor, bound: Tensor | int) -> Tensor:
    """Random words -> whole numbers in [0, bound), by multiplication (bias below bound / 2³²)."""
    return (words * bound) >> 32
