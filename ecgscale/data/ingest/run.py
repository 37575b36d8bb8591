"""A source of records -> a folder of shards, by any number of processes, with bytes that do not depend on how many.

Each shard is the work of one process: a fixed slice of the source's sorted items, with a part file when it is done.
Splits need all patients, so they are set when all parts are there; then comes the index, and last the manifest. An
ingest that was killed goes on with the slices that have no part file.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tqdm import tqdm

from ecgscale.data.cells import find_key
from ecgscale.data.copies import about_copies
from ecgscale.data.ingest.job import IngestJob, open_job
from ecgscale.data.ingest.join import Ingested, check_all_there, finish
from ecgscale.data.ingest.mark import Mark, claimed, sweep
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.slice import Part, Slice, convert
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError

if TYPE_CHECKING:
    from ecgscale.data.sources import Source

_NO_ARGUMENTS: Mapping[str, str] = MappingProxyType({})
_PROBED = 64  # records that are asked for the key of the splits, over the whole source
_AHEAD = 2  # slices per worker that are handed to the pool at once


def ingest(
    source: Source,
    out: Path,
    options: IngestOptions,
    workers: int = 1,
    *,
    append: bool = False,
    restart: bool = False,
    arguments: Mapping[str, str] = _NO_ARGUMENTS,
) -> Ingested:
    """Write a source as a data set folder, or ``append`` it to one; goes on where an earlier call was interrupted.

    ``arguments`` is what else the records depend on, by the names that the user knows: an interrupted ingest goes on
    only with the same. ``restart`` throws away what it has done. What cannot be read is listed with its reason in
    ``rejected.csv``, exact copies in ``copies.csv``. Raises InputError for a folder that holds a data set, or none to
    append to; for one in which another ingest works or was begun; when no record can be read, when a patient falls into
    two splits, when no record has the key ``split_by``, and when the disk is full.
    """
    job = _open(source, out, options, arguments, append, workers)
    if job.finished:
        return _finished(job)
    with claimed(job, restart=restart) as mark:
        try:
            _convert(job, range(len(job)), workers)
        except _UnknownKeyError:
            _abandon(job, mark)
            raise
        return finish(job, mark)


def ingest_part(
    source: Source,
    out: Path,
    options: IngestOptions,
    part: tuple[int, int],
    workers: int = 1,
    *,
    append: bool = False,
    arguments: Mapping[str, str] = _NO_ARGUMENTS,
) -> int:
    """Write the shards of part i of n, (1, n) to (n, n), and leave the set unfinished; returns how many it still lacks.

    Parts run in any order, at the same time, and on any machines that share the folder. Raises InputError as ``ingest``
    does, and where another process writes the same shards.
    """
    i, n = part
    if not 1 <= i <= n:
        raise InputError(f"part {i}/{n}: give 1/{max(n, 1)} to {max(n, 1)}/{max(n, 1)}")
    job = _open(source, out, options, arguments, append, workers)
    if job.finished:
        return 0
    with claimed(job, part):
        _convert(job, job.numbers_of_part(i, n), workers)
        return sum(done is None for _, done in job.parts())


def merge_parts(
    source: Source,
    out: Path,
    options: IngestOptions,
    *,
    append: bool = False,
    arguments: Mapping[str, str] = _NO_ARGUMENTS,
) -> Ingested:
    """Finish the data set whose parts are all there; raises InputError that names the first that is missing."""
    job = _open(source, out, options, arguments, append, 1)
    if job.finished:
        return _finished(job)
    with claimed(job) as mark:
        check_all_there(job, mark)
        return finish(job, mark)


def _open(
    source: Source, out: Path, options: IngestOptions, arguments: Mapping[str, str], append: bool, workers: int
) -> IngestJob:
    if workers < 1:
        raise InputError(f"workers {workers}: give 1 or more processes")
    return open_job(source, out, options, arguments, append)


def _finished(job: IngestJob) -> Ingested:
    assert job.base is not None
    shards = ShardSet.open(job.out)
    return Ingested.of(job.base["sources"][-1], shards, about_copies(shards))


def _abandon(job: IngestJob, mark: Mark) -> None:
    sweep(job.out)
    mark.remove()


# -- conversion ------------------------------------------------------------------------------------------------------


def _convert(job: IngestJob, numbers: range, workers: int) -> None:
    """Convert those of the slices that are not done."""
    to_do = [number for number in numbers if not job.is_done(number)]
    total, left = (sum(len(job.items_of(number)) for number in some) for some in (numbers, to_do))
    finished = _run(map(job.slice, to_do), min(workers, len(to_do)))
    with tqdm(total=total, initial=total - left, unit="rec", desc="ingest", disable=None) as bar, closing(finished):
        key_is_known = not job.options.split_by
        for part in finished:
            bar.update(part.records + len(part.rejected) + part.held)
            if part.records and not key_is_known:
                if part.split_values == [""]:
                    _check_split_key(job)
                key_is_known = True


class _UnknownKeyError(InputError):
    """No record has the key that should name its split."""


def _check_split_key(job: IngestJob) -> None:
    """Ask records all over the source for the key, before hours are spent on converting them."""
    keys: set[str] = set()
    for item in job.items[:: -(-len(job.items) // _PROBED)]:
        try:
            record = job.source.read(item)
        except InputError:
            continue
        keys |= {*record.labels, *record.metadata}
    if keys and find_key(keys, job.options.split_by) is None:
        some = ", ".join(sorted(keys)[:20])
        raise _UnknownKeyError(f"split-by {job.options.split_by}: no record has that key; they have {some}")


def _run(tasks: Iterator[Slice], workers: int) -> Generator[Part]:
    """Parts in any order."""
    if workers <= 1:
        yield from map(convert, tasks)
        return
    first = next(tasks)
    # Forked from a process that has done the slow imports and nothing else, so that they are done once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(first.source).__module__])
    with ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        try:
            waiting = {pool.submit(convert, first)}
            waiting |= {pool.submit(convert, task) for task in islice(tasks, _AHEAD * workers - 1)}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(convert, task) for task in islice(tasks, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise InputError("a worker was killed, most likely for memory: give fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """A killed ingest takes its workers along: they would finish their shards in the folder and then wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
