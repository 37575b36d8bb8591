"""One slice of a source -> one tar and, last, the part file that says so.

The part file (``shard-….part.safetensors``) is complete or absent. It holds the tar's index columns and what else the
end of the ingest needs, so that nobody has to keep it in memory or to look into the tar again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ecgscale.data.cells import NOBODY
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.splits import split_value
from ecgscale.data.shards import Columns, write_tar, write_whole
from ecgscale.errors import InputError
from ecgscale.record import Record

if TYPE_CHECKING:
    from ecgscale.data.sources import Source

SPLIT_VALUE = "split_value"  # column of a part file: place of the record's value in Part.split_values


@dataclass(frozen=True)
class Slice:
    """Some consecutive items of a source, to be written as one tar."""

    source: Source
    items: Sequence[str]
    tar: Path
    options: IngestOptions
    identity: str
    """Of the ingest: a part file of another one is no part of this."""


@dataclass(frozen=True)
class Part:
    """What is known of a finished slice, without its columns."""

    identity: str
    records: int
    bytes: int
    """0 where no record could be read: there is no tar then."""
    sha256: str
    rejected: list[tuple[str, str]]
    split_values: list[str]
    """The different ones."""
    patients_known: bool
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to labels and ids (see ``Cells``) -> how often."""


def part_file(tar: Path) -> Path:
    """Where the part file of a tar stands."""
    return tar.with_suffix(".part.safetensors")


def read_part(tar: Path, identity: str) -> Part | None:
    """The part file of a tar; None where the slice has to be converted, for the first time or again."""
    try:
        with safe_open(part_file(tar), "np") as file:
            said = json.loads(file.metadata()["part"])
        if said["identity"] != identity or (said["records"] and tar.stat().st_size != said["bytes"]):
            return None
    except (FileNotFoundError, SafetensorError):
        return None
    return Part(**said)


def read_columns(tar: Path) -> tuple[Columns, list[str]]:
    """The index columns of a finished tar, with SPLIT_VALUE in place of the split, and Part.split_values."""
    with safe_open(part_file(tar), "np") as file:
        values: list[str] = json.loads(file.metadata()["part"])["split_values"]
        return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118, it is no dict


def convert(task: Slice) -> Part:
    """Write the tar and the part file; raises InputError where the disk does not take them."""
    rejected: list[tuple[str, str]] = []
    place_of_value: dict[str, int] = {}
    places: list[int] = []
    patients_known = False
    notes = Counter[str]()

    def records() -> Iterator[tuple[str, Record]]:
        nonlocal patients_known
        for item in task.items:
            try:
                check_utf8(item)
                record = task.source.read(item).resampled(task.options.rate_hz)
                if not record.signal_LT.size:
                    raise InputError("holds no samples")
            except InputError as error:
                rejected.append((item, str(error)))
                continue
            value = split_value(record.labels, record.metadata, task.options.split_by) if task.options.split_by else ""
            places.append(place_of_value.setdefault(value, len(place_of_value)))
            patients_known |= record.patient is not None
            notes.update(record.notes)
            if record.patient is None:
                notes[NOBODY] += 1
            yield f"{task.tar.stem}-{len(places) - 1:06d}", record

    digest = hashlib.sha256()
    columns = write_tar(task.tar, task.source.dataset, records(), task.options.payload, digest)
    size = task.tar.stat().st_size if places else 0
    if not places:
        task.tar.unlink()
    values = list(place_of_value)
    part = Part(task.identity, len(places), size, digest.hexdigest(), rejected, values, patients_known, dict(notes))
    said = {"part": json.dumps(asdict(part))}  # ASCII: a file name may be no UTF-8
    write_whole(part_file(task.tar), save(columns | {SPLIT_VALUE: np.array(places, np.uint32)}, said))
    return part


def check_utf8(name: str) -> None:
    """Raises InputError for a file name in an old encoding."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the name {name!r} is not UTF-8; give another") from error
