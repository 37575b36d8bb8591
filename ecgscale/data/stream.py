"""Order + shards -> batches, with a savable position.

The state of a training stream is one number, the position of its next batch. Batches are made ahead of need by
threads: gathering is memory copies, checksums and decompression, all of which release Python's lock.

Shape suffixes: P positions, B rows, L the twelve leads, T samples.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ecgscale.data.batch import ECGBatch
from ecgscale.data.open_tars import UnreadableShardError
from ecgscale.data.order import Order, Place
from ecgscale.data.remote import is_remote
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import DamagedRecordError
from ecgscale.errors import InputError, MachineError
from ecgscale.lead_names import LEADS

Int64 = npt.NDArray[np.int64]
Copied = Callable[[], torch.cuda.Event | None]

_PLANNED = 4096  # positions whose places are worked out at once: numpy's cost per call is spread over them
_AHEAD = 3  # batches that are made ahead of need by each worker
_REDRAWS = 200  # the last is 20,000 batches further on
_LOOKED_AHEAD = 16  # batches at the begin of a stage that tell which shards are fetched first


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
        pinned: bool | None = None,
    ) -> None:
        """``target`` (records of the whole set, classes) gives rows their labels. Batches lie in ``pinned`` memory,
        from which a GPU copies by itself; None: where there is one."""
        self.selection, self.order, self.segments, self.target = selection, order, segments, target
        self.rank, self.world_size = rank, world_size
        self.pinned = torch.cuda.is_available() if pinned is None else pinned
        self.unreadable: set[int] = set()  # shards that are skipped
        self.damaged: set[int] = set()  # numbers of records that are skipped
        self.redrawn = 0  # records that were read instead of others
        self._plans: dict[int, tuple[Int64, Int64, npt.NDArray[np.bool_]]] = {}
        self._lock = threading.Lock()

    @property
    def micro_steps(self) -> int:
        return self.order.global_batch // self.order.contrast_batch

    def from_batch(self, batch: int, copied: Copied | None = None) -> Batches:
        """The micro-batches from global batch number ``batch`` on; each holds until the next is asked for.

        ``copied`` gives, when the next is asked for, what comes when those before are on the device, if they are on
        their way. Without it, all that the current stream was given before counts as that.
        """
        return Batches(self, batch * self.micro_steps, copied or (_given_so_far if self.pinned else lambda: None))

    def micro_batch(self, batch: int, micro_step: int) -> ECGBatch:
        """This rank's rows of one micro-step of a global batch."""
        return self.make(batch * self.micro_steps + micro_step)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, T) of a micro-batch."""
        rows = self.order.contrast_batch // self.world_size
        return self.segments * rows, len(LEADS), self.selection.samples

    def make(self, micro_batch: int, buffer: torch.Tensor | None = None) -> ECGBatch:
        """Micro-batch number ``micro_batch``, counted over all global batches."""
        while True:
            position_P, number_P, redrawn_P = self._planned(micro_batch)
            try:
                batch = self.selection.batch(number_P, position_P, self.segments, self.order.seed, self.target, buffer)
            except (UnreadableShardError, DamagedRecordError) as error:
                if self.selection.config.unreadable == "stop" or self.selection.shards.cache.stopping.is_set():
                    raise
                self._skip(error)
                continue
            with self._lock:
                self.redrawn += int(redrawn_P.sum())
            return batch.pin_memory() if self.pinned else batch

    def _skip(self, error: UnreadableShardError | DamagedRecordError) -> None:
        """A damaged record is replaced wherever it is met, so that what is read depends on the data alone."""
        with self._lock:
            if isinstance(error, UnreadableShardError):
                known = error.shard in self.unreadable
                self.unreadable.add(error.shard)
            else:
                known = error.number in self.damaged
                self.damaged.add(error.number)
            self._plans.clear()
        if not known:
            tqdm.write(f"rank {self.rank} skips: {error}", file=sys.stderr)

    def counts(self, batch: int) -> dict[str, float]:
        """Scalars: what was drawn of each data set before a global batch."""
        drawn = self.order.draws(batch * self.order.global_batch)
        if self.order.mixture is None:
            return {"data/epochs": batch / self.order.batches_per_epoch}
        scalars: dict[str, float] = {}
        usable_Q = self.selection.counts_of_sets.tolist()
        for name, count, usable in zip(self.selection.shards.names, drawn, usable_Q, strict=True):
            scalars |= {f"data/recordings/{name}": float(count), f"data/epochs/{name}": count / usable}
        return scalars

    def own_counts(self) -> dict[str, float]:
        """Scalars of this rank alone: what was skipped and replaced since it was started, and what it fetched."""
        stats = self.selection.shards.cache.stats
        return {
            "data/skipped_shards": float(len(self.unreadable)),
            "data/skipped_recordings": float(len(self.damaged)),
            "data/replaced_recordings": float(self.redrawn),
            "data/downloads": float(stats.downloads),
            "data/download_retries": float(stats.retries),
            "data/damaged_copies": float(stats.damaged),
        }

    def _planned(self, micro_batch: int) -> tuple[Int64, Int64, npt.NDArray[np.bool_]]:
        """Positions, record numbers and which of them are substitutes; worked out for several micro-batches at once."""
        rows = self.order.contrast_batch // self.world_size
        together = max(1, _PLANNED // rows)
        plan, inside = divmod(micro_batch, together)
        with self._lock:
            if plan not in self._plans:
                steps = range(plan * together, (plan + 1) * together)
                positions = [
                    self.order.rank_positions(*divmod(step, self.micro_steps), self.rank, self.world_size)
                    for step in steps
                ]
                position_P = np.concatenate(positions)
                self._plans = dict([*self._plans.items(), (plan, (position_P, *self._numbers(position_P)))][-2:])
            position_P, number_P, redrawn_P = self._plans[plan]
        rows_of = slice(inside * rows, (inside + 1) * rows)
        return position_P[rows_of], number_P[rows_of], redrawn_P[rows_of]

    def _numbers(self, position_P: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Whole-set numbers of the records at positions; those of unreadable shards have substitutes."""
        place = self.order.places(position_P)
        bad_P = self._bad(place)
        redrawn_P = bad_P.copy()
        for redraw in range(1, _REDRAWS if self._any_readable() else 1):
            if not bad_P.any():
                break
            other = self.order.places(position_P[bad_P], redraw)
            place.shard[bad_P], place.record[bad_P] = other
            bad_P[bad_P] = self._bad(other)
        else:
            if bad_P.any():
                names = ", ".join(sorted(self.selection.shards.shards[shard].place for shard in self.unreadable)[:3])
                raise InputError(
                    f"no readable recording is left beside {len(self.unreadable)} unreadable shards ({names}) and "
                    f"{len(self.damaged)} damaged recordings; fetch or ingest the data again"
                )
        return self._number(place), redrawn_P

    def _any_readable(self) -> bool:
        if not (self.unreadable or self.damaged):
            return True
        numbers = self.selection.numbers
        bad_R = np.isin(self.selection.shards.shard_of(numbers), list(self.unreadable))
        return not (bad_R | np.isin(numbers, list(self.damaged))).all()

    def _bad(self, place: Place) -> npt.NDArray[np.bool_]:
        return np.isin(place.shard, list(self.unreadable)) | np.isin(self._number(place), list(self.damaged))

    def _number(self, place: Place) -> Int64:
        numbers: Int64 = self.selection.numbers[self.selection.first_S[place.shard] + place.record]
        return numbers


