"""Bounds that the order keeps at the size of ten million recordings, and how well it shuffles.

Shape suffixes: P positions, B batches.
"""

from __future__ import annotations

import tracemalloc
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.data.order import Order


class Shuffled(NamedTuple):
    shards_per_batch: float
    pairs_per_batch: float  # two recordings of one patient


def shuffled(order: Order, records_per_shard: int, number_P: npt.NDArray[np.int64] | None = None) -> Shuffled:
    """Of one epoch, where four recordings of each patient stand side by side in the source."""
    if number_P is None:
        place = order.places(np.arange(order.positions_per_epoch))
        number_P = place.shard * records_per_shard + place.record
    batches = number_P.reshape(-1, order.global_batch)
    shards = np.mean([np.unique(batch // records_per_shard).size for batch in batches])
    counts = [np.unique(batch // 4, return_counts=True)[1] for batch in batches]
    return Shuffled(float(shards), float(np.mean([(count * (count - 1) // 2).sum() for count in counts])))


def test_quality_tells_no_shuffling_from_a_good_one():
    def order(window: int) -> Order:
        return Order((64,) * 32, 64, 64, 1, seed=0, window=window)

    unshuffled, windowed = (shuffled(order(window), 64) for window in (1, 4096))
    permuted = shuffled(order(1), 64, np.random.default_rng(0).permutation(64 * 32))
    assert unshuffled.pairs_per_batch > 60
    assert unshuffled.shards_per_batch <= 2
    assert windowed.pairs_per_batch < 10
    assert abs(windowed.shards_per_batch - permuted.shards_per_batch) < 3


def test_ten_million_recordings_take_less_than_200_mb():
    tracemalloc.start()
    try:
        order = Order((500,) * 20_000, 4096, 4096, 64, seed=0)
        order.places(np.arange(4096) + order.positions_per_epoch // 2)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
