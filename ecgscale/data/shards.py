"""Records <-> tar shards: the format is written and read in this one file.

A shard is a standard WebDataset tar: per record ``<key>.json`` (leads, rate, scale, patient, labels, checksum) and
``<key>.npy`` (int16 counts, (leads, samples)). Beside the tars stand one ``manifest.json`` and, per shard, a columnar
index, so that the hot path walks no tar header and parses no JSON. Members are read by offset, never extracted, and
nothing is ever unpickled. A folder without a manifest is no data set: the manifest is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from ecgscale.errors import InputError
from ecgscale.record import LEADS, Counts, Record, patient_code

FORMAT = "ecgscale-shards/1"
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")

Columns = dict[str, npt.NDArray[Any]]


# -- writing ---------------------------------------------------------------------------------------------------------


def write_tar(path: Path, dataset: str, records: Iterable[tuple[str, Record]]) -> Columns:
    """Write (key, record) pairs as one tar, complete or not at all; returns the index columns, all but the split.

    Equal records give equal bytes. Raises InputError where the disk does not take the file.
    """
    from webdataset.writer import TarWriter  # imports slowly, and only writers need it

    rows: list[dict[str, Any]] = []
    partial = path.with_suffix(".tar.partial")
    try:
        # The writer must be closed even on a full disk: an open one complains when it is collected.
        with (
            partial.open("wb") as file,
            TarWriter(file, mtime=0, user="ecgscale", group="ecgscale", mode=0o444, encoder=False) as writer,
        ):
            for key, record in records:
                payload = _npy_bytes(record.signal_LT)
                row = _index_row(record, dataset, payload)
                meta = _metadata_json(record, dataset, row["checksum"])
                row["json_checksum"] = xxhash.xxh3_64_intdigest(meta)
                writer.write({"__key__": key, "json": meta, "npy": payload})
                rows.append(row)
        columns = {name: np.array([row[name] for row in rows], dtype) for name, dtype in _ROW_DTYPES.items()}
        columns |= _member_offsets(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write the shard: {error.strerror or error}") from error
    return columns


_ROW_DTYPES: dict[str, Any] = {
    "samples": np.uint32,
    "leads": np.uint16,  # bit i: the lead LEADS[i] is there
    "scale": np.float32,  # (records, 12) mV per count, 0 for an absent lead
    "rate_hz": np.float32,
    "patient": np.int64,
    "checksum": np.uint64,  # xxh3-64 of the payload member
    "json_checksum": np.uint64,  # xxh3-64 of the JSON member
}


def _index_row(record: Record, dataset: str, payload: bytes) -> dict[str, Any]:
    at = [LEADS.index(lead) for lead in record.leads]
    scale_L = np.zeros(len(LEADS), np.float32)
    scale_L[at] = record.scale_L
    return {
        "samples": record.n_samples,
        "leads": sum(1 << i for i in at),
        "scale": scale_L,
        "rate_hz": record.rate_hz,
        "patient": patient_code(dataset, record.patient, record.name),
        "checksum": xxhash.xxh3_64_intdigest(payload),
    }


def _npy_bytes(signal_LT: Counts) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(signal_LT), allow_pickle=False)
    return buffer.getvalue()


def _metadata_json(record: Record, dataset: str, checksum: int) -> bytes:
    fields = {
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
    return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()


def _member_offsets(path: Path) -> Columns:
    """Where each member's bytes stand, read back from the finished tar."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    json_members, npy_members = members[0::2], members[1::2]
    assert all(
        a.name.removesuffix("json") == b.name.removesuffix("npy")
        for a, b in zip(json_members, npy_members, strict=True)
    )
    return {
        "offset": np.array([m.offset_data for m in npy_members], np.uint64),
        "length": np.array([m.size for m in npy_members], np.uint32),
        "json_offset": np.array([m.offset_data for m in json_members], np.uint64),
        "json_length": np.array([m.size for m in json_members], np.uint32),
    }


def write_index(tar: Path, columns: Columns) -> dict[str, Any]:
    """Write the index beside its tar; returns the shard's entry for the manifest."""
    index = tar.with_suffix(".index.safetensors")
    index_bytes = save_safetensors(dict(sorted(columns.items())))
    write_whole(index, index_bytes)
    return {
        "file": tar.name,
        "records": len(columns["samples"]),
        "bytes": tar.stat().st_size,
        "sha256": file_sha256(tar),
        "index": index.name,
        "index_sha256": hashlib.sha256(index_bytes).hexdigest(),
    }


