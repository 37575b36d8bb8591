"""Exact copies: recordings with the samples of another, by the index alone.

A copy that a file manager made, a folder that was ingested twice, or a recording that stands under two names is no
second recording: in another split it would be known there. Equal payloads have equal checksums, and the same lead I or
II has the same ``lead_keys``, whatever the payload, the other leads and the size of a count. What has been filtered,
resampled or amplified is not found, nor what has neither lead in common. Indexes of earlier versions have no lead keys.

Shape suffixes: K keys of a record, N records, R records that have copies, G groups of equal records, P persons.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.remote import is_remote
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.errors import InputError, MachineError, naming_file, one_line
from ecgscale.files import whole_file
from ecgscale.lead_names import LEADS
from ecgscale.record import Counts

Int64 = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

COPIES = "copies.csv"  # beside the shards
_MOST_PATIENTS = 3  # under whose ids one person may stand
_CHUNK = 1 << 18  # records whose keys are made at once
# Odd numbers without a pattern (Weyl's sequence of the golden ratio): a sum of products is a hash of its factors.
_FACTORS = (np.arange(1, 4 + len(LEADS), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def content_keys(columns: Mapping[str, npt.NDArray[Any]]) -> Keys:
    """(N,) from columns of an index: equal for records of equal samples, leads and scale, and only for these."""
    key_N = np.empty(len(columns["checksum"]), np.uint64)
    for first in range(0, len(key_N), _CHUNK):
        part = {name: columns[name][first : first + _CHUNK] for name in ("checksum", "samples", "leads", "scale")}
        scale_bits = np.ascontiguousarray(part["scale"], np.float32).view(np.uint32)
        numbers = [part["checksum"], part["samples"], part["leads"], *scale_bits.T]
        key = np.zeros(len(scale_bits), np.uint64)
        for factor, number in zip(_FACTORS, numbers, strict=True):
            key ^= key >> np.uint64(29)
            key += number.astype(np.uint64) * factor
        key_N[first : first + _CHUNK] = key
    return key_N


def record_keys(columns: Mapping[str, npt.NDArray[Any]]) -> Keys:
    """(3, N) from columns of an index: copies have one of them in common; 0 is none."""
    content_N = content_keys(columns)
    of_leads_NK = columns.get("lead_keys", np.zeros((len(content_N), 2), np.uint64))
    return np.stack([content_N, *of_leads_NK.T])


@dataclass(frozen=True)
class Copies:
    """Groups of equal records."""

    number_R: Int64
    """Group by group, in each by number."""
    first_G: Int64
    """(G + 1,) where the groups begin in ``number_R``."""

    @staticmethod
    def find(key_N: Keys) -> Copies:
        """All records whose key another one has too."""
        order_N = np.argsort(key_N, kind="stable")
        sorted_N = key_N[order_N]
        same = sorted_N[1:] == sorted_N[:-1]
        has_copy = np.zeros(len(key_N), bool)
        has_copy[1:] |= same
        has_copy[:-1] |= same
        number_R, key_R = order_N[has_copy].astype(np.int64), sorted_N[has_copy]
        begins_R = np.ones(len(key_R), bool)
        begins_R[1:] = key_R[1:] != key_R[:-1]
        return Copies(number_R, np.append(np.flatnonzero(begins_R), len(key_R)).astype(np.int64))

    @staticmethod
    def joined(key_KN: Keys) -> Copies:
        """All records that have one of their keys in common with another, and what such pairs join."""
        numbers, starts, n_alike = [], [np.zeros(1, np.int64)], 0
        for key_N in key_KN:
            known_N = np.flatnonzero(key_N)
            alike = Copies.find(key_N[known_N])
            numbers.append(known_N[alike.number_R])
            starts.append(alike.first_G[1:] + n_alike)
            n_alike += len(alike.number_R)
        number_R = np.concatenate(numbers)
        number_R, least_R = Copies(number_R, np.concatenate(starts)).linked_persons(number_R)
        order_R = np.argsort(least_R, kind="stable")
        begins_R = np.flatnonzero(np.diff(least_R[order_R], prepend=-1))
        return Copies(number_R[order_R], np.append(begins_R, len(number_R)).astype(np.int64))

    def __len__(self) -> int:
        return len(self.first_G) - 1

    @property
    def group_R(self) -> Int64:
        return np.repeat(np.arange(len(self)), np.diff(self.first_G))

    @property
    def one_of_each(self) -> Int64:
        """(G,) the first record of each group."""
        return self.number_R[self.first_G[:-1]]

    def only(self, keep_G: npt.NDArray[np.bool_]) -> Copies:
        """Some of the groups."""
        sizes_G = np.diff(self.first_G)
        first_G = np.concatenate([[0], np.cumsum(sizes_G[keep_G])]).astype(np.int64)
        return Copies(self.number_R[np.repeat(keep_G, sizes_G)], first_G)

    def differing(self, value_R: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        """(G,) whether a group's records have different values."""
        if not len(self):
            return np.zeros(0, bool)
        starts_G = self.first_G[:-1]
        differs_G: npt.NDArray[np.bool_]
        differs_G = np.minimum.reduceat(value_R, starts_G) != np.maximum.reduceat(value_R, starts_G)
        return differs_G

    def of_few_persons(self, patient_R: Int64, known_R: npt.NDArray[np.bool_]) -> Copies:
        """Without the groups that stand under more known patients than one person is taken for.

        A signal that many patients have is a test signal or a fault of the export: it tells nothing of who is who, and
        would bind all of them, with everything that they have, to one split.
        """
        group_and_code = np.unique(np.stack([self.group_R[known_R], patient_R[known_R]]), axis=1)
        known_G = np.bincount(group_and_code[0], minlength=len(self))
        return self.only(known_G <= _MOST_PATIENTS)

    def linked_persons(self, patient_R: Int64) -> tuple[Int64, Int64]:
        """Persons whom equal records link to others: (P,) sorted codes, (P,) the least code of all that are linked."""
        differing_G = self.differing(patient_R)
        linked = self.only(differing_G)
        code_P, person_R = np.unique(patient_R[np.repeat(differing_G, np.diff(self.first_G))], return_inverse=True)
        least_P = np.arange(len(code_P))
        while len(linked):
            least_G = np.minimum.reduceat(least_P[person_R], linked.first_G[:-1])
            lower_P = least_P.copy()
            np.minimum.at(lower_P, person_R, least_G[linked.group_R])
            if np.array_equal(lower_P, least_P):
                break
            least_P = lower_P
        return code_P, code_P[least_P]


