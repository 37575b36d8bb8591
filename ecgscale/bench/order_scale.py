"""The order at the size of ten million recordings, and how well it shuffles.

Shape suffixes: P positions, B batches, S shards.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.ingest import IngestOptions
from ecgscale.data.order import Order
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import COLUMNS, Columns, write_index, write_manifest
from ecgscale.process import memory_bytes

PLANNED = 4096  # positions that a stream works out at once
_SAMPLES = 2500  # of 5 s
_MEMBER = 512 + 128 + 24 * _SAMPLES + 400  # bytes in a tar: header, .npy header, 12 leads, padding


# -- scale -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """Costs of an order of many records."""

    memory_mb: float  # most at any time, beside mapped files
    plan_s: float  # an epoch
    places_s: float  # of PLANNED positions in a planned epoch
    open_s: float = 0.0  # a data set of so many records and their selection


def plan(shards: int, records_per_shard: int) -> Planned:
    """An order over so many shards with an array of the numbers of its records, as a selection holds it."""
    tracemalloc.start()
    numbers = np.arange(shards * records_per_shard, dtype=np.uint32)
    _plan_epoch((records_per_shard,) * shards, numbers)
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    plan_s, places_s = _plan_epoch((records_per_shard,) * shards, numbers)  # again, as tracing slows it down
    return Planned(peak_mb, plan_s, places_s)


def _plan_epoch(shard_records: tuple[int, ...], numbers: npt.NDArray[np.integer[Any]]) -> tuple[float, float]:
    """Seconds to plan an epoch, and to work out positions in one that is planned."""
    began_s = time.perf_counter()
    order = Order(shard_records, PLANNED, PLANNED, 64, seed=0)
    order.places(0)
    planned_s = time.perf_counter()
    first_S = np.concatenate([[0], np.cumsum(shard_records)])
    middle = order.positions_per_epoch // 2
    place = order.places(np.arange(middle, middle + PLANNED))
    chosen = numbers[first_S[place.shard] + place.record]
    assert len(chosen) == PLANNED
    return planned_s - began_s, time.perf_counter() - planned_s


def plan_from_index(folder: Path, shards: int, records_per_shard: int) -> Planned:
    """The same from a data set folder of that size, opened in a process of its own. The folder must be new."""
    # A process each: the first one's memory is no matter, and the second one's is what is measured.
    for work in (_build, _opened):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(work, folder, shards, records_per_shard).result()
    assert isinstance(result, Planned)
    return result


def _build(folder: Path, shards: int, records_per_shard: int) -> None:
    """A folder like one of so many records of 5 s; its tars are holes of the right size."""
    folder.mkdir()
    records, tar_bytes = shards * records_per_shard, records_per_shard * 2 * _MEMBER
    inside = np.tile(np.arange(records_per_shard, dtype=np.uint64), shards)
    columns: Columns = {
        name: np.zeros((records, *shape), dtype) for name, (dtype, shape) in COLUMNS.items()
    }  # of zeros, which take no memory until they are written
    columns["samples"][:], columns["leads"][:], columns["scale"][:] = _SAMPLES, 0xFFF, 1e-3
    columns["patient"][:] = np.arange(records) // 3
    columns["split"][::10] = 1
    columns["offset"] = inside * np.uint64(2 * _MEMBER)
    columns["length"][:] = 128 + 24 * _SAMPLES
    entries = [
        {
            "file": f"shard-{number:06d}.tar",
            "records": records_per_shard,
            "bytes": tar_bytes,
            "sha256": "0" * 64,
            "dataset": "large",
            "payload": "npy",
        }
        for number in range(shards)
    ]
    for entry in entries:
        with (folder / str(entry["file"])).open("wb") as file:
            file.truncate(tar_bytes)
    source = {"dataset": "large", "options": {}, "records": records, "rejected": 0}
    write_manifest(folder, IngestOptions.rate_hz, write_index(folder, columns), entries, [source])


def _opened(folder: Path, shards: int, records_per_shard: int) -> Planned:
    with _peak_memory() as memory:
        began_s = time.perf_counter()
        found = ShardSet.open(folder)
        selection = Selection(found, DataConfig(min_record_s=_SAMPLES / found.rate_hz), "train")
        open_s = time.perf_counter() - began_s
        plan_s, places_s = _plan_epoch(selection.counts, selection.numbers)
    return Planned(memory[0] / 1e6, plan_s, places_s, open_s)


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Bytes of this process's anonymous memory at its peak, beyond those at the begin; looked at every 2 ms.

    The pages of mapped files belong to the system, which drops them where it needs room.
    """
    peak, ended, before = [0.0], threading.Event(), memory_bytes("RssAnon")

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], memory_bytes("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak[0] = max(peak[0], memory_bytes("RssAnon") - before)


# -- shuffling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shuffled:
    """How well an epoch is shuffled. Sources often hold a patient's recordings, or one hospital's, in a row."""

    correlation: float  # Spearman's, of position and number in the source, absolute
    shards_per_batch: float
    pairs_per_batch: float  # two recordings of one patient


def shuffle_quality(order: Order, records_per_shard: int, records_per_patient: int) -> Shuffled:
    """Of one epoch, where patients stand side by side in the source."""
    place = order.places(np.arange(order.positions_per_epoch))
    return _quality(place.shard * records_per_shard + place.record, order, records_per_shard, records_per_patient)


def permutation_quality(order: Order, records_per_shard: int, records_per_patient: int) -> Shuffled:
    """The same of a full permutation."""
    number_P = np.random.default_rng(0).permutation(order.records)[: order.positions_per_epoch]
    return _quality(number_P, order, records_per_shard, records_per_patient)


def _quality(
    number_P: npt.NDArray[np.int64], order: Order, records_per_shard: int, records_per_patient: int
) -> Shuffled:
    rank_P = np.argsort(np.argsort(number_P))
    correlation = float(np.corrcoef(np.arange(len(rank_P)), rank_P)[0, 1])
    batches = number_P.reshape(-1, order.global_batch)
    shards = float(np.mean([np.unique(batch // records_per_shard).size for batch in batches]))
    pairs = float(np.mean([_pairs(batch // records_per_patient) for batch in batches]))
    return Shuffled(abs(correlation), shards, pairs)


def _pairs(patient_P: npt.NDArray[np.int64]) -> int:
    counts = np.unique(patient_P, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())
