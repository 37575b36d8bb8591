"""Counter-based random numbers, independent of world size, workers and order of computation.

Everything that is drawn per sample comes from Philox4x32-10 with key = seed and counter =
(element, 2·purpose + segment, position low, position high). This file holds the numpy twin of
``ecgscale_kernels.philox`` (same bits) and the list of purposes.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Purpose(IntEnum):
    """What a random number is for. Numbers are part of the stored order of runs: never reuse or renumber one."""

    SHARD_ORDER = 0
    ROTATION = 1
    WINDOW = 2
    CROP = 3
    LEAD_MASK = 4
    TIME_MASK_START = 5
    TIME_MASK_TRIM = 6
    NEGATIVES = 7
    GUMBEL = 8
    TIME_MASK_SPANS = 9


def philox_4x32(counter: tuple[Words, Words, Words, Words], seed: int) -> tuple[Words, Words, Words, Words]:
    """Four random words (uint64 holding 32 bits) for each counter; counter words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & _WORD,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(seed: int, purpose: int, position: npt.ArrayLike, draws: int, segment: int = 0) -> Words:
    """(P, draws) random words for P positions: draw e is word ``e mod 4`` of counter element ``e div 4``."""
    position_P = np.atleast_1d(np.asarray(position)).astype(np.uint64)
    element_E = np.arange((draws + 3) // 4, dtype=np.uint64)
    shape = (position_P.size, element_E.size)
    counter = (
        np.broadcast_to(element_E[None, :], shape),
        np.broadcast_to(np.uint64(2 * purpose + segment), shape),
        np.broadcast_to((position_P & _WORD)[:, None], shape),
        np.broadcast_to((position_P >> _SHIFT)[:, None], shape),
    )
    return np.stack(philox_4x32(counter, seed), axis=-1).reshape(position_P.size, -1)[:, :draws]


def below(words: Words, bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Random words -> whole numbers in [0, bound) for bound ≤ 2³², by multiplication."""
    return ((words * np.asarray(bound).astype(np.uint64)) >> _SHIFT).astype(np.int64)


def permute(
    index: npt.ArrayLike, size: npt.ArrayLike, seed: int, purpose: int, stream: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Where a pseudo-random permutation of ``range(size)`` sends ``index``; ``stream`` numbers the permutation.

    An eight-round Feistel network over the next even power of two, with Philox as its round function; values that fall
    outside are sent round again (cycle walking). O(1) per element and no table, for any size up to 2⁶².
    """
    value, size_, stream_ = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(stream, np.uint64)
    )
    value = np.array(value)  # a writable copy
    bits = np.ceil(np.log2(np.maximum(size_, 2).astype(np.float64))).astype(np.uint64)
    bits += (np.uint64(1) << bits) < size_  # beyond 2⁵³ the float may have been rounded down
    half_bits = (bits + np.uint64(1)) // np.uint64(2)
    todo = np.ones(value.shape, bool)
    while todo.any():
        value[todo] = _feistel(value[todo], half_bits[todo], seed, purpose, stream_[todo])
        todo = value >= size_
    return value.astype(np.int64)


def _feistel(value: Words, half_bits: Words, seed: int, purpose: int, stream: Words) -> Words:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for feistel_round in range(8):
        counter = (
            right & _WORD,
            np.full_like(right, 2 * purpose),
            stream & _WORD,
            (stream >> _SHIFT) | np.uint64(feistel_round << 28),
        )
        left, right = right, left ^ (philox_4x32(counter, seed)[0] & mask)
    return (left << half_bits) | right
