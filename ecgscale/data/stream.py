"""Order + shards -> batches, with a savable position.

The state of a training stream is one number, the position of its next batch. Batches are made ahead of need by a
thread: gathering is memory copies and checksums, which release Python's lock.

Shape suffixes: P positions, B rows, L the twelve leads, T samples, C classes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ecgscale.data.batch import ECGBatch
from ecgscale.data.order import Order
from ecgscale.data.shards import Shard, ShardSet
from ecgscale.errors import InputError
from ecgscale.record import LEADS
from ecgscale.rng import Purpose, below, random_words

Item = TypeVar("Item")
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataConfig:
    """Which recordings are read and how windows are cut from them."""

    shards: list[str] = field(default_factory=list)
    """Data set folders that `ecgscale ingest` or `ecgscale simulate` has written; several are read as one set."""
    segment_s: float = 5.0
    """Length of one segment in seconds; pretraining cuts two adjacent ones from each recording."""
    min_record_s: float = 10.0
    """Shorter recordings are left out, and counted. Below two segments, segments become shorter and are padded."""
    normalisation: Literal["mv", "zscore"] = "mv"
    """mv: millivolts as they are. zscore: each lead minus its mean, over its standard deviation, over the recording."""
    shuffle_window: int = 16384
    """Recordings of one lane that are shuffled among each other."""

    def __post_init__(self) -> None:
        if self.segment_s <= 0:
            raise InputError(f"data.segment_s {self.segment_s:g}: give a positive number of seconds")
        if self.min_record_s <= 0:
            raise InputError(f"data.min_record_s {self.min_record_s:g}: give a positive number of seconds")
        if self.shuffle_window < 1:
            raise InputError(f"data.shuffle_window {self.shuffle_window}: give 1 or more recordings")


class Selection:
    """The records of one split that are long enough, and how windows are cut from them."""

    def __init__(
        self, shards: ShardSet, config: DataConfig, split: str, keep: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """``keep`` (records of the whole set,) narrows the selection further, to labelled records for example."""
        self.shards, self.config, self.split = shards, config, split
        sizes_S = [len(shard) for shard in shards.shards]
        self.first_S = np.cumsum([0, *sizes_S])[:-1].astype(np.int64)  # whole-set number of each shard's record 0
        self.records = shards.select(split, config.min_record_s)
        if keep is not None:
            self.records = [
                numbers[keep[first + numbers]] for first, numbers in zip(self.first_S, self.records, strict=True)
            ]
        self.too_short = sum(map(len, shards.select(split))) - sum(map(len, shards.select(split, config.min_record_s)))
        self.samples = round(config.segment_s * shards.rate_hz)  # T

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(numbers) for numbers in self.records)

    def in_order(self) -> list[tuple[int, int]]:
        """(shard, record in shard) of every record, once."""
        return [(s, int(r)) for s, numbers in enumerate(self.records) for r in numbers]

    def numbers(self) -> Int64:
        """Whole-set numbers of the records, in the order of ``in_order``."""
        return np.concatenate([first + records for first, records in zip(self.first_S, self.records, strict=True)])

    def batch(
        self,
        chosen: list[tuple[int, int]],
        position_P: Int64,
        segments: int,
        seed: int,
        target: npt.NDArray[np.float32] | None = None,
    ) -> ECGBatch:
        """Cut ``segments`` adjacent windows from each chosen (shard, record); where they begin is drawn by position.

        Row s·P + p is segment s of position p. ``target`` (records of the whole set, C) gives rows their labels.
        """
        rows = len(chosen) * segments
        signal_BLT = np.zeros((rows, len(LEADS), self.samples), np.int16)
        gain_BL, offset_BL = np.zeros((2, rows, len(LEADS)), np.float32)
        length_B, patient_B = np.zeros((2, rows), np.int64)
        word_P = random_words(seed, Purpose.CROP, position_P, 1)[:, 0]
        for p, (shard_number, record) in enumerate(chosen):
            shard = self.shards.shards[shard_number]
            source_LT = shard.signal(record)
            at = shard.lead_positions(record)
            length = min(self.samples, source_LT.shape[1] // segments)
            start = int(below(word_P[p], source_LT.shape[1] - segments * length + 1))
            gain_L, offset_L = self._worth(shard, record, at)
            for row, first in zip(
                range(p, rows, len(chosen)), range(start, start + segments * length, length), strict=True
            ):
                signal_BLT[row, at, :length] = source_LT[:, first : first + length]
                signal_BLT[row, at, length:] = np.rint(offset_L)[:, None]
                gain_BL[row, at], offset_BL[row, at] = gain_L, offset_L
                length_B[row], patient_B[row] = length, shard.columns["patient"][record]
        number_P = np.array([self.first_S[shard] + record for shard, record in chosen], np.int64)
        return ECGBatch(
            signal_BLT=torch.from_numpy(signal_BLT),
            gain_BL=torch.from_numpy(gain_BL),
            offset_BL=torch.from_numpy(offset_BL),
            length_B=torch.from_numpy(length_B),
            patient_B=torch.from_numpy(patient_B),
            segment_B=torch.arange(segments).repeat_interleave(len(chosen)),
            position_B=torch.from_numpy(np.tile(position_P, segments)),
            padded=bool((length_B < self.samples).any()),
            target_BC=None if target is None else torch.from_numpy(np.tile(target[number_P], (segments, 1))),
        )

    def _worth(
        self, shard: Shard, record: int, at: list[int]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Gain and offset of the leads that are there."""
        scale_L = shard.columns["scale"][record][at]
        if self.config.normalisation == "mv":
            return scale_L, np.zeros_like(scale_L)
        return zscore_gain(shard.signal(record))