def is_flat(signal_LT: Counts) -> bool:
    """Whether no lead ever changes: such recordings equal each other without being copies."""
    return bool((signal_LT == signal_LT[:, :1]).all())


# -- of a data set that is there -------------------------------------------------------------------------------------


def copies_in(shards: ShardSet) -> Copies:
    """Of all records that are not flat."""
    return _without_flat(shards, _all_in(shards))


def _all_in(shards: ShardSet) -> Copies:
    return Copies.joined(np.concatenate([record_keys(one.columns) for one in shards.sets], axis=1))


def _without_flat(shards: ShardSet, copies: Copies) -> Copies:
    return copies.only(np.array([not _is_flat(shards, number) for number in copies.one_of_each.tolist()], bool))


def _is_flat(shards: ShardSet, number: int) -> bool:
    """Of a record that cannot be read nobody knows: it counts as a copy. What is told of copies ends nothing."""
    try:
        return is_flat(shards.signal(number))
    except (InputError, MachineError):
        return False


def _metadata(shards: ShardSet, number: int) -> dict[str, Any]:
    """What a record's JSON says; where it cannot be read, the record has its number for a name and no patient."""
    try:
        return shards.metadata(number)
    except (InputError, MachineError):
        dataset = shards.shards[int(shards.shard_of(np.array([number]))[0])].dataset
        return {"name": f"record {number} (unreadable)", "dataset": dataset, "patient": None}


def copies_apart(shards: ShardSet) -> str | None:
    """A line where exact copies lie in different splits of what is read together; ``ingest`` sees one set alone.

    Shards are not fetched for it, so that in remote sets flat recordings count too.
    """
    copies = _all_in(shards)
    apart = copies.only(copies.differing(shards.take("split", copies.number_R)))
    if not any(is_remote(one.place) for one in shards.sets):
        apart = _without_flat(shards, apart)
    if not len(apart):
        return _untold(shards) if len(shards.sets) > 1 else None
    shown = "" if any(is_remote(one.place) for one in shards.sets) else f", such as {_pair(shards, apart, split=True)}"
    return (
        f"{len(apart)} recordings have exact copies in another split of {', '.join(shards.names)}{shown}; "
        "`ingest --append` into one data set keeps copies in one split"
    )