def write_manifest(
    folder: Path,
    dataset: str,
    rate_hz: float,
    shards: list[dict[str, Any]],
    rejected: int,
    options: dict[str, Any],
) -> None:
    """Write the manifest, which makes the folder a data set."""
    manifest = {
        "format": FORMAT,
        "dataset": dataset,
        "rate_hz": rate_hz,
        "records": sum(shard["records"] for shard in shards),
        "rejected": rejected,
        "options": options,
        "shards": shards,
    }
    text = json.dumps(manifest | {"sha256": _own_sha256(manifest)}, indent=1, sort_keys=True, ensure_ascii=False)
    write_whole(folder / MANIFEST, text.encode())


def _own_sha256(manifest: dict[str, Any]) -> str:
    """Over everything that a manifest says but this number: a flipped bit in its rate or names shows."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent; raises InputError where the disk does not take it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------


class Shard:
    """One tar, mapped into memory, and its index columns."""

    def __init__(self, tar: Path, columns: Columns, dataset: str) -> None:
        self.tar = tar
        self.columns = columns
        self.dataset = dataset
        self._bytes: npt.NDArray[np.uint8] | None = None
        self._verified = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self.columns["samples"])

    def __getstate__(self) -> dict[str, Any]:  # a memory map would be copied whole into another process
        return self.__dict__ | {"_bytes": None}

    def lead_positions(self, record: int) -> list[int]:
        """Which of the twelve leads the payload's rows are."""
        bits = int(self.columns["leads"][record])
        return [i for i in range(len(LEADS)) if bits >> i & 1]

    def signal(self, record: int) -> Counts:
        """(L, T) int16 view of the file, L the leads that are there. Verified when first touched."""
        payload = self._member("offset", "length", record)
        if not self._verified[record]:
            if xxhash.xxh3_64_intdigest(payload.data) != int(self.columns["checksum"][record]):
                raise InputError(
                    f"{self.tar}: record {record} is damaged: its checksum differs from the index; ingest it again"
                )
            self._verified[record] = True
        samples, leads = int(self.columns["samples"][record]), int(self.columns["leads"][record]).bit_count()
        return payload[payload.size - 2 * leads * samples :].view(np.int16).reshape(leads, samples)

    def metadata(self, record: int) -> dict[str, Any]:
        """What the record's JSON says. Verified."""
        content = self._member("json_offset", "json_length", record).tobytes()
        if xxhash.xxh3_64_intdigest(content) != int(self.columns["json_checksum"][record]):
            raise InputError(
                f"{self.tar}: the JSON of record {record} is damaged: its checksum differs from the index; "
                "ingest it again"
            )
        fields = json.loads(content)
        assert isinstance(fields, dict)
        return fields

    def record(self, record: int) -> Record:
        """The whole record, as it was before it was written."""
        fields = self.metadata(record)
        return Record(
            name=fields["name"],
            signal_LT=self.signal(record),
            scale_L=np.array(fields["scale_mv"], np.float32),
            rate_hz=fields["rate_hz"],
            leads=tuple(fields["leads"]),
            patient=fields["patient"],
            labels=fields["labels"],
            metadata=fields["metadata"],
            invalid_samples=fields["invalid_samples"],
        )

    def _member(self, offset: str, length: str, record: int) -> npt.NDArray[np.uint8]:
        if self._bytes is None:
            self._bytes = np.memmap(self.tar, np.uint8, "r")
        start = int(self.columns[offset][record])
        return self._bytes[start : start + int(self.columns[length][record])]


