"""The end of an ingest: finished slices -> rejected.csv, remarks.csv, index, manifest, which makes a data set,
and copies.csv.

Part files are read one after the other, so that memory does not grow with the number of records.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.copies import Copies, about_copies, is_flat, record_keys, write_copies
from ecgscale.data.ingest.job import IngestJob
from ecgscale.data.ingest.mark import Mark, sweep
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.slice import OTHER_LABELS, SPLIT_VALUE, Part, read_columns
from ecgscale.data.ingest.splits import Splits, United, check_not_empty, splits_by_hash, splits_by_value
from ecgscale.data.payload import Payload
from ecgscale.data.persons import odd_names
from ecgscale.data.remarked import NONE, Remarked
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import (
    Columns,
    map_index,
    read_signal,
    shard_entry,
    torn_patients,
    write_index_in_parts,
    write_manifest,
)
from ecgscale.data.spellings import Spellings
from ecgscale.errors import InputError, MachineError
from ecgscale.files import whole_file

_CHUNK = 1 << 20  # records of an old index that are copied at once
_REJECTED, _REMARKS = "rejected.csv", "remarks.csv"
_OLDER_IDS = (
    "a record of an older version, whose patient's id stands as it was written (17.0, NA); where such occur, ingest "
    "all anew"
)
_UNTOLD_IDS = (
    "a record of an older version, whose patient's id is not compared with others; where people may stand under two "
    "ids, ingest all anew"
)


@dataclass(frozen=True)
class Ingested:
    """What came of it."""

    records: int
    rejected: int
    shards: int
    patients_known: bool  # whether any record names its patient; otherwise each counts as a person of its own
    remarked: Mapping[str, Remarked]  # by kind; remarks.csv lists them
    held: int = 0  # that the set had already, under the same names with the same samples; they are left out
    shared_ids: dict[str, int] = field(default_factory=dict)  # other data set of the set -> ids that it has too
    notes: dict[str, int] = field(default_factory=dict)  # what was done to labels and ids -> how often
    copies: list[str] = field(default_factory=list)  # lines on all that the set holds; copies.csv lists them
    odd_names: list[str] = field(default_factory=list)  # lines on ids, labels and classes that may be one, likewise

    @staticmethod
    def of(described: dict[str, Any], shards: ShardSet, copies: list[str]) -> Ingested:
        """From an entry of the manifest's ``sources``; older ones say less."""
        always = {name: described[name] for name in ("records", "rejected", "shards", "patients_known")}
        later = {name: described[name] for name in ("held", "shared_ids", "notes") if name in described}
        remarked = {kind: Remarked(**one) for kind, one in described.get("remarked", {}).items()}
        return Ingested(**always, **later, remarked=remarked, copies=copies, odd_names=odd_names(shards))


def finish(job: IngestJob, mark: Mark) -> Ingested:
    """Join the parts, which must all be there, write the manifest and copies.csv, and tidy up.

    Raises InputError when no record could be read, when the splits are wrong and when the disk is full.
    """
    found = _gather(job)
    if not found.records:
        sweep(job.out)
        mark.remove()
        if found.held:
            rejected = len(job.items) - found.held
            others = f", {rejected} others are rejected, the first because: {found.first_reason}" if rejected else ""
            raise InputError(
                f"{job.out}: {found.held} records of {job.source.dataset!r} are in it already{others}; append others"
                + (f"; {found.notes[OTHER_LABELS]} x {OTHER_LABELS}" if found.notes[OTHER_LABELS] else "")
            )
        first = f", the first because: {found.first_reason}" if found.first_reason else ""
        raise InputError(f"{job.out}: none of the {len(job.items)} records could be read{first}")
    records = _Records.read(job, found)
    try:
        check_not_empty(found.split_values, job.options)
        copies = _copies(job, found, records)
        split_N = _splits(job, records, copies)
        _check_patients(job, found, records, split_N)
    except InputError:
        mark.allow_other_splits()
        raise
    base = job.base or {"records": 0, "shards": [], "sources": []}
    _note_older_ids(job, found, records)
    index = write_index_in_parts(job.out, len(split_N), _columns(job, found, split_N))
    described = {
        "dataset": job.source.dataset,
        "options": {name: value for name, value in vars(job.options).items() if value},
        "records": found.records,
        "rejected": len(job.items) - found.records - found.held,
        "shards": len(found.entries),
        "patients_known": found.patients_known,
        "remarked": {kind: asdict(one) for kind, one in found.remarked.items()},
        "notes": dict(found.notes),
        "classes": found.spellings.kept(),
        "patient_keys": dict(found.patient_keys),
        "items_sha256": job.items_sha256,
        "held": found.held,
        "shared_ids": _shared_ids(job, records),
    }
    write_manifest(job.out, job.options.rate_hz, index, base["shards"] + found.entries, [*base["sources"], described])
    shards = ShardSet.open(job.out)
    write_copies(shards, job.out, copies)
    sweep(job.out)
    mark.remove()
    return Ingested.of(described, shards, about_copies(shards, copies))


