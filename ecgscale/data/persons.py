"""Patient ids that may be one person's, though they count as two: told, since no program can know.

A patient is (data set, id). Equal ids in data sets of two names count as two people, and so do ``007`` and ``7`` in
one. Both may be right: hospitals count from 1, and ids with leading zeros are others. Where it is wrong, one person
stands in two splits, and what is learnt of him in training is known of him in validation.

Shape suffixes: P patients with known ids, G groups of those with one ``record.id_hash``, R patients in such groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.copies import Copies, copies_apart
from ecgscale.data.data_set import DataSet
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.spellings import odd_labels
from ecgscale.errors import InputError, MachineError, one_line
from ecgscale.record import id_hash

Int64 = npt.NDArray[np.int64]

_NEARLY_ALL = 0.9  # of a data set's ids: as many coincide where two hospitals count their patients from 1
_CODES = ("-1", "-9", "-99", "-999", "-9999", "0", "9", "99", "999", "9999", "99999", "999999", "x", "anonymous")
_MANY = 20  # records, and times as many as a patient has in the median
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, without a pattern


def apart(shards: ShardSet) -> list[str]:
    """Lines for people on sets that are read together.

    Copies and patient ids that stand in different splits, and labels and classes that are written in two ways.
    """
    lines = (copies_apart(shards), ids_apart(shards))
    labels = odd_labels(_sources(shards)) if len(shards.sets) > 1 else []  # of one set its ingest has told
    return [*filter(None, lines), *labels]


def ids_apart(shards: ShardSet) -> str | None:
    """A line where equal ids of data sets of different names stand in different splits, or where nobody can tell."""
    patients = _Patients.of(shards)
    if len(patients.names) < 2:
        return None
    shared = Copies.find(patients.id_P)
    shared = shared.only(shared.differing(patients.dataset_P[shared.number_R]))
    torn = shared.only(shared.differing(patients.split_P[shared.number_R]))
    if len(torn):
        torn_in = np.unique(patients.dataset_P[torn.number_R]).tolist()
        return one_line(
            f"{len(torn)} patient ids stand in different splits of {_listed(patients.names[d] for d in torn_in)}, "
            f"where they count as other people; {_share(patients, shared)}; if they are the same people, ingest these "
            "with one --dataset"
        )
    if patients.untold:
        older = _listed(data_set.place for data_set in patients.untold)
        return one_line(
            f"patient ids of {_listed(patients.names)} are not compared: {older} comes from an older version; where "
            "people may stand in several of them, ingest anew"
        )
    return None


def _share(patients: _Patients, shared: Copies) -> str:
    """Of the data set with the largest share, how many ids others have too, and what that speaks for."""
    of_all_D, shared_D = (
        np.bincount(dataset, minlength=len(patients.names))
        for dataset in (patients.dataset_P, patients.dataset_P[shared.number_R])
    )
    share_D = shared_D / np.maximum(of_all_D, 1)
    most = int(np.argmax(share_D))
    why = (
        "as where each counts 1, 2, 3, which is no fault" if share_D[most] >= _NEARLY_ALL else "as where people return"
    )
    return f"{shared_D[most]} of the {of_all_D[most]} ids of {patients.names[most]} occur in another, {why}"


def odd_names(shards: ShardSet) -> list[str]:
    """Lines on ids, labels and classes that may be one but for how they are written, and on ids that are nobody's."""
    ids, sources = (near_ids(shards), codes_of_nobody(shards)), _sources(shards)
    return [*filter(None, ids), *keys_of_patients(sources), *odd_labels(sources)]


def _sources(shards: ShardSet) -> list[dict[str, Any]]:
    """What all ingests say that made the sets."""
    return [source for data_set in shards.sets for source in data_set.manifest["sources"]]


