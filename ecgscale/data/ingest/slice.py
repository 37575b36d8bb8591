"""One slice of a source -> one tar and, last, the part file that says so.

The part file (``shard-….part.safetensors``) is complete or absent. It holds the tar's index columns and what else the
end of the ingest needs, so that nobody has to keep it in memory or to look into the tar again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ecgscale.data.cells import NOBODY
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.splits import split_value, without_value
from ecgscale.data.payload import Payload
from ecgscale.data.schema import parse_json
from ecgscale.data.shards import COLUMNS, Columns, columns_sha256, index_row, read_signal, write_tar
from ecgscale.data.spellings import Spellings
from ecgscale.errors import InputError, naming_file
from ecgscale.files import whole_file
from ecgscale.record import Record, Remark, patient_code

if TYPE_CHECKING:
    from ecgscale.data.sources import Source

_DIGEST = "sha256"  # key of a part file's checksum; without one (of an older version) the slice is converted again
SPLIT_VALUE = "split_value"  # column of a part file: place of the record's value in Part.split_values
OTHER_LABELS = (
    "a record that is there already and has other labels or metadata now: the old ones stay; for the new ones ingest "
    "all anew into a new folder"
)  # a note of records that are left out


class Held(NamedTuple):
    """Where a record of that name lies in the set that is added to."""

    tar: Path
    payload: Payload
    offset: int
    length: int
    leads: int
    """Bits, as in the index."""
    scale: npt.NDArray[np.float32]
    """As in the index."""
    patient: int
    """Code, as in the index."""
    json_offset: int
    json_length: int

    def equals(self, record: Record) -> bool:
        """Whether that record has these samples, leads and scales."""
        row = index_row(record.leads, record.scale_L, record.n_samples)
        if row["leads"] != self.leads or not np.array_equal(row["scale"], self.scale):
            return False
        return np.array_equal(read_signal(self.tar, self.payload, self.offset, self.length), record.signal_LT)

    def says_the_same(self, record: Record) -> bool:
        """Whether it has the labels and metadata of that record."""
        with naming_file(self.tar, "cannot read"), self.tar.open("rb") as file:
            file.seek(self.json_offset)
            fields = parse_json(file.read(self.json_length))
        return (fields["labels"], fields["metadata"]) == (record.labels, record.metadata)


@dataclass(frozen=True)
class Slice:
    """Some consecutive items of a source, to be written as one tar."""

    source: Source
    items: Sequence[str]
    tar: Path
    options: IngestOptions
    identity: str
    """Of the ingest: a part file of another one is no part of this."""
    held: Mapping[str, Held]
    """Items whose names the data set has already in the set that is added to."""


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
    remarks: list[tuple[str, str, str]]
    """(record, kind, details) of what is odd about records; a record has each kind once."""
    held: int = 0
    """Records that are in the set already, under the same name and with the same samples."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to labels and ids (see ``Cells``) -> how often."""
    inputs: str = ""
    """What the records were made from: see ``inputs_sha256``."""
    stamps: str = ""
    """See ``stamps_sha256``."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Of each label: see ``Spellings``."""
    patient_keys: dict[str, int] = field(default_factory=dict)
    """Column or key that names the patient -> of how many records."""


_PART_FIELDS = {one.name for one in fields(Part)}
_PART_COLUMNS = COLUMNS.keys() - {"split"} | {SPLIT_VALUE}


def part_file(tar: Path) -> Path:
    """Where the part file of a tar stands."""
    return tar.with_suffix(".part.safetensors")


def read_part(tar: Path, identity: str) -> Part | None:
    """The part file of a tar; None where the slice has to be converted, for the first time or again."""
    try:
        part, _ = _read(tar)
        if part.identity != identity or (part.records and tar.stat().st_size != part.bytes):
            return None
    except (FileNotFoundError, _DamagedError):
        return None
    return part


def read_columns(tar: Path) -> tuple[Columns, list[str]]:
    """The index columns of a finished tar, with SPLIT_VALUE in place of the split, and Part.split_values.

    Raises InputError where the part file was damaged since it was counted as finished.
    """
    try:
        part, columns = _read(tar)
    except (FileNotFoundError, _DamagedError) as error:
        raise InputError(f"{tar}: gone or damaged while it was ingested; run the same command again") from error
    return columns, part.split_values


class _DamagedError(Exception):
    """A part file that is not as it was written."""


def _read(tar: Path) -> tuple[Part, Columns]:
    """A part file, held against its own checksum. Raises _DamagedError and FileNotFoundError."""
    path = part_file(tar)
    try:
        with safe_open(path, "np") as file:
            said, digest = ((file.metadata() or {}).get(key, "") for key in ("part", _DIGEST))
            columns: Columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise _DamagedError from error
    if digest != columns_sha256(columns, said):
        raise _DamagedError
    told = json.loads(said)
    if told.keys() != _PART_FIELDS or columns.keys() != _PART_COLUMNS:
        raise _DamagedError  # another version's
    return Part(**told), columns


@runtime_checkable
class Fingerprinted(Protocol):
    """A source of files, which may change while they are ingested."""

    def fingerprint(self, item: str) -> bytes:
        """What a record is made from, or a hash of it: its header, what tables say of it, its samples.

        The same wherever the files are copied to. Empty where they cannot be read: ``read`` says why.
        """


