"""One data set folder: its manifest, its shards, and its index, held against the sizes of the tars when it is opened.

Shape suffixes: R records, S shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecgscale.data.foreign import Rules
from ecgscale.data.payload import header_bytes
from ecgscale.data.remote import ShardCache, check_place, is_remote, join
from ecgscale.data.schema import JSON_LIMIT_BYTES, MANIFEST_LIMIT_BYTES
from ecgscale.data.shards import MANIFEST, SPLITS, Columns, map_index, read_manifest
from ecgscale.errors import InputError, naming_file
from ecgscale.files import file_sha256
from ecgscale.lead_names import LEADS

_CHUNK = 1 << 18  # records that are checked at once: ten million must not cost ten temporary arrays
_CHECKED = ("offset", "length", "json_offset", "json_length", "samples", "leads", "split")


@dataclass(frozen=True)
class Shard:
    """One tar."""

    place: str  # path or URL
    bytes: int
    sha256: str
    records: int
    payload: str
    dataset: str


@dataclass(frozen=True, eq=False)
class DataSet:
    """One folder: its shards, and its index columns, mapped into memory."""

    place: str
    manifest: dict[str, Any]
    columns: Columns
    shards: tuple[Shard, ...]
    identity: str  # sha256 of the manifest
    rules: Rules | None = None  # of tars that others wrote

    @staticmethod
    def open(place: str, cache: ShardCache) -> DataSet:
        check_place(place)
        where = join(place, MANIFEST) if is_remote(place) else str(Path(place) / MANIFEST)
        content = cache.read(where) if is_remote(place) else _read_local_manifest(Path(place))
        manifest = read_manifest(content, where)
        shards = tuple(_shard(place, entry) for entry in manifest["shards"])
        for shard in shards:
            if not is_remote(place):
                _check_local(Path(shard.place), shard.bytes, where)
        columns = _open_index(place, manifest["index"], sum(shard.records for shard in shards), where, cache)
        _check_columns(columns, shards)
        foreign = manifest.get("foreign")
        rules = None if foreign is None else Rules.from_manifest(foreign, where)
        if rules is not None and any(shard.payload != "npy" for shard in shards):
            raise InputError(f"{where}: its rules for foreign tars go with .npy arrays only; index the tars again")
        return DataSet(place, manifest, columns, shards, hashlib.sha256(content).hexdigest(), rules)

    def __len__(self) -> int:
        return len(self.columns["samples"])


def _read_local_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        hint = "its ingest was not finished; run it again" if any(folder.glob("shard-*")) else "see `ecgscale ingest`"
        raise InputError(f"{path}: no such file, so {folder} is no data set: {hint}")
    if path.stat().st_size > MANIFEST_LIMIT_BYTES:
        raise InputError(f"{path}: larger than 64 MiB, so no manifest of ecgscale shards; ingest the data again")
    with naming_file(path, "cannot read"):
        return path.read_bytes()


def _shard(place: str, entry: dict[str, Any]) -> Shard:
    file = join(place, entry["file"]) if is_remote(place) else str(Path(place) / entry["file"])
    return Shard(file, entry["bytes"], entry["sha256"], entry["records"], entry["payload"], entry["dataset"])


def _check_local(path: Path, size: int, manifest: str) -> None:
    if not path.is_file() or path.is_symlink():
        raise InputError(f"{path}: named by {manifest} but no file of that folder")
    if path.stat().st_size != size:
        raise InputError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}; copy or ingest it again")


def _open_index(place: str, entry: dict[str, Any], records: int, manifest: str, cache: ShardCache) -> Columns:
    if is_remote(place):
        held = cache.hold_verified(join(place, entry["file"]), entry["sha256"], entry["bytes"])
        columns = map_index(held.path, records)
        held.release()  # an evicted file stays mapped
        return columns
    path = Path(place) / entry["file"]
    _check_local(path, entry["bytes"], manifest)
    if file_sha256(path) != entry["sha256"]:
        raise InputError(f"{path}: damaged, its sha256 differs from the manifest; copy or ingest it again")
    return map_index(path, records)


def _check_columns(columns: Columns, shards: Sequence[Shard]) -> None:
    """Raises InputError where an index points outside of a tar or claims more samples than a member holds."""
    first = 0
    for group in _groups(shards):
        records_S = np.array([shard.records for shard in group])
        part = {name: columns[name][first : first + records_S.sum()].astype(np.int64) for name in _CHECKED}
        first += int(records_S.sum())
        size_R = np.repeat([shard.bytes for shard in group], records_S)
        numbers_R = 2 * np.bitwise_count(part["leads"]).astype(np.int64) * part["samples"]
        plain_R = np.repeat([shard.payload == "npy" for shard in group], records_S)
        least_R = np.where(plain_R, numbers_R, header_bytes(1))
        # No sums: a large offset would wrap around.
        wrong_R = (part["offset"] > size_R - part["length"]) | (part["json_offset"] > size_R - part["json_length"])
        wrong_R |= (part["offset"] < 0) | (part["json_offset"] < 0) | (least_R > part["length"])
        wrong_R |= (part["leads"] == 0) | (part["leads"] >> len(LEADS) != 0) | (part["samples"] == 0)
        wrong_R |= (part["split"] >= len(SPLITS)) | (part["json_length"] > JSON_LIMIT_BYTES)
        wrong_R |= plain_R & ((part["offset"] + part["length"]) % 2 == 1)  # int16 stand at even bytes
        if wrong_R.any():
            at = int(np.flatnonzero(wrong_R)[0])
            shard = group[int(np.searchsorted(np.cumsum(records_S), at, side="right"))]
            raise InputError(f"{shard.place}: its index points outside of it or is implausible; ingest the data again")


def _groups(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Consecutive shards of about _CHUNK records together."""
    group: list[Shard] = []
    for shard in shards:
        group.append(shard)
        if sum(shard.records for shard in group) >= _CHUNK:
            yield group
            group = []
    if group:
        yield group
