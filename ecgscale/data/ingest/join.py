"""The end of an ingest: finished slices -> rejected.csv, index and manifest, which makes the folder a data set.

Part files are read one after the other, so that memory does not grow with the number of records.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecgscale.data.ingest.job import Job
from ecgscale.data.ingest.mark import Mark, sweep
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.slice import SPLIT_VALUE, Part, read_columns
from ecgscale.data.ingest.splits import Splits, check_not_empty, splits_by_hash, splits_by_value
from ecgscale.data.shards import Columns, map_index, shard_entry, torn_patients, write_index_in_parts, write_manifest
from ecgscale.errors import InputError

_CHUNK = 1 << 20  # records of an old index that are copied at once
_REJECTED = "rejected.csv"
_OLDER_IDS = (
    "a record of an older version, whose patient's id stands as it was written (17.0, NA); where such occur, ingest "
    "all anew"
)


@dataclass(frozen=True)
class Ingested:
    """What came of it."""

    records: int
    rejected: int
    shards: int
    patients_known: bool  # whether any record names its patient; otherwise each counts as a person of its own
    notes: dict[str, int] = field(default_factory=dict)  # what was done to labels and ids -> how often

    @staticmethod
    def of(described: dict[str, Any]) -> Ingested:
        """From an entry of the manifest's ``sources``."""
        always = {name: described[name] for name in ("records", "rejected", "shards", "patients_known")}
        return Ingested(**always, notes=described.get("notes", {}))


def finish(job: Job, mark: Mark) -> Ingested:
    """Join the parts, which must all be there, write the manifest and tidy up.

    Raises InputError when no record could be read, when the splits are wrong and when the disk is full.
    """
    found = _gather(job)
    if not found.records:
        sweep(job.out)
        mark.remove()
        first = f", the first because: {found.first_reason}" if found.first_reason else ""
        raise InputError(f"{job.out}: none of the {len(job.items)} records could be read{first}")
    try:
        check_not_empty(found.split_values, job.options)
        _check_patients(job, found)
    except InputError:
        mark.allow_other_splits()
        raise
    base = job.base or {"records": 0, "shards": [], "sources": []}
    older = [one for one in base["sources"] if one.get("patients_known") and "notes" not in one]
    if older:
        found.notes[_OLDER_IDS] = sum(one["records"] for one in older)
    index = write_index_in_parts(job.out, base["records"] + found.records, _columns(job, found))
    described = {
        "dataset": job.source.dataset,
        "options": {name: value for name, value in vars(job.options).items() if value},
        "records": found.records,
        "rejected": len(job.items) - found.records,
        "shards": len(found.entries),
        "patients_known": found.patients_known,
        "notes": dict(found.notes),
        "items_sha256": job.items_sha256,
    }
    write_manifest(job.out, job.options.rate_hz, index, base["shards"] + found.entries, [*base["sources"], described])
    sweep(job.out)
    mark.remove()
    return Ingested.of(described)


def check_all_there(job: Job, mark: Mark) -> None:
    """Raises InputError that names the part of the first slice that is missing."""
    missing = [number for number, (_, part) in enumerate(job.parts()) if part is None]
    if missing:
        n = mark.parts()
        i = next(i for i in range(1, n + 1) if missing[0] in job.numbers_of_part(i, n))
        raise InputError(
            f"{job.out}: {len(missing)} of {len(job)} shards are not there yet, the first is "
            f"{job.tar(missing[0]).name} of --part {i}/{n}; run what is missing, or leave --merge out to do it here"
        )


# -- what the parts say ----------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """What the parts say together."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    """Of the manifest, one for each tar."""
    split_values: set[str] = field(default_factory=set)
    patients_known: bool = False
    notes: Counter[str] = field(default_factory=Counter)
    first_reason: str = ""
    """Why a record was rejected."""

    @property
    def records(self) -> int:
        return sum(entry["records"] for entry in self.entries)

    def add(self, job: Job, tar: Path, part: Part) -> None:
        if part.records:
            about = (part.records, job.source.dataset, job.options.payload, part.bytes, part.sha256)
            self.entries.append(shard_entry(tar, *about))
        self.split_values.update(part.split_values)
        self.patients_known |= part.patients_known
        self.notes.update(part.notes)
        if part.rejected and not self.first_reason:
            self.first_reason = part.rejected[0][1]


def _gather(job: Job) -> _Found:
    """Go through the parts once, and write rejected.csv on the way."""
    found = _Found()
    path = job.out / _REJECTED
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf8", errors="backslashreplace", newline="") as file:
            table = csv.writer(file)
            table.writerow(("record", "reason", "dataset"))
            table.writerows(_old_rejected(job))
            for tar, part in job.parts():
                if part is None:
                    raise InputError(f"{tar}: gone or damaged while it was ingested; run the same command again")
                table.writerows((item, reason, job.source.dataset) for item, reason in part.rejected)
                found.add(job, tar, part)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return found


def _old_rejected(job: Job) -> Iterator[list[str]]:
    """The rows of the set that is appended to, without those of an --append that was killed."""
    path = job.out / _REJECTED
    if job.base is not None and path.exists():
        with path.open(encoding="utf8", newline="") as file:
            yield from islice(csv.reader(file), 1, 1 + job.base["rejected"])


# -- columns ---------------------------------------------------------------------------------------------------------


def _columns(job: Job, found: _Found) -> Iterator[Columns]:
    """Of all records, those of the old index first."""
    if job.base is not None:
        old = map_index(job.out / job.base["index"]["file"], job.base["records"])
        for first in range(0, job.base["records"], _CHUNK):
            yield {name: column[first : first + _CHUNK] for name, column in old.items()}
    for entry in found.entries:
        columns, values = read_columns(job.out / entry["file"])
        yield columns | {"split": _split(columns, values, job.options)}


def _split(columns: Columns, values: list[str], options: IngestOptions) -> Splits:
    if options.split_by:
        return splits_by_value(values, columns[SPLIT_VALUE], options)
    return splits_by_hash(columns["patient"], options)


def _check_patients(job: Job, found: _Found) -> None:
    """Raises InputError where a patient stands in two splits."""
    if job.base is None and not job.options.split_by:
        return  # a hash puts no patient into two
    pairs = [(columns["patient"].copy(), columns["split"].copy()) for columns in _columns(job, found)]
    patient, split = (np.concatenate(column) for column in zip(*pairs, strict=True))
    if torn := torn_patients(patient, split):
        codes, both = torn
        how = f" by {job.options.split_by}" if job.options.split_by else ""
        hint = "; append with the split options of the earlier records" if job.base else ""
        raise InputError(
            f"{job.out}: patient {_name_of(job, found, int(codes[0]))!r} stands in two splits ({both}){how}; "
            f"a patient may be in one{hint}"
        )


def _name_of(job: Job, found: _Found, code: int) -> str:
    """A patient's name, out of the first new record of that code."""
    for entry in found.entries:
        tar = job.out / entry["file"]
        columns, _ = read_columns(tar)
        at = np.flatnonzero(columns["patient"] == code)
        if at.size:
            with tar.open("rb") as file:
                file.seek(int(columns["json_offset"][at[0]]))
                said = json.loads(file.read(int(columns["json_length"][at[0]])))
            return str(said["patient"] or said["name"])
    raise AssertionError(code)
