"""Random numbers: known answers, the same bits from numpy and torch, and fair permutations.

Shape suffixes: P positions.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from ecgscale import rng
from ecgscale.rng import Purpose, below, permute, philox_4x32, random_words
from ecgscale_kernels import philox as torch_rng

SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**62)

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected) -> None:
    words = philox_4x32(tuple(np.array([word], np.uint64) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word[0]) for word in words) == expected
    words = torch_rng.philox_4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == expected


@given(SEEDS, st.lists(POSITIONS, min_size=1, max_size=5), st.sampled_from(Purpose), st.integers(0, 1), st.data())
def test_numpy_and_torch_draw_the_same_bits(seed, positions, purpose, segment, data) -> None:
    draws = data.draw(st.integers(1, 21))
    words = random_words(seed, purpose, positions, draws, segment)
    position_P = torch.tensor(positions)
    expected = torch_rng.random_words(seed, purpose, torch.full_like(position_P, segment), position_P, draws)
    assert words.tolist() == expected.tolist()
    bound = data.draw(st.integers(1, 2**31))
    assert below(words, bound).tolist() == torch_rng.below(expected, bound).tolist()


def test_draws_follow_the_counter_of_the_contract() -> None:
    seed, position, segment = 0xFEDCBA9876543210, 3 << 40 | 5, 1
    for element in range(3):
        counter = (element, 2 * Purpose.NEGATIVES + segment, position & 0xFFFFFFFF, position >> 32)
        expected = philox_4x32(tuple(np.array([word], np.uint64) for word in counter), seed)
        words = random_words(seed, Purpose.NEGATIVES, position, 12, segment)[0, 4 * element : 4 * element + 4]
        assert words.tolist() == [int(word[0]) for word in expected]


def test_purposes_keep_their_numbers() -> None:
    names = "SHARD_ORDER ROTATION WINDOW CROP LEAD_MASK TIME_MASK_START TIME_MASK_TRIM NEGATIVES GUMBEL"
    assert " ".join(purpose.name for purpose in Purpose).startswith(names)
    assert [int(purpose) for purpose in Purpose] == list(range(len(Purpose)))


@given(SEEDS, st.lists(POSITIONS, min_size=2, max_size=8, unique=True), st.integers(1, 9))
def test_a_position_draws_the_same_in_any_company(seed, positions, draws) -> None:
    together = random_words(seed, Purpose.CROP, positions, draws + 6)
    for row, position in zip(together, positions, strict=True):
        alone = random_words(seed, Purpose.CROP, [position], draws)  # fewer draws are the first of more
        assert alone[0].tolist() == row[:draws].tolist()


def test_every_part_of_a_draws_identity_matters() -> None:
    identities = [
        (seed, purpose, position, segment)
        for seed in (0, 1, 1 << 32, 1 << 63)
        for purpose in Purpose
        for position in (0, 1, 1 << 32, 1 << 61)
        for segment in (0, 1)
    ]
    words = [random_words(seed, purpose, position, 2, segment) for seed, purpose, position, segment in identities]
    assert len({tuple(word[0].tolist()) for word in words}) == len(identities)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1), st.integers(1, 2**32))
def test_below_stays_below(words, bound) -> None:
    drawn = below(np.array(words, np.uint64), bound)
    assert drawn.tolist() == [word * bound >> 32 for word in words]
    assert ((drawn >= 0) & (drawn < bound)).all()


def test_below_is_uniform() -> None:
    drawn = below(random_words(7, Purpose.NEGATIVES, np.arange(5000), 20), 13)
    assert chisquare(np.bincount(drawn.ravel(), minlength=13)).pvalue > 1e-3


@given(st.integers(1, 3000), SEEDS, st.sampled_from(Purpose), st.integers(0, 2**59))
def test_permute_is_a_bijection(size, seed, purpose, stream) -> None:
    assert sorted(permute(np.arange(size), size, seed, purpose, stream).tolist()) == list(range(size))


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 2**40)), min_size=1, max_size=6), SEEDS)
def test_permute_takes_a_size_and_a_stream_per_element(sizes_and_streams, seed) -> None:
    index, size, stream = np.concatenate(
        [np.stack([np.arange(size), np.full(size, size), np.full(size, stream)]) for size, stream in sizes_and_streams],
        axis=1,
    )
    mixed = permute(index, size, seed, Purpose.WINDOW, stream)
    alone = [permute(np.arange(size), size, seed, Purpose.WINDOW, stream) for size, stream in sizes_and_streams]
    assert mixed.tolist() == np.concatenate(alone).tolist()


def test_the_table_under_permute_is_just_large_enough(monkeypatch) -> None:
    """Else cycle walking never ends, or goes on for long: also for sizes beyond 2⁵³, where floats are rounded."""
    tables = []

    def spy(value, rows, columns, *rest):
        tables.append(int(rows[0]) * int(columns[0]))
        return np.zeros_like(value)

    monkeypatch.setattr(rng, "_feistel", spy)
    for bits in range(1, 63):
        for size in (2**bits - 1, 2**bits, min(2**62, 2**bits + 1)):
            permute([size - 1], size, 0, Purpose.WINDOW, 0)
            assert size <= tables[-1] <= size + 2 * math.isqrt(size) + 2


@given(st.integers(12, 62), st.integers(-3, 3), SEEDS, st.data())
def test_permute_of_large_sizes(bits, offset, seed, data) -> None:
    size = min(2**62, 2**bits + offset)
    ends = np.concatenate([np.arange(8), size - 1 - np.arange(8)])  # where sizes beyond a float's precision go wrong
    inside = data.draw(st.lists(st.integers(8, size - 9), min_size=4, max_size=20, unique=True))
    sent = permute(np.concatenate([ends, np.array(inside)]), size, seed, Purpose.WINDOW, 3)
    assert ((sent >= 0) & (sent < size)).all()
    assert len(np.unique(sent)) == len(sent)


@pytest.mark.parametrize("size", [100, 400, 1000])
def test_permute_sends_an_element_anywhere_equally_often(size) -> None:
    for element in (0, 1, size - 1):
        sent = permute(np.full(20_000, element), size, 11, Purpose.WINDOW, np.arange(20_000))
        assert chisquare(np.bincount(sent, minlength=size)).pvalue > 1e-3


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 12])
def test_permute_of_few_is_nearly_fair(size) -> None:
    """Four rounds over one or two bits leave a bias, 30 % in the worst cell of size 5; from some 40 on none is seen."""
    for element in range(size):
        sent = permute(np.full(20_000, element), size, 11, Purpose.WINDOW, np.arange(20_000))
        np.testing.assert_allclose(np.bincount(sent, minlength=size), 20_000 / size, rtol=0.35)


@pytest.mark.parametrize("size", [3, 4])
def test_permute_makes_every_permutation(size) -> None:
    """A short network over few values cannot be quite fair; no order may be rare."""
    streams = 12_000
    stream, index = np.divmod(np.arange(streams * size), size)
    sent = permute(index, size, 5, Purpose.WINDOW, stream).reshape(streams, size)
    seen = Counter(map(tuple, sent.tolist()))
    expected = streams / len(list(permutations(range(size))))
    assert set(seen) == set(permutations(range(size)))
    assert min(seen.values()) > 0.5 * expected
    assert max(seen.values()) < 2 * expected