def _untold(shards: ShardSet) -> str | None:
    """A line where an index has no lead keys."""
    older = [one.place for one in shards.sets if "lead_keys" not in one.columns]
    if not older:
        return None
    return one_line(
        f"copies in another payload, with other leads or another scale are not found in {', '.join(older)}, which "
        "comes from an older version; to find them, ingest all anew"
    )


def about_copies(shards: ShardSet, copies: Copies | None = None) -> list[str]:
    """Lines for people: how many exact copies there are, under how many patients, and whether in different splits.

    ``copies``: all of them, where they are known already.
    """
    copies = copies_in(shards) if copies is None else copies
    untold = [line for line in [_untold(shards)] if line is not None]
    if not len(copies):
        return untold
    spare = len(copies.number_R) - len(copies)
    split_R = shards.take("split", copies.number_R)
    apart = copies.only(copies.differing(split_R))
    where = "all copies of a recording lie in one split" if not len(apart) else f"{len(apart)} lie in different splits"
    lines = [f"{spare} recordings are exact copies of others, such as {_pair(shards, copies)}; {where}"]
    if len(apart):
        lines.append(
            f"copies in different splits: {len(apart)} recordings, such as {_pair(shards, apart, split=True)}; "
            "what is learnt of one is known of the other"
        )
    torn = _under_two_patients(shards, copies)
    if len(torn):
        lines.append(
            f"copies under two patients: {len(torn)} recordings, such as {_pair(shards, torn, patient=True)}; "
            "they are one person, or an id is wrong"
        )
    return lines + untold


def write_copies(shards: ShardSet, folder: Path, copies: Copies) -> None:
    """``copies.csv``: each with the first record that it equals; no table where there are none."""
    path = folder / COPIES
    if not len(copies):
        with naming_file(path, "cannot remove"):
            path.unlink(missing_ok=True)
        return
    split_R, group_R = shards.take("split", copies.number_R), copies.group_R
    with whole_file(path) as partial, partial.open("x", encoding="utf8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("record", "equals", "dataset", "patient", "split"))
        original, of_group = "", -1
        for number, group, split in zip(copies.number_R.tolist(), group_R.tolist(), split_R.tolist(), strict=True):
            about = _metadata(shards, number)
            if group != of_group:
                original, of_group = about["name"], group
            table.writerow((about["name"], original, about["dataset"], about["patient"] or "", SPLITS[split]))


def _under_two_patients(shards: ShardSet, copies: Copies) -> Copies:
    """Those of which two known patients are said."""
    several = copies.only(copies.differing(shards.take("patient", copies.number_R)))
    patients: list[set[tuple[str, str]]] = [set() for _ in range(len(several))]
    for number, group in zip(several.number_R.tolist(), several.group_R.tolist(), strict=True):
        about = _metadata(shards, number)
        if about["patient"] is not None:
            patients[group].add((about["dataset"], about["patient"]))
    return several.only(np.array([len(known) > 1 for known in patients], bool))


def _pair(shards: ShardSet, copies: Copies, split: bool = False, patient: bool = False) -> str:
    """Two of the group that begins first, of different splits or patients where these are to be shown."""
    shown: dict[str, str] = {}
    first = int(np.argmin(copies.one_of_each))
    for number in copies.number_R[copies.first_G[first] : copies.first_G[first + 1]].tolist():
        about = _metadata(shards, number)
        differs, detail = str(number), ""
        if split:
            differs = detail = SPLITS[int(shards.take("split", np.array([number]))[0])]
        elif patient:
            differs = detail = f"patient {about['patient']} of {about['dataset']}"
        if not patient or about["patient"] is not None:
            shown.setdefault(differs, f"{about['name']} ({detail})" if detail else about["name"])
        if len(shown) == 2:
            break
    return one_line(" and ".join(shown.values()))
