"""Which record stands at which position: pure functions of (seed, position), nothing here touches a file.

A *position* is one record draw, counted over all epochs. The global batch is G positions: A micro-steps of the
contrast batch C (all ranks, one micro-step), G = A·C. Slot s of a batch belongs to micro-step s div C; with
c = s mod C its rank is c·W div C and its lane c·lanes div C, where W | lanes | C. None of this depends on the world
size W except who reads what, so the same global batches come out for any W that divides the lanes.

An epoch permutes the shards, turns the resulting sequence of records by a random amount, cuts its first ⌊N/G⌋·G
records into equal lanes, and shuffles each lane in windows over several shards. A lane's records are neighbours in
the sequence, so a node needs only its part of the data.

A mixture reads several data sets at given weights. Each lane's turns are cut into blocks of MIXTURE_BLOCK turns, in
which each set has a whole number of turns, its quota, permuted per block; a set's turns count through epochs of its
own, which cut ⌊N/lanes⌋·lanes of its records into lanes. So over its epochs every record of a set is drawn equally
often.

Shape suffixes: P positions, S shards, W windows, Q sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError
from ecgscale.rng import Purpose, below, permute, random_words

Int64 = npt.NDArray[np.int64]

MIXTURE_BLOCK = 256  # turns of a lane in which the quotas of a mixture come out exactly
_KEPT_EPOCHS = 4


class Place(NamedTuple):
    """Where records stand: shard number and number among the shard's eligible records, each (P,)."""

    shard: Int64
    record: Int64


@dataclass(frozen=True)
class Mixture:
    """Several data sets in one stream."""

    shards: tuple[int, ...]  # (Q,) shards of each set; together all of the order's
    quota: tuple[int, ...]  # (Q,) turns of each set in a block

    def __post_init__(self) -> None:
        assert len(self.shards) == len(self.quota)
        assert sum(self.quota) == MIXTURE_BLOCK
        assert min(self.quota) > 0


