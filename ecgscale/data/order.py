"""Which record stands at which position: pure functions of (seed, position), nothing here touches a file.

A *position* is one record draw, counted over all epochs. The global batch is G positions: A micro-steps of the
contrast batch C (all ranks, one micro-step), G = A·C. Slot s of a batch belongs to micro-step s div C; with
c = s mod C its rank is c·W div C and its lane c·lanes div C, where W | lanes | C. None of this depends on the world
size W except who reads what, so the same global batches come out for any W that divides the lanes.

An epoch permutes the shards, turns the resulting sequence of records by a random amount, cuts its first ⌊N/G⌋·G
records into equal lanes, and shuffles each lane in windows over several shards. A lane's records are neighbours in
the sequence, so a node needs only its part of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError
from ecgscale.rng import Purpose, below, permute, random_words

Int64 = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where records stand: shard number and number within the shard, each (P,)."""

    shard: Int64
    record: Int64


@dataclass(frozen=True)
class Order:
    """The order of one data set. ``shard_records`` counts the eligible records of each shard."""

    shard_records: tuple[int, ...]
    global_batch: int  # G, positions
    contrast_batch: int  # C, positions
    lanes: int
    seed: int
    window: int = 16384  # records that are shuffled among each other within a lane

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.contrast_batch < 1 or self.global_batch % self.contrast_batch:
            raise InputError(
                f"train.global_batch {self.global_batch} is no multiple of train.contrast_batch {self.contrast_batch}"
            )
        if self.lanes < 1 or self.contrast_batch % self.lanes:
            raise InputError(f"train.lanes {self.lanes} does not divide the contrast batch of {self.contrast_batch}")
        if self.window < 1:
            raise InputError(f"a shuffle window of {self.window} records; give 1 or more")
        if self.records < self.global_batch:
            raise InputError(
                f"train.global_batch {self.global_batch} is more than the {self.records} usable recordings; "
                "set it lower or give more data"
            )

    @property
    def records(self) -> int:
        return sum(self.shard_records)

    @property
    def batches_per_epoch(self) -> int:
        return self.records // self.global_batch

    @property
    def positions_per_epoch(self) -> int:
        return self.batches_per_epoch * self.global_batch

    def rank_positions(self, batch: int, micro_step: int, rank: int, world_size: int) -> Int64:
        """The (C/W,) positions that a rank reads in one micro-step of a global batch."""
        rows = self.contrast_batch // world_size
        first = batch * self.global_batch + micro_step * self.contrast_batch + rank * rows
        return np.arange(first, first + rows, dtype=np.int64)

    def places(self, positions: npt.ArrayLike) -> Place:
        """The record at each of (P,) positions, which may span epochs."""
        position_P = np.asarray(positions, np.int64)
        epoch_P, in_epoch_P = np.divmod(position_P, self.positions_per_epoch)
        batch_P, slot_P = np.divmod(in_epoch_P, self.global_batch)
        micro_P, c_P = np.divmod(slot_P, self.contrast_batch)
        lane_slots = self.contrast_batch // self.lanes
        lane_P, lane_slot_P = np.divmod(c_P, lane_slots)
        turn_P = batch_P * (self.global_batch // self.lanes) + micro_P * lane_slots + lane_slot_P
        sequence_P = self._shuffled_in_window(epoch_P, lane_P, turn_P)
        shard_P, record_P = np.empty_like(sequence_P), np.empty_like(sequence_P)
        for epoch in np.unique(epoch_P):
            here = epoch_P == epoch
            shard_P[here], record_P[here] = self._epoch(int(epoch)).locate(sequence_P[here])
        return Place(shard_P, record_P)

    def _shuffled_in_window(self, epoch_P: Int64, lane_P: Int64, turn_P: Int64) -> Int64:
        """The place in the epoch's sequence of records that a lane reads at its turn."""
        lane_records = self.positions_per_epoch // self.lanes
        window_P, inside_P = np.divmod(turn_P, self.window)
        size_P = np.minimum(self.window, lane_records - window_P * self.window)
        windows_per_epoch = self.lanes * -(-lane_records // self.window)
        number_P = epoch_P * windows_per_epoch + lane_P * -(-lane_records // self.window) + window_P
        shuffled_P = permute(inside_P, size_P, self.seed, Purpose.WINDOW, number_P)
        sequence_P: Int64 = lane_P * lane_records + window_P * self.window + shuffled_P
        return sequence_P

    def _epoch(self, epoch: int) -> _Epoch:
        return _epoch(self.shard_records, self.seed, epoch)


@dataclass(frozen=True)
class _Epoch:
    """The sequence of all records in one epoch: shards permuted, then turned by ``rotation`` records."""

    shard_at: Int64  # (S,) which shard stands at which place
    first_record: Int64  # (S,) the place in the sequence at which it begins
    records: int
    rotation: int

    def locate(self, sequence_P: Int64) -> Place:
        turned_P = (sequence_P + self.rotation) % self.records
        place_P = np.searchsorted(self.first_record, turned_P, side="right") - 1
        return Place(self.shard_at[place_P], turned_P - self.first_record[place_P])


@lru_cache(maxsize=4)
def _epoch(shard_records: tuple[int, ...], seed: int, epoch: int) -> _Epoch:
    filled_S = np.flatnonzero(np.asarray(shard_records))
    word_S = random_words(seed, Purpose.SHARD_ORDER, epoch, filled_S.size)[0]
    shard_at = filled_S[np.argsort(word_S, kind="stable")]
    counts_S = np.asarray(shard_records, np.int64)[shard_at]
    records = int(counts_S.sum())
    rotation = int(below(random_words(seed, Purpose.ROTATION, epoch, 1), records)[0, 0])
    return _Epoch(shard_at, np.cumsum(counts_S) - counts_S, records, rotation)


def default_lanes(contrast_batch: int) -> int:
    """64 lanes where they divide the contrast batch, else the largest divisor of both."""
    return gcd(contrast_batch, 64)


def check_world_size(world_size: int, lanes: int) -> None:
    """Raises InputError unless every rank gets the same number of lanes."""
    if lanes % world_size:
        possible = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise InputError(
            f"{world_size} ranks do not divide the {lanes} lanes of the order (train.lanes); start {possible} ranks"
        )
