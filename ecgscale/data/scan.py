"""What the index of a tar must say, worked out anew from every byte of the tar: for `index`, and for `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import xxhash

from ecgscale.data.agreement import asked_keys
from ecgscale.data.amplitude import check_amplitude
from ecgscale.data.foreign import Described, Rules, check_length, describe, foreign_name
from ecgscale.data.json_keys import Fields
from ecgscale.data.payload import Bytes, header_bytes, npy_shape
from ecgscale.data.schema import JSON_LIMIT_BYTES, parse_json, read_metadata
from ecgscale.data.shards import index_row, person_row
from ecgscale.data.tar import Member, Sample, samples
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS


class Found(NamedTuple):
    """One record of a tar."""

    name: str
    described: Described
    row: dict[str, Any]  # of the index; all columns but the split
    end: int  # of its last member, bytes from the tar's begin
    fields: Fields  # its JSON


def scan_foreign(tar: Bytes, place: str, rules: Rules, dataset: str) -> Iterator[Found]:
    """The records of a tar that others wrote. Raises InputError that names tar and member for what is wrong."""
    label_keys = asked_keys(rules)
    for sample in samples(tar, place):
        signal, meta = (_member(sample, extension, place) for extension in (rules.signal_ext, rules.meta_ext))
        name = foreign_name(place, signal.name)
        leads, n_samples = _shape(tar, signal, place)
        content = _json_bytes(tar, meta, place)
        try:
            fields = parse_json(content, unique=True)
            described = describe(fields, rules, leads)
            check_amplitude(fields, described.leads_L, described.scale_L, label_keys)
            if rules.rate_hz is None:
                check_length(fields, n_samples, described.rate_hz)
        except InputError as error:
            raise _wrong(place, meta, error) from error
        except RecursionError as error:
            raise _wrong(place, meta, InputError("it nests too deep; write it flat")) from error
        row = _row(described, n_samples, signal, meta) | person_row(dataset, described.patient, name)
        row |= {"checksum": _hash(tar, signal), "json_checksum": xxhash.xxh3_64_intdigest(content)}
        end = max(member.offset + member.size for member in sample.members.values())
        yield Found(name, described, row, end, fields)


def scan_own(tar: Bytes, place: str, payload: str, dataset: str) -> Iterator[Found]:
    """The records of a tar that ``write_tar`` wrote. Raises InputError as ``scan_foreign`` does."""
    for sample in samples(tar, place):
        meta, signal = (_member(sample, extension, place) for extension in ("json", payload))
        if len(sample.members) > 2:
            raise InputError(f"{place}: key {sample.key!r} has {len(sample.members)} members, not 2; ingest it again")
        content = _json_bytes(tar, meta, place)
        try:
            fields = read_metadata(content)
            described = _described(fields)
            shape = (len(described.leads_L), fields["samples"])
            if fields["dataset"] != dataset or fields["payload_xxh3_64"] != f"{_hash(tar, signal):016x}":
                raise InputError("its data set or its payload's checksum is another; ingest it again")
        except InputError as error:
            raise _wrong(place, meta, error) from error
        if payload == "npy" and _shape(tar, signal, place) != shape:
            raise InputError(f"{place}: member {signal.name!r} is not {shape[0]} x {shape[1]}; ingest it again")
        row = _row(described, fields["samples"], signal, meta)
        row |= person_row(dataset, described.patient, fields["name"])
        length = signal.size if payload == "npy" else min(signal.size, header_bytes(fields["samples"]))
        checked = Member(signal.name, signal.offset, length)
        row |= {"checksum": _hash(tar, checked), "json_checksum": xxhash.xxh3_64_intdigest(content)}
        yield Found(fields["name"], described, row, signal.offset + signal.size, fields)


def _described(fields: dict[str, Any]) -> Described:
    return Described(
        fields["rate_hz"],
        tuple(fields["leads"]),
        tuple(fields["scale_mv"]),
        fields["patient"],
        fields["labels"],
        fields["metadata"],
    )


def _row(described: Described, n_samples: int, signal: Member, meta: Member) -> dict[str, Any]:
    return index_row(described.leads_L, described.scale_L, n_samples) | {
        "offset": signal.offset,
        "length": signal.size,
        "json_offset": meta.offset,
        "json_length": meta.size,
    }


def _member(sample: Sample, extension: str, place: str) -> Member:
    member = sample.members.get(extension)
    if member is None:
        there = ", ".join(sample.members)[:200]
        raise InputError(
            f"{place}: key {sample.key!r} has no member .{extension}, only {there}; a sample is one signal and one "
            "JSON of equal key, which holds no dot"
        )
    if member.size >= 1 << 32:
        raise InputError(
            f"{place}: member {member.name!r} has {member.size} bytes; store recordings of less than 4 GiB"
        )
    return member


def _shape(tar: Bytes, signal: Member, place: str) -> tuple[int, int]:
    try:
        leads, n_samples = npy_shape(tar[signal.offset : signal.offset + signal.size])
    except InputError as error:
        raise _wrong(place, signal, error) from error
    if leads > len(LEADS):
        swapped = f", most likely {n_samples} leads: transpose it" if n_samples <= len(LEADS) else ""
        raise InputError(
            f"{place}: member {signal.name!r} has {leads} rows, not one for each of at most 12 leads{swapped}"
        )
    return leads, n_samples


def _json_bytes(tar: Bytes, meta: Member, place: str) -> bytes:
    if meta.size > JSON_LIMIT_BYTES:
        raise InputError(f"{place}: member {meta.name!r} has {meta.size} bytes; a record's JSON has at most 4 MiB")
    return tar[meta.offset : meta.offset + meta.size].tobytes()


def _hash(tar: Bytes, member: Member) -> int:
    return xxhash.xxh3_64_intdigest(tar[member.offset : member.offset + member.size].data)


def _wrong(place: str, member: Member, error: InputError) -> InputError:
    return InputError(f"{place}: member {member.name!r}: {error}")
