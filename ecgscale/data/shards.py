"""Records -> tar shards, their index and their manifest: the format is written, and its two tables read, in this file.

A shard is a standard WebDataset tar: per record ``<key>.json`` (leads, rate, scale, patient, labels, checksum) and the
int16 counts (leads, samples) as ``<key>.pco`` or ``<key>.npy``, see ``payload``. Beside the tars stand

- ``manifest.json``: per shard its file, records, bytes and sha256; the index; what the set was made from; and a sha256
  over itself. It is written last and replaced whole: a folder without it is no data set. Where others wrote the tars,
  ``foreign`` holds the rules by which their JSON is read, see ``foreign``.
- ``index-….safetensors``: columns over all records of all shards, in their order, to be mapped into memory, so that the
  hot path walks no tar header and parses no JSON, and ten million recordings cost no memory of their own.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from ecgscale.data.lead_keys import lead_keys
from ecgscale.data.payload import Payload, decode_member, encode
from ecgscale.data.schema import INDEX_HEADER_LIMIT_BYTES, check_manifest, data_offsets
from ecgscale.errors import InputError, naming_file
from ecgscale.files import file_sha256, free_name, parse_json, put_in_place, seal_holds, sealed, whole_file, write_whole
from ecgscale.lead_names import LEADS
from ecgscale.record import Counts, Record, id_hash, patient_code

FORMAT = "ecgscale-shards/2"
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")

Columns = dict[str, npt.NDArray[Any]]

# (dtype, what follows the record axis) of each column
COLUMNS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "samples": (np.uint32, ()),
    "leads": (np.uint16, ()),  # bit i: the lead LEADS[i] is there
    "scale": (np.float32, (len(LEADS),)),  # mV per count, 0 for an absent lead
    "patient": (np.int64, ()),
    "id_hash": (np.uint64, ()),  # of the patient's id alone, see ``record.id_hash``
    "split": (np.uint8, ()),  # number in SPLITS
    "checksum": (np.uint64, ()),  # xxh3-64 of the payload member, or of its header where blocks have their own
    "lead_keys": (np.uint64, (2,)),  # what copies are known by in whatever payload, see ``lead_keys``
    "json_checksum": (np.uint64, ()),  # xxh3-64 of the JSON member
    "offset": (np.uint64, ()),  # of the payload in the tar
    "length": (np.uint32, ()),
    "json_offset": (np.uint64, ()),
    "json_length": (np.uint32, ()),
}
LATER_COLUMNS = frozenset(("id_hash", "lead_keys"))  # which the indexes of earlier versions lack


# -- tars ------------------------------------------------------------------------------------------------------------


def write_tar(
    path: Path,
    dataset: str,
    records: Iterable[tuple[str, Record]],
    payload: Payload,
    digest: hashlib._Hash | None = None,
) -> Columns:
    """Write (key, record) pairs as one tar, complete or not at all; returns the index columns, all but the split.

    Equal records give equal bytes; ``digest`` is fed with them. Raises InputError or MachineError that names the file.
    """
    rows: list[dict[str, Any]] = []
    with whole_file(path, sweep=False) as partial, partial.open("xb") as file:
        tar = _TarWriter(file, digest)
        for key, record in records:
            content, checksum = encode(record.signal_LT, payload)
            meta = _metadata_json(record, dataset, xxhash.xxh3_64_intdigest(content))
            row = index_row(record.leads, record.scale_L, record.n_samples)
            row |= person_row(dataset, record.patient, record.name)
            row |= {"lead_keys": lead_keys(record.signal_LT, record.scale_L, record.leads)}
            row |= {"checksum": checksum, "json_checksum": xxhash.xxh3_64_intdigest(meta)}
            row |= {"json_offset": tar.add(f"{key}.json", meta), "json_length": len(meta)}
            row |= {"offset": tar.add(f"{key}.{payload}", content), "length": len(content)}
            rows.append(row)
            del record, content  # they may be as large as the next ones
        tar.finish()
    return as_columns(rows)


class _TarWriter:
    """What the format needs of ``tarfile``, which does not tell where a member's bytes are."""

    def __init__(self, file: BinaryIO, digest: hashlib._Hash | None) -> None:
        self._file, self._digest, self._size = file, digest, 0

    def add(self, name: str, content: bytes) -> int:
        """Returns the offset of the content."""
        about = tarfile.TarInfo(name)
        about.size, about.mode, about.uname, about.gname = len(content), 0o444, "ecgscale", "ecgscale"
        self._write(about.tobuf(tarfile.USTAR_FORMAT))
        offset = self._size
        self._write(content)
        self._write(bytes(-self._size % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._size += len(content)
        if self._digest is not None:
            self._digest.update(content)


def index_row(leads: Sequence[str], scale_L: npt.ArrayLike, samples: int) -> dict[str, Any]:
    """What the index says of a record's signal, but for where its members are and their checksums."""
    at = [LEADS.index(lead) for lead in leads]
    scale_of_all = np.zeros(len(LEADS), np.float32)
    scale_of_all[at] = scale_L
    return {"samples": samples, "leads": sum(1 << i for i in at), "scale": scale_of_all}


def person_row(dataset: str, patient: str | None, record_name: str) -> dict[str, Any]:
    """What the index says of whose a record is."""
    return {"patient": patient_code(dataset, patient, record_name), "id_hash": id_hash(patient)}


def as_columns(rows: Sequence[dict[str, Any]], names: Set[str] = COLUMNS.keys() - {"split"}) -> Columns:
    """Rows of records -> the columns of an index, by default all but the split."""
    return {
        name: np.array([row[name] for row in rows], dtype).reshape(len(rows), *shape)
        for name, (dtype, shape) in COLUMNS.items()
        if name in names
    }


def _metadata_json(record: Record, dataset: str, checksum: int) -> bytes:
    fields: dict[str, Any] = {
        "name": record.name,
        "dataset": dataset,
        "patient": record.patient,
        "leads": record.leads,
        "rate_hz": record.rate_hz,
        "scale_mv": [float(scale) for scale in record.scale_L],
        "samples": record.n_samples,
        "invalid_samples": record.invalid_samples,
        "labels": record.labels,
        "metadata": record.metadata,
        "payload_xxh3_64": f"{checksum:016x}",
    }
    if record.offset_mv:
        fields["offset_mv"] = {lead: mv for lead, mv in record.offset_mv.items() if lead in record.leads}
    return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()


def shard_entry(
    tar: Path, records: int, dataset: str, payload: Payload, size: int | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """What the manifest says of a finished shard; its size and sha256 are found out where they are not given."""
    return {
        "file": tar.name,
        "records": records,
        "bytes": tar.stat().st_size if size is None else size,
        "sha256": file_sha256(tar) if sha256 is None else sha256,
        "dataset": dataset,
        "payload": payload,
    }


def read_signal(tar: Path, payload: Payload, offset: int, length: int) -> Counts:
    """The samples (L, T) of a member of a local tar that this version has written."""
    with tar.open("rb") as file:
        file.seek(offset)
        content = file.read(length)
    try:
        return decode_member(content, payload)
    except InputError as error:
        raise InputError(f"{tar}: damaged at byte {offset}: {error}; ingest the data again") from error


# -- index -----------------------------------------------------------------------------------------------------------


def write_index(folder: Path, columns: Columns) -> dict[str, Any]:
    """Write the columns over all records of a set; returns what the manifest says of the file."""
    assert columns.keys() == COLUMNS.keys()
    return write_index_in_parts(folder, len(columns["samples"]), [columns])


def write_index_in_parts(folder: Path, records: int, parts: Iterable[Columns]) -> dict[str, Any]:
    """The same from columns over consecutive records, ``records`` in all, of which no two parts are held at once.

    Where the first part is of an older index, which lacks some of LATER_COLUMNS, all go without these.
    Its name holds its hash: while a set is appended to, the old manifest goes on naming the old index. Raises
    InputError or MachineError that names the folder where it cannot be written.
    """
    with naming_file(folder, "cannot write the index"):
        partial = free_name(folder / "index")
        try:
            _write_columns(partial, records, parts)
            sha256, size = file_sha256(partial), partial.stat().st_size
            index = folder / f"index-{sha256[:12]}.safetensors"
            put_in_place(partial, index)
        finally:
            partial.unlink(missing_ok=True)
    return {"file": index.name, "bytes": size, "sha256": sha256}


def _write_columns(path: Path, records: int, parts: Iterable[Columns]) -> None:
    remaining = iter(parts)
    first_part = next(remaining)
    names = [name for name in COLUMNS if name in first_part]
    header, place = _index_layout(records, names)
    with path.open("xb") as file:
        file.write(header)
        first = 0
        for part in chain([first_part], remaining):
            for name in names:
                dtype, shape = COLUMNS[name]
                file.seek(place[name] + first * _row_bytes(name))
                assert part[name].dtype == dtype
                assert part[name].shape[1:] == shape
                file.write(np.ascontiguousarray(part[name]).data)
            first += len(part["samples"])
    assert first == records


def _index_layout(records: int, names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where in it each column begins. Wide numbers first, so all are aligned."""
    header, place, end = {}, {}, 0
    for name in sorted(names, key=lambda name: (-np.dtype(COLUMNS[name][0]).itemsize, name)):
        dtype, shape = np.dtype(COLUMNS[name][0]), COLUMNS[name][1]
        place[name], end = end, end + records * _row_bytes(name)
        kind = f"{dtype.kind.upper()}{8 * dtype.itemsize}"
        header[name] = {"dtype": kind, "shape": [records, *shape], "data_offsets": [place[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in place.items()}


def _row_bytes(name: str) -> int:
    dtype, shape = COLUMNS[name]
    return np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))


def map_index(path: Path, records: int) -> Columns:
    """The columns of an index, mapped into memory. Raises InputError where they are not those of so many records."""
    with naming_file(path, "cannot read"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(min(length, INDEX_HEADER_LIMIT_BYTES))
        try:
            header = parse_json(head)
            mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)  # whose indexing is not np.memmap's, in Python
        except (InputError, ValueError) as error:  # ValueError: of an empty file
            raise InputError(f"{path}: not an index of ecgscale shards; ingest the data again") from error
    columns: Columns = {}
    for name, (dtype, shape) in COLUMNS.items():
        first, last = data_offsets(header, name)
        if name in LATER_COLUMNS and last < first:
            continue
        size = records * _row_bytes(name)
        if last - first != size or not 0 <= first <= last <= mapped.size - 8 - length:
            raise InputError(f"{path}: column {name} is not that of {records} records; ingest the data again")
        columns[name] = mapped[8 + length + first : 8 + length + last].view(dtype).reshape(records, *shape)
    return columns


# -- manifest --------------------------------------------------------------------------------------------------------


def write_manifest(
    folder: Path,
    rate_hz: float,
    index: dict[str, Any],
    shards: list[dict[str, Any]],
    sources: list[dict[str, Any]],
    foreign: dict[str, Any] | None = None,
) -> None:
    """Write the manifest, which makes the folder a data set.

    ``sources`` says, for each ingest that added to the set, its data set name, options, records and rejected records;
    ``foreign``, how the JSON of tars is to be read that others wrote.
    """
    manifest = {
        "format": FORMAT,
        "rate_hz": rate_hz,
        "records": sum(shard["records"] for shard in shards),
        "rejected": sum(source["rejected"] for source in sources),
        "sources": sources,
        "index": index,
        "shards": shards,
        "foreign": foreign,
    }
    text = json.dumps(sealed(manifest), indent=1, sort_keys=True, ensure_ascii=False)
    write_whole(folder / MANIFEST, text.encode())


def read_manifest(content: bytes, place: str) -> dict[str, Any]:
    """A manifest's fields; raises InputError that names ``place`` unless it is one of this version, and whole."""
    try:
        manifest = parse_json(content)
    except InputError as error:
        raise InputError(f"{place}: not a manifest of ecgscale shards ({error}); ingest the data again") from error
    if (known := manifest.get("format")) != FORMAT:
        raise InputError(
            f"{place}: format {str(known)[:40]!r} is not {FORMAT!r}; ingest the data again with this version"
        )
    if not seal_holds(manifest):
        raise InputError(f"{place}: damaged, its content differs from its own sha256; copy or ingest the data again")
    check_manifest(manifest, place)
    return manifest


# -- splits ----------------------------------------------------------------------------------------------------------


def check_patient_disjoint(patient: npt.NDArray[np.int64], split: npt.NDArray[np.uint8], what: str) -> None:
    """Raises InputError where a patient has recordings in two splits, as one data set ingested in two ways gives."""
    if torn := torn_patients(patient, split):
        codes, both = torn
        raise InputError(
            f"{what}: {codes.size} patients stand in two splits, {both} (first: code {codes[0]}); "
            "a patient may be in one"
        )


def torn_patients(
    patient: npt.NDArray[np.int64], split: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int64], str] | None:
    """Codes of patients with recordings in two splits, and the names of these two, the first that share a patient."""
    patients_of = [np.unique(patient[split == code]) for code in range(len(SPLITS))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        torn = np.intersect1d(patients_of[one], patients_of[other], assume_unique=True)
        if torn.size:
            return torn, f"{SPLITS[one]} and {SPLITS[other]}"
    return None


def columns_sha256(columns: Mapping[str, npt.NDArray[Any]], said: str = "") -> str:
    """Of columns with their names, types and shapes, behind what is said of them."""
    digest = hashlib.sha256(said.encode())
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.dtype.str} {column.shape} ".encode())
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
