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
# A permutation needs less of its round function than a draw that is used as it is: seven rounds of Philox pass BigCrush
# (Salmon et al. 2011), and a Feistel network mixes their results again and again.
_PERMUTATION_ROUNDS = 7
_FEISTEL_ROUNDS = 6


class Purpose(IntEnum):
    """What a random number is for. Numbers are part of the stored order of runs: never reuse or renumber one.

    Those from 1000 on are for code outside of ecgscale. Segments are 0 and 1: the next is 0 of the next purpose.
    """

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
    MIXTURE = 10
    SOME_SHARDS = 11
    LABELLED_PATIENTS = 12
    POWER_LINE = 13
    EMG = 14
    BASELINE_SHIFT = 15
    BASELINE_WANDER = 16
    VECTORCARDIOGRAM = 17


def philox_4x32(
    counter: tuple[Words, Words, Words, Words], seed: int, rounds: int = _ROUNDS
) -> tuple[Words, Words, Words, Words]:
    """Four random words (uint64 holding 32 bits) for each counter; counter words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
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
    return np.stack(philox_4x32(counter, seed), axis=-1).reshape(position_P.size, 4 * element_E.size)[:, :draws]


def below(words: Words, bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Random words -> whole numbers in [0, bound) for bound ≤ 2³², by multiplication."""
    return ((words * np.asarray(bound).astype(np.uint64)) >> _SHIFT).astype(np.int64)


def permute(
    index: npt.ArrayLike, size: npt.ArrayLike, seed: int, purpose: int, stream: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Where a pseudo-random permutation of ``range(size)`` sends ``index``; ``stream`` numbers the permutation.

    A Feistel network over the cells of a table of about √size columns, with Philox as its round function;
    the few values that fall behind the last are sent round again (cycle walking). O(1) per element, for any size up to
    2⁶². A table over powers of two would be up to four times as large, and took up to eight times as long.
    """
    value, size_, stream_ = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(stream, np.uint64)
    )
    columns = np.ceil(np.sqrt(size_.astype(np.float64))).astype(np.uint64)
    rows = (size_ + columns - np.uint64(1)) // columns
    value = _feistel(value, rows, columns, seed, purpose, stream_)
    while (again := value >= size_).any():
        value[again] = _feistel(value[again], rows[again], columns[again], seed, purpose, stream_[again])
    return value.astype(np.int64)


def _feistel(value: Words, rows: Words, columns: Words, seed: int, purpose: int, stream: Words) -> Words:
    """A permutation of ``range(rows · columns)``: row and column are shifted in turn by what the other one says."""
    row, column = np.divmod(value, columns)
    for feistel_round in range(_FEISTEL_ROUNDS):
        other, size = (column, rows) if feistel_round % 2 == 0 else (row, columns)
        counter = (
            other & _WORD,
            np.full_like(other, 2 * purpose),
            stream & _WORD,
            (stream >> _SHIFT) | np.uint64(feistel_round << 28),
        )
        shift = (philox_4x32(counter, seed, _PERMUTATION_ROUNDS)[0] * size) >> _SHIFT
        if feistel_round % 2 == 0:
            row = row + shift
            row -= np.where(row >= size, size, np.uint64(0))
        else:
            column = column + shift
            column -= np.where(column >= size, size, np.uint64(0))
    return row * columns + column