@runtime_checkable
class Stamped(Fingerprinted, Protocol):
    """Of which it is quickly told that nothing has changed."""

    def stamp(self, item: str) -> bytes:
        """Changes with the fingerprint, and where files were copied, too: size and time stand for the samples."""


def inputs_sha256(source: Source, items: Sequence[str]) -> str:
    """Changes with the files of these records, all of which are read."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(_input_digest(source, item))
    return digest.hexdigest()


def _input_digest(source: Source, item: str) -> bytes:
    """Of nothing where a source is not made of files."""
    return hashlib.sha256(source.fingerprint(item) if isinstance(source, Fingerprinted) else b"").digest()


def stamps_sha256(source: Source, items: Sequence[str]) -> str:
    """Where it is the same, so is ``inputs_sha256``; no samples are read for it."""
    if not isinstance(source, Stamped):
        return inputs_sha256(source, items)
    digest = hashlib.sha256()
    for item in items:
        digest.update(hashlib.sha256(source.stamp(item)).digest())
    return digest.hexdigest()


@dataclass
class _Tally:
    """What a slice says of its records, those that it writes and those that it does not."""

    rejected: list[tuple[str, str]] = field(default_factory=list)
    place_of_value: dict[str, int] = field(default_factory=dict)  # of --split-by
    places: list[int] = field(default_factory=list)
    patients_known: bool = False
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    held: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    patient_keys: Counter[str] = field(default_factory=Counter)
    spellings: Spellings = field(default_factory=Spellings)

    def add(self, item: str, record: Record, split_by: str, value: str) -> None:
        if split_by and not value:
            self.notes[without_value(split_by)] += 1
        self.places.append(self.place_of_value.setdefault(value, len(self.place_of_value)))
        self.remarks.extend((item, *remark) for remark in _by_kind(record.remarks))
        self.notes.update(record.notes)
        self.spellings.add(record.labels)
        if record.patient is None:
            self.notes[NOBODY] += 1
            return
        self.patients_known = True
        if record.patient_key:
            self.patient_keys[record.patient_key] += 1

    def is_held(self, item: str, record: Record, dataset: str, held: Mapping[str, Held]) -> bool:
        """Whether the data set that is appended to has the record. Raises InputError where it has another so named."""
        if (known := held.get(item)) is None:
            return False
        has = f"{dataset!r} has a record {item!r} already"
        if known.patient != patient_code(dataset, record.patient, record.name):
            raise InputError(f"{has}, of another patient; ingest all anew")
        if not known.equals(record):
            raise InputError(
                f"{has}, with other samples; put this one into a folder of another name, or ingest all anew"
            )
        self.held += 1
        if not known.says_the_same(record):
            self.notes[OTHER_LABELS] += 1
        return True


def convert(task: Slice) -> Part:
    """Write the tar and the part file; raises InputError where the disk does not take them."""
    stamps, inputs = stamps_sha256(task.source, task.items), hashlib.sha256()  # before records are read
    tally, dataset, split_by = _Tally(), task.source.dataset, task.options.split_by

    def records() -> Iterator[tuple[str, Record]]:
        for item in task.items:
            inputs.update(_input_digest(task.source, item))  # then its files are in memory
            try:
                check_utf8(item)
                record = task.source.read(item).resampled(task.options.rate_hz)
                if not record.signal_LT.size:
                    raise InputError("holds no samples")
                if tally.is_held(item, record, dataset, task.held):
                    continue
                value = split_value((record.labels, record.metadata), split_by) if split_by else ""
            except InputError as error:
                tally.rejected.append((item, str(error)))
                continue
            tally.add(item, record, split_by, value)
            yield f"{task.tar.stem}-{len(tally.places) - 1:06d}", record
            del record  # it may be as large as the next one

    digest = hashlib.sha256()
    columns = write_tar(task.tar, dataset, records(), task.options.payload, digest)
    size = task.tar.stat().st_size if tally.places else 0
    if not tally.places:
        task.tar.unlink()
    part = Part(
        task.identity,
        len(tally.places),
        size,
        digest.hexdigest(),
        tally.rejected,
        [*tally.place_of_value],
        tally.patients_known,
        tally.remarks,
        tally.held,
        dict(tally.notes),
        inputs.hexdigest(),
        stamps,
        tally.spellings.kept(),
        dict(tally.patient_keys),
    )
    text = json.dumps(asdict(part))  # ASCII: a file name may be no UTF-8
    columns |= {SPLIT_VALUE: np.array(tally.places, np.uint32)}
    with whole_file(part_file(task.tar), sweep=False) as partial:
        partial.write_bytes(save(columns, {"part": text, _DIGEST: columns_sha256(columns, text)}))
    return part


def _by_kind(remarks: Sequence[Remark]) -> Iterator[Remark]:
    """One remark of each kind, with the details of all."""
    details: dict[str, list[str]] = {}
    for remark in remarks:
        details.setdefault(remark.kind, []).append(remark.detail)
    for kind, several in details.items():
        yield Remark(kind, "; ".join(filter(None, several)))


def check_utf8(name: str) -> None:
    """Raises InputError for a file name in an old encoding."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the name {name!r} is not UTF-8; give another") from error
