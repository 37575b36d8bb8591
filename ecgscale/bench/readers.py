"""Readers of equal records: ecgscale's stream, and a bare loop over the same bytes.

Shape suffixes: B batch, R records, L leads, S segments, T samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from pcodec import standalone

from ecgscale.bench.measure import Round, timed
from ecgscale.data.order import default_lanes
from ecgscale.data.payload import header_bytes
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.lead_names import LEADS
from ecgscale.record import Counts

_AHEAD = 16  # batches that are read before the clock starts, where something makes them ahead of need


@dataclass(frozen=True)
class Cut:
    """How a stream reads whole records: ``segments`` adjacent windows of each."""

    duration_s: float  # of a record
    batch: int  # records
    segments: int = 1
    workers: int = 0

    def stream(self, shards: ShardSet) -> TrainStream:
        config = DataConfig(
            segment_s=self.duration_s / self.segments, min_record_s=self.duration_s, workers=self.workers
        )
        selection = Selection(shards, config, "train")
        order = selection.order(self.batch, self.batch, default_lanes(self.batch), seed=0)
        return TrainStream(selection, order, 0, 1, self.segments, pinned=False)  # as those that it is held against


# -- ecgscale --------------------------------------------------------------------------------------------------------


class Steady:
    """A stream whose records have all been touched."""

    def __init__(self, shards: ShardSet, cut: Cut) -> None:
        self.cut, stream = cut, cut.stream(shards)
        self._batches = stream.from_batch(0)
        for _ in range(2 * stream.order.batches_per_epoch):
            next(self._batches)

    def read(self) -> int:
        """Records of eight batches."""
        for _ in range(8):
            next(self._batches)
        return 8 * self.cut.batch

    def round(self, at_least_s: float) -> Round:
        for _ in range(_AHEAD if self.cut.workers else 0):
            next(self._batches)
        return timed(self.read, at_least_s)

    def close(self) -> None:
        self._batches.close()


def first_epoch(folder: Path, cut: Cut, at_least_s: float) -> Round:
    """Epochs of streams that were just opened, without the opening: plain payloads are verified, pages mapped."""
    total = Round(0, 0.0, 0.0)
    while total.wall_s < at_least_s:
        stream = cut.stream(ShardSet.open(folder))
        batches = stream.from_batch(0)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(stream.order.batches_per_epoch):
            next(batches)
        total = Round(
            total.units + stream.order.positions_per_epoch,
            total.wall_s + time.perf_counter() - began_s,
            total.cpu_s + time.process_time() - began_cpu_s,
        )
        batches.close()
    return total


# -- bare loops ------------------------------------------------------------------------------------------------------


def bare(shards: ShardSet, batch: int, segments: int = 1) -> Callable[[], int]:
    """Every record once, in random order: the least that must be done to bring it into a batch.

    Plain: one copy from the mapped tar to the row. Compressed: pcodec from the tar straight into the row. Nothing is
    verified, and what a batch holds beside its samples is left out. With segments, (S, B, L, T / S) is filled, and
    compressed records pass through a scratch buffer.
    """
    at = _Located.of(shards)
    pieces = list(zip(at.tar_R, at.first_R, at.last_R, strict=True))
    room = np.empty((segments, batch, len(LEADS), at.samples // segments), np.int16)
    whole_S = [slice(s * (at.samples // segments), (s + 1) * (at.samples // segments)) for s in range(segments)]
    scratch_LT = np.empty((len(LEADS), at.samples), np.int16)

    def plain() -> int:
        rows = cycle([memoryview(row).cast("B") for row in room[0].reshape(batch, -1)])
        for (tar, first, last), row in zip(pieces, rows, strict=False):
            row[:] = tar[first:last]
        return len(pieces)

    def compressed() -> int:
        rows = cycle(list(room[0].reshape(batch, -1)))
        for (tar, first, last), row in zip(pieces, rows, strict=False):
            standalone.simple_decompress_into(bytes(tar[first:last]), row)
        return len(pieces)

    def cut(signal_LT: Counts, row_SLT: Counts) -> None:
        for s, part in enumerate(whole_S):
            row_SLT[s] = signal_LT[:, part]

    def plain_cut() -> int:
        rows = cycle(list(room.swapaxes(0, 1)))
        for (tar, first, _), row_SLT in zip(pieces, rows, strict=False):
            cut(np.ndarray(scratch_LT.shape, np.int16, tar, first), row_SLT)
        return len(pieces)

    def compressed_cut() -> int:
        rows = cycle(list(room.swapaxes(0, 1)))
        for (tar, first, last), row_SLT in zip(pieces, rows, strict=False):
            standalone.simple_decompress_into(bytes(tar[first:last]), scratch_LT.reshape(-1))
            cut(scratch_LT, row_SLT)
        return len(pieces)

    if segments == 1:
        return plain if at.plain else compressed
    return plain_cut if at.plain else compressed_cut


@dataclass(frozen=True)
class _Located:
    """Where the samples of every record of a set are, in random order."""

    plain: bool
    samples: int
    tar_R: list[memoryview]
    first_R: list[int]  # of the samples of a plain record, of the block of a compressed one
    last_R: list[int]

    @staticmethod
    def of(shards: ShardSet) -> _Located:
        number_R = np.random.default_rng(0).permutation(len(shards))
        plain, samples = shards.shards[0].payload == "npy", int(shards.column("samples")[0])
        tars = [shards.tar(shard).data for shard in range(len(shards.shards))]
        member_R = shards.take("offset", number_R).astype(np.int64)
        last_R = member_R + shards.take("length", number_R)
        first_R = last_R - 2 * len(LEADS) * samples if plain else member_R + header_bytes(samples)
        tar_R = [tars[shard] for shard in shards.shard_of(number_R)]
        return _Located(plain, samples, tar_R, first_R.tolist(), last_R.tolist())
