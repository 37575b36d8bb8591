"""A source of records -> a folder of shards, by several processes, with bytes that do not depend on how many.

Each shard is the work of one process: a fixed slice of the source's sorted items. Splits need all patients, so they
are set when all tars stand; then come the indexes, and last the manifest.
"""

from __future__ import annotations

import csv
import fcntl
import io
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ecgscale.data.shards import (
    MANIFEST,
    SPLITS,
    Columns,
    write_index,
    write_manifest,
    write_tar,
    write_whole,
)
from ecgscale.data.sources import Source
from ecgscale.errors import InputError
from ecgscale.record import Record

_UNFINISHED = "ingest.unfinished"  # stands in the folder until the manifest does


@dataclass(frozen=True)
class IngestOptions:
    """How records become shards."""

    rate_hz: float = 500.0
    records_per_shard: int = 512
    validation_fraction: float = 0.1  # of the patients, by hash
    test_fraction: float = 0.0  # of the patients, by hash
    split_by: str = ""  # label or metadata key that names the split instead of the hash, such as strat_fold
    validation_values: tuple[str, ...] = ()
    test_values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.rate_hz <= 100_000:
            raise InputError(f"rate-hz {self.rate_hz:g}: give a sample rate between 1 and 100000 Hz")
        if self.records_per_shard < 1:
            raise InputError(f"records-per-shard {self.records_per_shard}: give 1 or more")
        fractions = (self.validation_fraction, self.test_fraction)
        if not (min(fractions) >= 0 and sum(fractions) < 1):  # NaN is neither
            raise InputError(f"validation and test fractions {fractions}: both ≥ 0 and together below 1")
        if bool(self.split_by) != bool(self.validation_values or self.test_values):
            raise InputError("split-by goes together with validation-values or test-values")


@dataclass(frozen=True)
class Ingested:
    """What came of it."""

    records: int
    rejected: int
    shards: int
    patients_known: bool  # whether any record names its patient; otherwise each counts as a person of its own


@dataclass
class _Slice:
    """One process's finished shard: its index columns, what it refused, and the key that names the split."""

    columns: Columns
    rejected: list[tuple[str, str]] = field(default_factory=list)
    split_values: list[str] = field(default_factory=list)
    patients: list[str | None] = field(default_factory=list)


def ingest(source: Source, out: Path, options: IngestOptions, workers: int = 1) -> Ingested:
    """Write a source as a data set folder; refuses a folder that already is one.

    Raises InputError for an empty source, when no record can be read, when a patient falls into two splits, and when
    the disk is full. What cannot be read is listed with its reason in ``rejected.csv``.
    """
    _refuse_data_set(out)
    if workers < 1:
        raise InputError(f"workers {workers}: give 1 or more processes")
    _check_utf8(source.dataset)
    items = source.items()
    with _claimed(out):
        return _ingest(source, items, out, options, workers)


def _ingest(source: Source, items: list[str], out: Path, options: IngestOptions, workers: int) -> Ingested:
    slices = [
        items[start : start + options.records_per_shard] for start in range(0, len(items), options.records_per_shard)
    ]
    tars = [out / f"shard-{number:06d}.tar" for number in range(len(slices))]
    tasks = [(source, tar, part, options) for tar, part in zip(tars, slices, strict=True)]
    done = list(_run(tasks, workers, len(items)))
    _write_rejected(out / "rejected.csv", [row for part in done for row in part.rejected])
    rejected = sum(len(part.rejected) for part in done)
    if rejected == len(items):
        first = next((f", the first because: {reason}" for part in done for _, reason in part.rejected), "")
        raise InputError(f"{out}: none of the {rejected} records could be read{first}")
    splits = _splits(done, options)
    entries = []
    for tar, part, split_B in zip(tars, done, splits, strict=True):
        if len(split_B):
            entries.append(write_index(tar, part.columns | {"split": split_B}))
        else:
            tar.unlink()
    write_manifest(
        out, source.dataset, options.rate_hz, entries, rejected, {k: v for k, v in vars(options).items() if v}
    )
    known = any(patient is not None for part in done for patient in part.patients)
    return Ingested(len(items) - rejected, rejected, len(entries), known)


def _refuse_data_set(out: Path) -> None:
    if (out / MANIFEST).exists():
        raise InputError(f"{out}: holds a data set already; give another folder or remove it")


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """The folder, marked and locked while an ingest works in it; the mark stays where it was interrupted."""
    _begin(out)
    with (out / _UNFINISHED).open("w") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{out}: another ingest is writing there; wait for it or give another folder") from error
        _refuse_data_set(out)  # that another ingest has finished in the meantime
        for path in {*out.glob("shard-*"), *out.glob("*.partial")}:
            path.unlink()
        yield
        (out / _UNFINISHED).unlink()