def zscore_gain(
    signal_LT: npt.NDArray[np.generic],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Gain and offset that bring each lead to mean 0 and standard deviation 1; gain 0 for a flat lead."""
    mean_L, std_L = signal_LT.mean(axis=1, dtype=np.float64), signal_LT.std(axis=1, dtype=np.float64)
    gain_L = np.divide(1.0, std_L, out=np.zeros_like(std_L), where=std_L > 0)
    return gain_L.astype(np.float32), mean_L.astype(np.float32)


class TrainStream:
    """Endless batches of one rank, micro-step by micro-step."""

    def __init__(
        self,
        selection: Selection,
        order: Order,
        rank: int,
        world_size: int,
        segments: int,
        target: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """``target`` (records of the whole set, classes) gives rows their labels."""
        self.selection, self.order, self.segments, self.target = selection, order, segments, target
        self.rank, self.world_size = rank, world_size

    def from_batch(self, batch: int) -> Prefetch[ECGBatch]:
        """The micro-batches from global batch number ``batch`` on."""
        return Prefetch(self._micro_batches(batch))

    def _micro_batches(self, batch: int) -> Iterator[ECGBatch]:
        while True:
            for micro_step in range(self.order.global_batch // self.order.contrast_batch):
                yield self.micro_batch(batch, micro_step)
            batch += 1

    def micro_batch(self, batch: int, micro_step: int) -> ECGBatch:
        """This rank's rows of one micro-step of a global batch."""
        position_P = self.order.rank_positions(batch, micro_step, self.rank, self.world_size)
        place = self.order.places(position_P)
        chosen = [(int(s), int(self.selection.records[s][r])) for s, r in zip(place.shard, place.record, strict=True)]
        rows = self.selection.batch(chosen, position_P, self.segments, self.order.seed, self.target)
        return rows.pin_memory() if torch.cuda.is_available() else rows


def evaluation_batches(
    selection: Selection,
    batch: int,
    segments: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    target: npt.NDArray[np.float32] | None = None,
) -> Iterator[tuple[ECGBatch, bool]]:
    """Every record of the selection once, ``batch`` positions at a time over all ranks.

    Yields the rank's rows and whether they are a share: the last, incomplete batch goes to every rank whole.
    """
    chosen = selection.in_order()
    for first in range(0, len(chosen), batch):
        positions = np.arange(first, min(first + batch, len(chosen)), dtype=np.int64)
        shared = len(positions) == batch
        if shared:
            positions = positions.reshape(world_size, -1)[rank]
        yield selection.batch([chosen[p] for p in positions], positions, segments, seed, target), shared


class Prefetch(Iterator[Item]):
    """Runs an iterator ahead in a thread. Errors of the thread are raised where its items are taken."""

    def __init__(self, items: Iterable[Item], ahead: int = 3) -> None:
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(items),), daemon=True, name="prefetch")
        self._thread.start()

    def _fill(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> Item:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # the thread has ended: whoever asks again must not wait for it
            raise item
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()