class Batches(Iterator[ECGBatch]):
    """The micro-batches of a stream in order, made ahead of need by threads into buffers that are used again.

    A batch holds until the next one is asked for. Errors of a thread are raised where its batch is taken, and again
    when asked once more.
    """

    def __init__(self, stream: TrainStream, first: int, copied: Copied) -> None:
        self._stream, self._workers, self._copied = stream, stream.selection.config.workers, copied
        self._taken, self._asked = first, first
        ahead = _AHEAD * self._workers
        self._buffers = [_Buffer(stream.shape, stream.pinned) for _ in range(ahead + 1)]
        self._pool = ThreadPoolExecutor(max(1, self._workers), "batches", _as_here(stream.pinned))
        self._made: deque[Future[ECGBatch]] = deque()
        self._error: BaseException | None = None
        self._stages = _Stages(stream, first // stream.micro_steps)
        for _ in range(ahead):
            self._ask()

    def __next__(self) -> ECGBatch:
        if self._error is not None:
            raise self._error
        self._buffers[(self._taken - 1) % len(self._buffers)].release(self._copied())
        self._stages.taken(self._taken // self._stream.micro_steps)
        self._taken += 1
        try:
            self._ask()
            return self._made.popleft().result()
        except BaseException as error:
            self._error = error
            raise

    def _ask(self) -> None:
        buffer, number = self._buffers[self._asked % len(self._buffers)], self._asked
        self._stages.reach(number // self._stream.micro_steps)
        self._asked += 1
        if self._workers:
            self._made.append(self._pool.submit(lambda: self._stream.make(number, buffer.ready())))
            return
        made: Future[ECGBatch] = Future()
        made.set_result(self._stream.make(number, buffer.ready()))
        self._made.append(made)

    def close(self) -> None:
        """Stop the threads; a download that is under way is given up."""
        cache = self._stream.selection.shards.cache
        cache.stopping.set()
        pools = [self._pool, *self._stages.pools()]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()
        cache.stopping.clear()
        self._stream.selection.shards.keep_open(())


class _Buffer:
    """Samples of one batch, used again when the copy to the device is done."""

    def __init__(self, shape: tuple[int, int, int], pinned: bool) -> None:
        self._tensor = torch.empty(shape, dtype=torch.int16, pin_memory=pinned)
        self._copied: torch.cuda.Event | None = None

    def release(self, copied: torch.cuda.Event | None) -> None:
        """It may be used again when its copy has come to the device."""
        self._copied = copied

    def ready(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


def _given_so_far() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.current_stream().record_event()
    return event


def _as_here(pinned: bool) -> Callable[[], None]:
    """How a new thread begins: on this one's GPU. By itself it would take up the first, and memory there."""
    if not pinned:
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


class _Stages:
    """Keeps the shards open that the stream is in, and fetches remote ones before the stream comes to them."""

    def __init__(self, stream: TrainStream, batch: int) -> None:
        self._stream, self._shards = stream, stream.selection.shards
        self._plan = stream.order.stages(batch, stream.rank, stream.world_size)
        self._stage, self._next = next(self._plan), next(self._plan)
        remote = any(is_remote(one.place) for one in self._shards.sets)
        downloads = stream.selection.config.cache.downloads
        self._pool = ThreadPoolExecutor(downloads, "fetch") if remote else None
        self._before: list[int] = []  # shards of the stages before, while batches of them are still being made
        self._enter(self._stage)

    def reach(self, batch: int) -> None:
        """A batch is about to be made."""
        while batch >= self._next[0]:
            self._before += self._stage[1].tolist()
            self._stage, self._next = self._next, next(self._plan)
            self._enter(self._stage)

    def taken(self, batch: int) -> None:
        """A batch was made, and with it all before it."""
        if self._before and batch >= self._stage[0]:
            self._before = []
            self._shards.keep_open(self._stage[1].tolist())

    def _enter(self, stage: tuple[int, Int64]) -> None:
        self._shards.keep_open(stage[1].tolist(), self._before)
        if self._pool is not None:
            for first, shards in (stage, self._next):
                for shard in self._in_order_of_use(first, shards):
                    self._pool.submit(self._fetch, shard)

    def _fetch(self, shard: int) -> None:
        try:
            self._shards.prefetch(shard)
        except (InputError, MachineError):
            return  # whoever needs the shard meets the same error, and knows what to do

    def _in_order_of_use(self, batch: int, shards: Int64) -> list[int]:
        """The shards of a stage; first those that are needed first."""
        order, rank, world_size = self._stream.order, self._stream.rank, self._stream.world_size
        position_P = np.concatenate(
            [
                order.rank_positions(batch + later, micro_step, rank, world_size)
                for later in range(_LOOKED_AHEAD)
                for micro_step in range(self._stream.micro_steps)
            ]
        )
        used = order.places(position_P).shard
        return list(dict.fromkeys([*used[np.isin(used, shards)].tolist(), *shards.tolist()]))

    def pools(self) -> list[ThreadPoolExecutor]:
        return [] if self._pool is None else [self._pool]