def _begin(out: Path) -> None:
    """Make and mark the folder, unless it holds shards that somebody else made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        leftovers = {*out.glob("shard-*"), *out.glob("*.partial")}
        if leftovers and not (out / _UNFINISHED).exists():
            raise InputError(f"{min(leftovers)}: not made by an interrupted ingest; give an empty or a new folder")
        (out / _UNFINISHED).touch()
    except OSError as error:
        raise InputError(f"{out}: cannot make a data set there: {error.strerror or error}") from error


def _run(tasks: list[tuple[Source, Path, list[str], IngestOptions]], workers: int, total: int) -> Iterator[_Slice]:
    with tqdm(total=total, unit="rec", desc="ingest", disable=None) as bar:
        if workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                yield _write_slice(*task)
                bar.update(len(task[2]))
            return
        # Forked from a process that has done the slow imports and nothing else, so that they are done once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(tasks[0][0]).__module__, "webdataset.writer"])
        with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
            try:
                for task, part in zip(tasks, pool.map(_write_slice, *zip(*tasks, strict=True)), strict=True):
                    yield part
                    bar.update(len(task[2]))
            except BrokenProcessPool as error:
                raise InputError("a worker was killed, most likely for memory: give fewer --workers") from error


def _end_with_parent() -> None:
    """A killed ingest takes its workers along: they would finish their shards in the folder and then wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_slice(source: Source, tar: Path, items: list[str], options: IngestOptions) -> _Slice:
    done = _Slice({})

    def records() -> Iterator[tuple[str, Record]]:
        for item in items:
            try:
                _check_utf8(item)
                record = source.read(item).resampled(options.rate_hz)
            except InputError as error:
                done.rejected.append((item, str(error)))
                continue
            done.split_values.append(_split_value(record, options.split_by))
            done.patients.append(record.patient)
            yield f"{tar.stem}-{len(done.patients) - 1:06d}", record

    done.columns = write_tar(tar, source.dataset, records())
    return done


def _check_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # a file name in an old encoding
        raise InputError(f"the name {name!r} is not UTF-8; give another") from error


def _split_value(record: Record, key: str) -> str:
    if not key:
        return ""
    values = record.labels.get(key) or [record.metadata.get(key, "")]
    return values[0]


def _splits(parts: list[_Slice], options: IngestOptions) -> list[npt.NDArray[np.uint8]]:
    """The split of each record, per shard. Every patient lies in one split."""
    if not options.split_by:
        return [_split_by_hash(part.columns["patient"], options) for part in parts]
    code_of_patient: dict[int, int] = {}
    splits = []
    for part in parts:
        codes = [_split_code(value, options) for value in part.split_values]
        for patient, name, code in zip(part.columns["patient"].tolist(), part.patients, codes, strict=True):
            if code_of_patient.setdefault(patient, code) != code:
                both = f"{SPLITS[code_of_patient[patient]]} and {SPLITS[code]}"
                raise InputError(
                    f"patient {name!r} stands in two splits ({both}) by {options.split_by}; a patient may be in one"
                )
        splits.append(np.array(codes, np.uint8))
    for code, values in ((1, options.validation_values), (2, options.test_values)):
        if values and not any((split == code).any() for split in splits):
            known = sorted({value for part in parts for value in part.split_values if value})
            hint = f"the records have {', '.join(known[:10])}" if known else "no record has that key at all"
            raise InputError(
                f"no record has {options.split_by} in {list(values)}, so {SPLITS[code]} would be empty; {hint}"
            )
    return splits


def _split_code(value: str, options: IngestOptions) -> int:
    return 2 if value in options.test_values else 1 if value in options.validation_values else 0


def _split_by_hash(patient_B: npt.NDArray[np.int64], options: IngestOptions) -> npt.NDArray[np.uint8]:
    place_B = (patient_B % 1_000_003) / 1_000_003  # the code is a hash already
    validation_B = place_B < options.test_fraction + options.validation_fraction
    return np.where(place_B < options.test_fraction, 2, np.where(validation_B, 1, 0)).astype(np.uint8)


def _write_rejected(path: Path, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("record", "reason"), *rows])
    write_whole(path, text.getvalue().encode(errors="backslashreplace"))