def keys_of_patients(sources: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each data set whose patients stand under keys that mean other things, by manifests' ``sources``."""
    counts: dict[str, Counter[str]] = {}
    for source in sources:
        counts.setdefault(source["dataset"], Counter()).update(source.get("patient_keys", {}))
    told = []
    for dataset, records_of in sorted(counts.items()):
        if len({_meaning(key) for key in records_of}) > 1:
            keys = " and ".join(f"{key} ({records} records)" for key, records in sorted(records_of.items()))
            told.append(
                one_line(
                    f"patients of {dataset} are named by {keys}, and equal ids of these count as one person; if they "
                    "are ids of two kinds, name one by --patient-key, or ingest each kind with a --dataset of its own"
                )
            )
    return told


def _meaning(key: str) -> str:
    """``patient`` for ``PatientID``, ``patient_id`` and ``Patient``."""
    return "".join(filter(str.isalnum, key.casefold())).removesuffix("id")


def codes_of_nobody(shards: ShardSet) -> str | None:
    """A line on ids such as -1 or 9999 with many more records than others: they may say that a patient is unknown."""
    told = []
    for data_set in shards.sets:
        if "id_hash" not in data_set.columns:
            continue
        id_N = data_set.columns["id_hash"][data_set.columns["id_hash"] != 0]
        records_P = np.unique(data_set.columns["patient"][data_set.columns["id_hash"] != 0], return_counts=True)[1]
        for code in _CODES:
            records = int(np.count_nonzero(id_N == id_hash(code)))
            if records >= _MANY and records >= _MANY * np.median(records_P):
                told.append(f"{records} records are of a patient {code!r}")
    if not told:
        return None
    return f"{', '.join(told)}, far more than of others; if that is a code for unknown, leave these cells empty"


def near_ids(shards: ShardSet) -> str | None:
    """A line where ids of one data set differ in case or in the form of a number alone."""
    patients = _Patients.of(shards)
    near = Copies.find(patients.id_P + patients.dataset_P.astype(np.uint64) * _FACTOR)
    if not len(near):
        return None
    torn = near.only(near.differing(patients.split_P[near.number_R]))
    splits = f", {len(torn)} of which stand in different splits" if len(torn) else ""
    shown = torn if len(torn) else near
    first, second = (_id(shards, patients, p) for p in shown.number_R[:2].tolist())
    return one_line(
        f"{len(near)} patient ids are written in two ways that differ in case, leading zeros or the like alone"
        f"{splits}, such as {first} and {second}; they count as other people: if they are the same, write them alike"
    )


def _id(shards: ShardSet, patients: _Patients, p: int) -> str:
    """As the record says it. What is told of ids ends nothing."""
    number = int(patients.number_P[p])
    try:
        return repr(shards.metadata(number)["patient"])
    except (InputError, MachineError):
        return f"that of record {number}, which cannot be read,"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


@dataclass(frozen=True)
class _Patients:
    """Each once."""

    id_P: npt.NDArray[np.uint64]
    """Of their ids, see ``record.id_hash``."""
    dataset_P: Int64
    """Places in ``names``."""
    split_P: npt.NDArray[np.uint8]
    number_P: Int64
    """The first record of each."""
    names: tuple[str, ...]
    """Of all data sets."""
    untold: tuple[DataSet, ...]
    """Folders whose index does not tell ids: an older version wrote it."""

    @staticmethod
    def of(shards: ShardSet) -> _Patients:
        names = tuple(sorted({shard.dataset for shard in shards.shards}))
        records_S = np.diff(shards.first_S)
        dataset_N = np.repeat([names.index(shard.dataset) for shard in shards.shards], records_S)
        first, each = 0, [_NOBODY]
        for data_set in shards.sets:
            last = first + len(data_set)
            if "id_hash" in data_set.columns:
                each.append(_of_folder(data_set, dataset_N[first:last], first))
            first = last
        untold = tuple(data_set for data_set in shards.sets if "id_hash" not in data_set.columns)
        id_P, dataset_P, split_P, number_P = (np.concatenate(column) for column in zip(*each, strict=True))
        return _Patients(id_P, dataset_P, split_P, number_P, names, untold)


def _of_folder(data_set: DataSet, dataset_N: Int64, first: int) -> _Each:
    """Its patients; ``first`` is the number of its first record."""
    known_N = np.flatnonzero(data_set.columns["id_hash"])
    _, at_P = np.unique(data_set.columns["patient"][known_N], return_index=True)
    number_P = known_N[at_P]
    return (
        data_set.columns["id_hash"][number_P],
        dataset_N[number_P],
        data_set.columns["split"][number_P],
        number_P + first,
    )


_Each = tuple[npt.NDArray[np.uint64], Int64, npt.NDArray[np.uint8], Int64]
_NOBODY: _Each = (np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.int64))