def _note_older_ids(job: IngestJob, found: _Found, records: _Records) -> None:
    """Say of how many old records the patients' ids are not those of this version, or are not compared with others."""
    named = [one for one in job.base["sources"] if one.get("patients_known")] if job.base else []
    if as_written := sum(one["records"] for one in named if "notes" not in one):
        found.notes[_OLDER_IDS] = as_written
    if named and job.base and not records.id_N[: job.base["records"]].any():
        found.notes[_UNTOLD_IDS] = job.base["records"]


def check_all_there(job: IngestJob, mark: Mark) -> None:
    """Raises InputError that names the part of the first slice that is missing, or whose records changed since."""
    missing = [number for number, (_, part) in enumerate(job.parts()) if part is None]
    if missing:
        raise _not_there(job, mark, missing, "are not there yet", "run what is missing")
    older = [number for number in range(len(job)) if not job.is_done(number)]
    if older:
        why = "were made before their records' files or tables changed"
        raise _not_there(job, mark, older, why, "run its part again")


def _not_there(job: IngestJob, mark: Mark, numbers: Sequence[int], why: str, what_to_do: str) -> InputError:
    n = mark.parts()
    i = next(i for i in range(1, n + 1) if numbers[0] in job.numbers_of_part(i, n))
    return InputError(
        f"{job.out}: {len(numbers)} of {len(job)} shards {why}, the first is {job.tar(numbers[0]).name} of "
        f"--part {i}/{n}; {what_to_do}, or leave --merge out to do it here"
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
    spellings: Spellings = field(default_factory=Spellings)
    patient_keys: Counter[str] = field(default_factory=Counter)
    first_reason: str = ""
    """Why a record was rejected."""
    remarked: dict[str, Remarked] = field(default_factory=dict)
    held: int = 0

    @property
    def records(self) -> int:
        return sum(entry["records"] for entry in self.entries)

    def add(self, job: IngestJob, tar: Path, part: Part) -> None:
        if part.records:
            about = (part.records, job.source.dataset, job.options.payload, part.bytes, part.sha256)
            self.entries.append(shard_entry(tar, *about))
        self.split_values.update(part.split_values)
        self.patients_known |= part.patients_known
        self.held += part.held
        self.notes.update(part.notes)
        self.spellings.add(part.classes)
        self.patient_keys.update(part.patient_keys)
        if part.rejected and not self.first_reason:
            self.first_reason = part.rejected[0][1]
        for item, kind, _ in part.remarks:
            self.remarked[kind] = self.remarked.get(kind, NONE).plus(item)


def _gather(job: IngestJob) -> _Found:
    """Go through the parts once, and write rejected.csv and remarks.csv on the way."""
    found = _Found()
    remarked_before = sum(
        one["records"] for source in (job.base or {"sources": []})["sources"] for one in _remarked(source)
    )
    rejected_before = job.base["rejected"] if job.base else 0
    with (
        _table(job, _REJECTED, ("record", "reason", "dataset"), rejected_before) as write_rejected,
        _table(job, _REMARKS, ("record", "remark", "details", "dataset"), remarked_before) as write_remarks,
    ):
        for tar, part in job.parts():
            if part is None:
                raise InputError(f"{tar}: gone or damaged while it was ingested; run the same command again")
            write_rejected((item, reason, job.source.dataset) for item, reason in part.rejected)
            write_remarks((*remark, job.source.dataset) for remark in part.remarks)
            found.add(job, tar, part)
    return found


def _remarked(source: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Counts of an entry of the manifest's ``sources``; those of earlier versions have none."""
    counts: dict[str, dict[str, Any]] = source.get("remarked", {})
    return counts.values()


@contextmanager
def _table(
    job: IngestJob, name: str, columns: Sequence[str], rows_before: int
) -> Iterator[Callable[[Iterable[Sequence[str]]], None]]:
    """What writes rows into a table beside the shards, complete or as it was.

    The rows of the set that is appended to come first, without those of an --append that was killed.
    """
    path = job.out / name
    with whole_file(path) as partial, partial.open("x", encoding="utf8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        if rows_before and path.exists():
            with path.open(encoding="utf8", newline="") as old:
                table.writerows(islice(csv.reader(old), 1, 1 + rows_before))
        yield table.writerows


# -- columns ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Records:
    """What decides on copies and splits, of all N records of the set, those of the old one first."""

    key_KN: npt.NDArray[np.uint64]
    """See ``record_keys``."""
    patient_N: npt.NDArray[np.int64]
    id_N: npt.NDArray[np.uint64]
    """See ``record.id_hash``; 0 also for those of an index of an older version, which does not say it."""
    split_N: Splits
    """Of the old records as they stand, of the new ones as the options say."""

    @staticmethod
    def read(job: IngestJob, found: _Found) -> _Records:
        """Goes through the old index and the part files once."""
        each = []
        for _, _, old in job.old_tars():
            id_B = old.get("id_hash", np.zeros(len(old["patient"]), np.uint64))
            each.append((record_keys(old), old["patient"], id_B, old["split"]))
        for entry in found.entries:
            new, values = read_columns(job.out / entry["file"])
            each.append((record_keys(new), new["patient"], new["id_hash"], _split(new, values, job.options)))
        return _Records(*(np.concatenate(column, axis=-1) for column in zip(*each, strict=True)))


def _split(columns: Columns, values: list[str], options: IngestOptions) -> Splits:
    if options.split_by:
        return splits_by_value(values, columns[SPLIT_VALUE], options)
    return splits_by_hash(columns["patient"], options)


def _columns(job: IngestJob, found: _Found, split_N: Splits) -> Iterator[Columns]:
    """Of the index, those of the old one first."""
    first = 0
    if job.base is not None:
        old, first = map_index(job.out / job.base["index"]["file"], job.base["records"]), job.base["records"]
        for start in range(0, first, _CHUNK):
            yield {name: column[start : min(start + _CHUNK, first)] for name, column in old.items()}
    for entry in found.entries:
        columns, _ = read_columns(job.out / entry["file"])
        last = first + entry["records"]
        yield columns | {"split": split_N[first:last]}
        first = last


def _check_patients(job: IngestJob, found: _Found, records: _Records, split_N: Splits) -> None:
    """Raises InputError where a patient stands in two splits."""
    if job.base is None and not job.options.split_by:
        return  # a hash puts no patient into two
    if torn := torn_patients(records.patient_N, split_N):
        codes, both = torn
        how = f" by {job.options.split_by}" if job.options.split_by else ""
        hint = "; append with the split options of the earlier records" if job.base else ""
        raise InputError(
            f"{job.out}: patient {_name_of(job, found, int(codes[0]))!r} stands in two splits ({both}){how}; "
            f"a patient may be in one{hint}"
        )


# -- copies ----------------------------------------------------------------------------------------------------------


def _copies(job: IngestJob, found: _Found, records: _Records) -> Copies:
    """Of all records that are not flat."""
    copies = Copies.joined(records.key_KN)
    return copies.only(_not_flat(job, found, copies.one_of_each))


def _splits(job: IngestJob, records: _Records, copies: Copies) -> Splits:
    """(N,) with exact copies in one split, where a hash decides; where values name the splits, they are kept."""
    if job.options.split_by:
        return records.split_N
    linking = copies.only(copies.differing(records.patient_N[copies.number_R]))
    patient_R, known_R = records.patient_N[linking.number_R], records.id_N[linking.number_R] > 0
    old = job.base["records"] if job.base else 0
    stands_N = np.isin(records.patient_N[:old], patient_R)
    kept = dict(zip(records.patient_N[:old][stands_N].tolist(), records.split_N[:old][stands_N].tolist(), strict=True))
    united = United.by_copies(linking, patient_R, known_R, job.options, kept)
    new_B = united.applied(records.patient_N[old:], records.split_N[old:])
    return np.concatenate([records.split_N[:old], new_B])


def _not_flat(job: IngestJob, found: _Found, number_G: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Of some records, whether any lead changes. Of one that cannot be read nobody knows: it counts as a copy."""
    result_G, first = np.ones(len(number_G), bool), 0
    for tar, payload, columns in _tars(job, found) if len(number_G) else ():
        last = first + len(columns["samples"])
        for g in np.flatnonzero((number_G >= first) & (number_G < last)).tolist():
            at = int(number_G[g]) - first
            with suppress(InputError, MachineError):
                signal_LT = read_signal(tar, payload, int(columns["offset"][at]), int(columns["length"][at]))
                result_G[g] = not is_flat(signal_LT)
        first = last
    return result_G


def _tars(job: IngestJob, found: _Found) -> Iterator[tuple[Path, Payload, Columns]]:
    """Each tar with its payload and its columns, but for the split; those of the old set first."""
    yield from job.old_tars()
    for entry in found.entries:
        yield job.out / entry["file"], entry["payload"], read_columns(job.out / entry["file"])[0]


def _shared_ids(job: IngestJob, records: _Records) -> dict[str, int]:
    """Other data set of the old set -> how many patient ids of the new records it has too."""
    if job.base is None:
        return {}
    ids_of: dict[str, list[npt.NDArray[np.uint64]]] = {}
    first = 0
    for shard in job.base["shards"]:
        ids_of.setdefault(shard["dataset"], []).append(records.id_N[first : first + shard["records"]])
        first += shard["records"]
    ids_of.pop(job.source.dataset, None)
    new_ids = np.setdiff1d(records.id_N[first:], [0])
    shared = {dataset: len(np.intersect1d(np.concatenate(ids), new_ids)) for dataset, ids in sorted(ids_of.items())}
    return {dataset: count for dataset, count in shared.items() if count}


def _name_of(job: IngestJob, found: _Found, code: int) -> str:
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
