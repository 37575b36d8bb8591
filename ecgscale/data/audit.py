"""Checks of whole shards: the tar's bytes, its structure and every record in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Set
from itertools import islice
from typing import Any

import numpy as np

from ecgscale.data.data_set import DataSet
from ecgscale.data.lead_keys import SEARCHED, lead_keys
from ecgscale.data.scan import Found, scan_foreign, scan_own
from ecgscale.data.shard_set import Int64, ShardSet, lead_positions
from ecgscale.data.shards import COLUMNS, as_columns, check_patient_disjoint
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS

_TOGETHER = 1024  # records whose rows are compared at once
_WINDOW = SEARCHED  # samples that are decoded at once: a header may claim more than there is memory


def verify_set(shards: ShardSet) -> None:
    """Raises InputError where a patient stands in two splits of a data set."""
    for data_set in shards.sets:
        check_patient_disjoint(data_set.columns["patient"], data_set.columns["split"], data_set.place)


def verify_shard(shards: ShardSet, shard: int) -> None:
    """Raises InputError unless tar, index and manifest agree in every byte, count and value.

    A set whose checksums are right but whose tar, JSON or arrays are not those of a shard is named too.
    """
    entry = shards.shards[shard]
    if hashlib.sha256(shards.tar(shard).data).hexdigest() != entry.sha256:
        culprit = _first_damaged(shards, shard)
        raise InputError(
            f"{entry.place}: damaged, its sha256 differs from the manifest{culprit}; copy or ingest it again"
        )
    records = _scanned(shards, shard)
    number, last = int(shards.first_S[shard]), int(shards.first_S[shard + 1])
    while part := list(islice(records, _TOGETHER)):
        if number + len(part) > last:
            raise InputError(
                f"{entry.place}: holds more than the {entry.records} records of its index; ingest it again"
            )
        _compare(shards, part, number, entry.place, _set_of(shards, shard).columns.keys())
        number += len(part)
    if number < last:
        raise InputError(f"{entry.place}: holds fewer than the {entry.records} records of its index; ingest it again")
    number_R = np.arange(int(shards.first_S[shard]), last)
    if entry.payload != "npy":  # whose every byte has been compared by now
        _decode(shards, number_R)
    if "lead_keys" in _set_of(shards, shard).columns:
        _check_lead_keys(shards, number_R, entry.place)


def _scanned(shards: ShardSet, shard: int) -> Iterator[Found]:
    entry, owner = shards.shards[shard], _set_of(shards, shard)
    tar, rate_hz = shards.tar(shard), owner.manifest["rate_hz"]
    rules = owner.rules
    records = (
        scan_own(tar, entry.place, entry.payload, entry.dataset)
        if rules is None
        else scan_foreign(tar, entry.place, rules, entry.dataset)
    )
    for record in records:
        leads_L = record.described.leads_L
        if record.described.rate_hz != rate_hz:
            stated = f"{record.described.rate_hz:g} Hz, its manifest {rate_hz:g} Hz"
            raise InputError(f"{entry.place}: record {record.name!r} says {stated}; ingest it again")
        if rules is not None and sorted(leads_L, key=rules.lead_order.index) != list(leads_L):
            raise InputError(
                f"{entry.place}: record {record.name!r} has other rows than its manifest says; index it again"
            )
        yield record


def _set_of(shards: ShardSet, shard: int) -> DataSet:
    for data_set in shards.sets:
        if shard < len(data_set.shards):
            return data_set
        shard -= len(data_set.shards)
    raise IndexError(shard)


def _compare(shards: ShardSet, records: list[Found], first: int, place: str, indexed: Set[str]) -> None:
    """Raises InputError where a column that is ``indexed`` says something else than the tar."""
    number_R = np.arange(first, first + len(records))
    rows = [record.row for record in records]
    for name, column in as_columns(rows, indexed & rows[0].keys()).items():
        differs_R = (column != shards.take(name, number_R)).reshape(len(records), -1).any(axis=1)
        if differs_R.any() or not _plausible(name, column):
            at = int(np.argmax(differs_R))
            raise InputError(
                f"{place}: record {records[at].name!r}: its {name} is not that of the index, or not one; ingest it "
                "again"
            )


def _plausible(name: str, column: np.ndarray[Any, Any]) -> bool:
    return COLUMNS[name][0] != np.float32 or bool(np.isfinite(column).all() and (column >= 0).all())


def _check_lead_keys(shards: ShardSet, number_R: Int64, place: str) -> None:
    stop_R = np.minimum(shards.take("samples", number_R), SEARCHED).tolist()
    signals = shards.windows(number_R, [0] * len(number_R), stop_R)
    columns = (shards.take(name, number_R) for name in ("leads", "scale", "lead_keys"))
    for number, signal_LT, bits, scale_of_all, key_K in zip(number_R.tolist(), signals, *columns, strict=True):
        at = lead_positions(int(bits))
        if not np.array_equal(lead_keys(signal_LT, scale_of_all[at], [LEADS[i] for i in at]), key_K):
            raise InputError(f"{place}: record {number}: its lead_keys are not those of the index; ingest it again")


def _decode(shards: ShardSet, number_R: Int64) -> None:
    """Read every sample, of long records a part at a time. Raises InputError that names the record."""
    samples_R = shards.take("samples", number_R).astype(np.int64)
    for start in range(0, int(samples_R.max()), _WINDOW):
        long_R = samples_R > start
        stop_R = np.minimum(samples_R[long_R], start + _WINDOW)
        for _ in shards.windows(number_R[long_R], [start] * len(stop_R), stop_R.tolist()):
            pass


def _first_damaged(shards: ShardSet, shard: int) -> str:
    first, last = int(shards.first_S[shard]), int(shards.first_S[shard + 1])
    for number in range(first, last):
        try:
            _decode(shards, np.array([number]))
            shards.metadata(number)
        except InputError:
            return f" (first damaged record: {number - first})"
    return " (the records are whole: the damage is in a tar header)"