@dataclass(frozen=True)
class Order:
    """The order of a data set or a mixture. ``shard_records`` counts the eligible records of each shard."""

    shard_records: tuple[int, ...]
    global_batch: int  # G, positions
    contrast_batch: int  # C, positions
    lanes: int
    seed: int
    window: int = 16384  # records that are shuffled among each other within a lane
    mixture: Mixture | None = None

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
        if any(sequence.lane_records < 1 for sequence in self._sequences):
            raise InputError(f"a data set of the mixture has fewer usable recordings than the {self.lanes} lanes")

    @cached_property
    def records(self) -> int:
        return sum(self.shard_records)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches that read every record of a data set once; for a mixture, as many records as it has."""
        return self.records // self.global_batch

    @property
    def positions_per_epoch(self) -> int:
        return self.batches_per_epoch * self.global_batch

    def rank_positions(self, batch: int, micro_step: int, rank: int, world_size: int) -> Int64:
        """The (C/W,) positions that a rank reads in one micro-step of a global batch."""
        rows = self.contrast_batch // world_size
        first = batch * self.global_batch + micro_step * self.contrast_batch + rank * rows
        return np.arange(first, first + rows, dtype=np.int64)

    def places(self, positions: npt.ArrayLike, redraw: int = 0) -> Place:
        """The record at each of (P,) positions, which may span epochs.

        ``redraw`` k > 0 names the k-th substitute for a record that cannot be read: one that the same lane reads in
        a later batch, ever further away.
        """
        position_P = np.asarray(positions, np.int64)
        batch_P, slot_P = np.divmod(position_P, self.global_batch)
        micro_P, c_P = np.divmod(slot_P, self.contrast_batch)
        lane_slots = self.contrast_batch // self.lanes
        lane_P, lane_slot_P = np.divmod(c_P, lane_slots)
        turn_P = batch_P * self._turns_per_batch + micro_P * lane_slots + lane_slot_P
        set_P, turn_P = self._deal(lane_P, turn_P)
        place = Place(np.empty_like(position_P), np.empty_like(position_P))
        for number, sequence in enumerate(self._sequences):
            here = set_P == number
            if here.any():
                later = redraw * (redraw + 1) // 2 * self._turns_per_batch + redraw
                places = sequence.places(lane_P[here], turn_P[here] + later)
                place.shard[here], place.record[here] = places.shard + self._first_shard[number], places.record
        return place

    def draws(self, position: int) -> list[int]:
        """(Q,) records that were drawn of each set before a position that begins a global batch."""
        if self.mixture is None:
            return [position]
        blocks, rest = divmod(position // self.lanes, MIXTURE_BLOCK)
        lane_P, turn_P = np.divmod(np.arange(self.lanes * rest), max(rest, 1))
        set_P, _ = self._deal(lane_P, turn_P + blocks * MIXTURE_BLOCK)
        partial_Q = np.bincount(set_P, minlength=len(self.mixture.quota))
        return [
            blocks * quota * self.lanes + int(part) for quota, part in zip(self.mixture.quota, partial_Q, strict=True)
        ]

    def stages(self, batch: int, rank: int, world_size: int) -> Iterator[tuple[int, Int64]]:
        """(first batch, shards) from a batch on: all shards that a rank may need until the next stage begins.

        A stage ends where a window of any set does.
        """
        while True:
            windows_Q = [self._windows_of(batch, q) for q in range(len(self._sequences))]
            shards = [
                sequence.window_shards(window, rank, world_size) + first
                for sequence, first, windows in zip(self._sequences, self._first_shard, windows_Q, strict=True)
                for window in windows
            ]
            yield batch, np.unique(np.concatenate(shards))
            batch = self._next_stage(batch, windows_Q)

    def _next_stage(self, batch: int, windows_Q: list[range]) -> int:
        """The first later batch with other windows. They only ever go up, so it is searched by halving."""

        def same(later: int) -> bool:
            return all(self._windows_of(later, q) == windows for q, windows in enumerate(windows_Q))

        step = 1
        while same(batch + step):
            step *= 2
        low, high = batch + step // 2, batch + step  # the first has the same windows, the second has others
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if same(middle) else (low, middle)
        return high

    def _windows_of(self, batch: int, set_number: int) -> range:
        """The windows of a set, counted over all epochs, that a batch may touch."""
        first, last = batch * self._turns_per_batch, (batch + 1) * self._turns_per_batch - 1
        if self.mixture is not None:
            quota = self.mixture.quota[set_number]
            first, last = first // MIXTURE_BLOCK * quota, (last // MIXTURE_BLOCK + 1) * quota - 1
        sequence = self._sequences[set_number]
        return range(sequence.window_of(first), sequence.window_of(last) + 1)

    def _deal(self, lane_P: Int64, turn_P: Int64) -> tuple[Int64, Int64]:
        """The set that each turn of a lane reads, and the turn's number among that set's."""
        if self.mixture is None:
            return np.zeros_like(turn_P), turn_P
        quota_Q = np.array(self.mixture.quota)
        first_Q = np.cumsum(quota_Q) - quota_Q
        block_P, inside_P = np.divmod(turn_P, MIXTURE_BLOCK)
        dealt_P = permute(inside_P, MIXTURE_BLOCK, self.seed, Purpose.MIXTURE, block_P * self.lanes + lane_P)
        set_P = np.searchsorted(first_Q, dealt_P, side="right") - 1
        return set_P, block_P * quota_Q[set_P] + dealt_P - first_Q[set_P]

    @property
    def _turns_per_batch(self) -> int:
        return self.global_batch // self.lanes

    @cached_property
    def _first_shard(self) -> list[int]:
        shards = self.mixture.shards if self.mixture else (len(self.shard_records),)
        return [sum(shards[:q]) for q in range(len(shards))]

    @cached_property
    def _sequences(self) -> list[_Sequence]:
        if self.mixture is None:
            lane_records = self.positions_per_epoch // self.lanes
            return [_Sequence(self.shard_records, lane_records, self.lanes, self.seed, self.window, 0)]
        return [
            _Sequence(part, sum(part) // self.lanes, self.lanes, self.seed, self.window, q)
            for q, (first, count) in enumerate(zip(self._first_shard, self.mixture.shards, strict=True))
            for part in [self.shard_records[first : first + count]]
        ]


class _Sequence:
    """The records of one data set, epoch after epoch, dealt to lanes and shuffled in windows."""

    def __init__(
        self, shard_records: Sequence[int], lane_records: int, lanes: int, seed: int, window: int, set_number: int
    ) -> None:
        self.shard_records = np.asarray(shard_records, np.int64)
        self.lane_records, self.lanes, self.seed, self.window = lane_records, lanes, seed, window
        self.windows_per_epoch = -(-lane_records // window) if lane_records else 0
        self._set_number = set_number
        self._epochs: dict[int, _Epoch] = {}

    def places(self, lane_P: Int64, turn_P: Int64) -> Place:
        """The record that each lane reads at its turn; shards count from the set's first."""
        epoch_P, turn_P = np.divmod(turn_P, self.lane_records)
        sequence_P = self._shuffled_in_window(epoch_P, lane_P, turn_P)
        place = Place(np.empty_like(sequence_P), np.empty_like(sequence_P))
        for epoch in np.unique(epoch_P):
            here = epoch_P == epoch
            place.shard[here], place.record[here] = self._epoch(int(epoch)).locate(sequence_P[here])
        return place

    def _shuffled_in_window(self, epoch_P: Int64, lane_P: Int64, turn_P: Int64) -> Int64:
        """The place in the epoch's sequence of records that a lane reads at its turn."""
        window_P, inside_P = np.divmod(turn_P, self.window)
        size_P = np.minimum(self.window, self.lane_records - window_P * self.window)
        number_P = (epoch_P * self.lanes + lane_P) * self.windows_per_epoch + window_P
        shuffled_P = permute(inside_P, size_P, self.seed, Purpose.WINDOW, self._own(number_P))
        sequence_P: Int64 = lane_P * self.lane_records + window_P * self.window + shuffled_P
        return sequence_P

    def window_of(self, turn: int) -> int:
        """The window, counted over all epochs, in which a turn falls."""
        epoch, turn = divmod(turn, self.lane_records)
        return epoch * self.windows_per_epoch + turn // self.window

    def window_shards(self, number: int, rank: int, world_size: int) -> Int64:
        """The shards over which a window of the rank's lanes stretches, in the order of the epoch."""
        epoch, window = divmod(number, self.windows_per_epoch)
        lane_W = np.arange(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)
        first_W = lane_W * self.lane_records + window * self.window
        last_W = np.minimum(first_W + self.window, (lane_W + 1) * self.lane_records) - 1
        return self._epoch(epoch).shards_between(first_W, last_W)

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is None:
            known = self._plan(epoch)
            self._epochs = dict([*self._epochs.items(), (epoch, known)][-_KEPT_EPOCHS:])
        return known

    def _plan(self, epoch: int) -> _Epoch:
        filled_S = np.flatnonzero(self.shard_records)
        own = self._own(np.int64(epoch))
        word_S = random_words(self.seed, Purpose.SHARD_ORDER, own, filled_S.size)[0]
        shard_at = filled_S[np.argsort(word_S, kind="stable")]
        counts_S = self.shard_records[shard_at]
        records = int(counts_S.sum())
        rotation = int(below(random_words(self.seed, Purpose.ROTATION, own, 1), records)[0, 0])
        return _Epoch(shard_at, np.cumsum(counts_S) - counts_S, records, rotation)

    def _own(self, number: npt.ArrayLike) -> Int64:
        """Numbers of random streams that no other set of a mixture uses."""
        return np.asarray(number, np.int64) + (self._set_number << 52)


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

    def shards_between(self, first_W: Int64, last_W: Int64) -> Int64:
        """The shards from the first to the last place of some stretches of the sequence, both included."""
        (lap_W, first_W), (last_lap_W, last_W) = (
            np.divmod(place_W + self.rotation, self.records) for place_W in (first_W, last_W)
        )
        begin_W, end_W = (
            np.searchsorted(self.first_record, place_W, side="right") - 1 for place_W in (first_W, last_W)
        )
        size = self.shard_at.size
        count_W = np.minimum(end_W - begin_W + (last_lap_W - lap_W) * size + 1, size)
        inside = np.arange(count_W.sum()) - np.repeat(np.cumsum(count_W) - count_W, count_W)
        shards: Int64 = self.shard_at[(np.repeat(begin_W, count_W) + inside) % size]
        return shards


def mixture_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights -> turns of each set in a block, by largest remainder; every set gets at least one.

    A quota is off by less than 1/MIXTURE_BLOCK of the stream, except where the weight is smaller than that.
    """
    share_Q = np.asarray(weights, np.float64) / np.sum(weights) * MIXTURE_BLOCK
    quota_Q = np.maximum(1, np.floor(share_Q)).astype(np.int64)
    while quota_Q.sum() != MIXTURE_BLOCK:
        step = 1 if quota_Q.sum() < MIXTURE_BLOCK else -1
        gap_Q = np.where(quota_Q + step > 0, step * (share_Q - quota_Q), -np.inf)
        quota_Q[np.argmax(gap_Q)] += step
    return tuple(map(int, quota_Q))


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
