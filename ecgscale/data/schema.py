"""Whether manifest, index and JSON say what this version writes: their checksums do not tell who wrote them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ecgscale.data.payload import PAYLOADS
from ecgscale.errors import InputError
from ecgscale.files import without_repeats
from ecgscale.lead_names import LEADS

JSON_LIMIT_BYTES = 1 << 22  # of a record's JSON, which is parsed into twenty times as much memory
MANIFEST_LIMIT_BYTES = 1 << 26  # of a quarter of a million shards
INDEX_HEADER_LIMIT_BYTES = 1 << 16

Types = dict[str, type | tuple[type, ...]]

_MANIFEST: Types = {
    "rate_hz": (int, float),
    "records": int,
    "rejected": int,
    "sources": list,
    "index": dict,
    "shards": list,
}
_INDEX: Types = {"file": str, "bytes": int, "sha256": str}
_SHARD: Types = _INDEX | {"records": int, "dataset": str, "payload": str}
_METADATA: Types = {
    "name": str,
    "dataset": str,
    "patient": (str, type(None)),
    "leads": list,
    "rate_hz": (int, float),
    "scale_mv": list,
    "samples": int,
    "invalid_samples": int,
    "labels": dict,
    "metadata": dict,
    "payload_xxh3_64": str,
}


def check_manifest(manifest: dict[str, Any], place: str) -> None:
    """Raises InputError that names ``place`` unless all fields are there, plausible, and name files of its folder."""
    _check_fields(manifest, _MANIFEST, place)
    _check_fields(manifest["index"], _INDEX, place)
    for shard in manifest["shards"]:
        _check_fields(shard, _SHARD, place)
    for source in manifest["sources"]:
        _check_fields(source, {"dataset": str}, place)
        _check_remarked(source.get("remarked", {}), place)  # earlier versions had none
        _check_classes(source.get("classes", {}), place)  # likewise
        _check_counts(source.get("patient_keys", {}), place)
    names = [manifest["index"]["file"], *(shard["file"] for shard in manifest["shards"])]
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise InputError(f"{place}: names {name[:200]!r}; the files of a data set stand beside its manifest")
    if len(set(names)) < len(names) or any(shard["payload"] not in PAYLOADS for shard in manifest["shards"]):
        raise InputError(f"{place}: names a file twice, or a payload other than {' or '.join(PAYLOADS)}")
    if not 1 <= manifest["rate_hz"] <= 100_000:
        raise InputError(f"{place}: its rate is {manifest['rate_hz']:g} Hz; ingest the data again")
    if manifest["records"] != sum(shard["records"] for shard in manifest["shards"]):
        raise InputError(f"{place}: its shards do not hold the {manifest['records']} records; ingest the data again")


def _check_remarked(remarked: Any, place: str) -> None:
    if not isinstance(remarked, dict):
        raise InputError(f"{place}: remarked is {str(remarked)[:80]!r}; ingest the data again")
    for one in remarked.values():
        _check_fields(one, {"records": int, "first": list}, place)
        if not all(isinstance(name, str) for name in one["first"]):
            raise InputError(f"{place}: first is {str(one['first'])[:80]!r}; ingest the data again")


def _check_counts(counts: Any, place: str) -> None:
    if not isinstance(counts, dict):
        raise InputError(f"{place}: patient_keys is {str(counts)[:80]!r}; ingest the data again")
    _check_fields(counts, dict.fromkeys(counts, int), place)


def _check_classes(classes: Any, place: str) -> None:
    lists = [*classes.values()] if isinstance(classes, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise InputError(f"{place}: classes is {str(classes)[:80]!r}; ingest the data again")


def _check_fields(fields: Any, types: Types, place: str) -> None:
    for name, kind in types.items():
        value: Any = fields.get(name) if isinstance(fields, dict) else None
        right = isinstance(value, kind) and not isinstance(value, bool)
        if right and kind is int:
            right = (0 if name == "rejected" else 1) <= value < 1 << 60
        if not right or (name == "sha256" and not re.fullmatch("[0-9a-f]{64}", value)):
            raise InputError(f"{place}: {name} is {str(value)[:80]!r}; ingest the data again")


def data_offsets(header: Any, column: str) -> tuple[int, int]:
    """Where a safetensors header says that a column's bytes are; (0, -1) where it does not say it."""
    entry = header.get(column) if isinstance(header, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        return offsets[0], offsets[1]
    return 0, -1


def parse_json(content: bytes, unique: bool = False) -> dict[str, Any]:
    """A record's JSON. Raises InputError unless it is one object of plain text.

    ``unique``: also where a key stands twice. It takes longer; what is read again and again has been asked before.
    """
    try:
        fields = json.loads(content.decode(), object_pairs_hook=without_repeats if unique else None)
        if b"\\u" in content:  # half a UTF-16 pair could be neither hashed nor printed
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"it cannot be read as JSON ({str(error)[:80]}); write it again") from error
    if not isinstance(fields, dict):
        raise InputError("it is no JSON object; write keys such as rate_hz, leads, mv_per_count and patient")
    return fields


def read_metadata(content: bytes) -> dict[str, Any]:
    """The JSON of a shard of our own. Raises InputError unless everything is there and of its type."""
    fields = parse_json(content)
    for name, kind in _METADATA.items():
        if not isinstance(fields.get(name), kind):
            raise InputError(f"it says {name} {str(fields.get(name))[:80]!r}; ingest the data again")
    if not 0 < fields["samples"] < 1 << 32:
        raise InputError(f"it says {str(fields['samples'])[:40]} samples; ingest the data again")
    leads, scales = fields["leads"], fields["scale_mv"]
    if leads != [lead for lead in LEADS if lead in leads] or len(scales) != len(leads):
        raise InputError(f"it says the leads {str(leads)[:80]} with {len(scales)} scales; ingest the data again")
    texts = [*fields["metadata"].values()]
    for values in fields["labels"].values():
        texts += values if isinstance(values, list) else [None]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(scale, float) for scale in scales):
        raise InputError("its labels, metadata or scales are not text and numbers; ingest the data again")
    return fields