@dataclass(frozen=True)
class ShardSet:
    """The shards of one or several data sets, in the order of their manifests, all at one sample rate."""

    shards: tuple[Shard, ...]
    rate_hz: float
    identity: str  # sha256 over the manifests: a run continues only on the data it began with

    @staticmethod
    def open(folders: str | Path | Sequence[str | Path]) -> ShardSet:
        """Open data set folders; raises InputError for missing, incomplete, damaged or mixed-rate ones."""
        paths = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        if not paths:
            raise InputError("data.shards names no folder; give the output folder of `ecgscale ingest`")
        if len({path.resolve() for path in paths}) < len(paths):
            raise InputError(f"data.shards names a folder twice: {', '.join(map(str, paths))}")
        manifests = [read_manifest(path) for path in paths]
        rates = {manifest["rate_hz"] for manifest in manifests}
        if len(rates) > 1:
            raise InputError(
                f"data sets of different rates {sorted(rates)} Hz cannot be mixed; ingest them at one --rate-hz"
            )
        shards = tuple(
            _open_shard(path, entry, manifest["dataset"])
            for path, manifest in zip(paths, manifests, strict=True)
            for entry in manifest["shards"]
        )
        check_patient_disjoint(shards)
        digests = "".join(file_sha256(path / MANIFEST) for path in paths)
        return ShardSet(shards, rates.pop(), hashlib.sha256(digests.encode()).hexdigest())

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One index column over all records."""
        return np.concatenate([shard.columns[name] for shard in self.shards])

    def locate(self, record: int) -> tuple[Shard, int]:
        """The shard that holds record number ``record`` of the whole set, and its number within that shard."""
        for shard in self.shards:
            if record < len(shard):
                return shard, record
            record -= len(shard)
        raise IndexError(record)

    def select(self, split: str, min_s: float = 0.0) -> list[npt.NDArray[np.int64]]:
        """Per shard, the numbers of the records of a split that are at least ``min_s`` seconds long."""
        code = SPLITS.index(split)
        return [
            np.flatnonzero((s.columns["split"] == code) & (s.columns["samples"] / s.columns["rate_hz"] >= min_s))
            for s in self.shards
        ]


def check_patient_disjoint(shards: Sequence[Shard]) -> None:
    """Raises InputError where a patient has recordings in two splits, as one data set ingested in two ways gives."""
    if not shards:
        return
    patient, split = (np.concatenate([shard.columns[name] for shard in shards]) for name in ("patient", "split"))
    pairs = np.unique(np.stack([patient, split.astype(np.int64)]), axis=1)
    patients, counts = np.unique(pairs[0], return_counts=True)
    torn = patients[counts > 1]
    if torn.size:
        raise InputError(f"{torn.size} patients stand in two splits (first: code {torn[0]}); a patient may be in one")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a data set folder; raises InputError where there is none or it is not one of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: no {MANIFEST} there; give the folder that a finished `ecgscale ingest` has written"
        )
    try:
        manifest = json.loads(path.read_bytes())
        known = manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a manifest of ecgscale shards ({error}); ingest the data again") from error
    if known != FORMAT:
        raise InputError(f"{path}: format {known!r} is not {FORMAT!r}; ingest the data again with this version")
    if manifest.get("sha256") != _own_sha256(manifest):
        raise InputError(f"{path}: damaged, its content differs from its own sha256; copy or ingest the data again")
    assert isinstance(manifest, dict)
    return manifest


def _open_shard(folder: Path, entry: dict[str, Any], dataset: str) -> Shard:
    tar, index = folder / entry["file"], folder / entry["index"]
    for path in (tar, index):
        if path.parent != folder or not path.is_file():
            raise InputError(f"{path}: named by {folder / MANIFEST} but no file of that folder")
    if tar.stat().st_size != entry["bytes"]:
        raise InputError(
            f"{tar}: {tar.stat().st_size} bytes, the manifest says {entry['bytes']}; copy or ingest it again"
        )
    content = index.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        raise InputError(f"{index}: damaged, its sha256 differs from the manifest; copy or ingest it again")
    return Shard(tar, load_safetensors(content), dataset)


def verify_shard(shard: Shard, entry: dict[str, Any]) -> None:
    """Raises InputError unless tar, index and manifest agree in every byte and count."""
    if file_sha256(shard.tar) != entry["sha256"]:
        culprit = _first_damaged(shard)
        raise InputError(
            f"{shard.tar}: damaged, its sha256 differs from the manifest{culprit}; copy or ingest it again"
        )
    if len(shard) != entry["records"]:
        raise InputError(f"{shard.tar}: {len(shard)} records in the index, the manifest says {entry['records']}")
    for record in range(len(shard)):
        shard.signal(record)
        shard.metadata(record)


def _first_damaged(shard: Shard) -> str:
    for record in range(len(shard)):
        try:
            shard.signal(record)
            shard.metadata(record)
        except InputError:
            return f" (first damaged record: {record})"
    return " (the records are whole: the damage is in a tar header)"
