"""What the tars of one data set must agree in: rate, order of leads, patients, labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from ecgscale.data.cells import find_key, is_known
from ecgscale.data.foreign import Rules, common_order
from ecgscale.data.grouping import Grouping
from ecgscale.data.json_keys import Fields, objects_in, squashed
from ecgscale.data.label_columns import parse_label_columns
from ecgscale.data.remarked import Remarked
from ecgscale.data.shards import Columns
from ecgscale.data.spellings import Spellings, alike
from ecgscale.errors import InputError

DATASET_KEYS = ("dataset", "datasetname", "database")
_FILE = re.compile(r"[/\\]|\.\w+$")

Value = TypeVar("Value", float, str)


@dataclass
class IndexedTar:
    """What one process found in one tar."""

    path: Path
    entry: dict[str, Any]
    columns: Columns  # all but the split
    split_values: list[str]
    leads: dict[tuple[str, ...], str] = field(default_factory=dict)  # each sort of rows -> the first record with it
    rates: dict[float, str] = field(default_factory=dict)  # likewise
    patient_keys: dict[str, str] = field(default_factory=dict)  # likewise, of records with a known patient
    other_ids: set[tuple[str, str, str, str]] = field(default_factory=set)  # key, id, other key, id there
    datasets: dict[str, str] = field(default_factory=dict)  # that the JSON names -> the first record with a patient
    sources: set[tuple[str, str, str]] = field(default_factory=set)  # patient's key, id, source
    patient_known: list[bool] = field(default_factory=list)
    remarked: dict[str, Remarked] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    spellings: Spellings = field(default_factory=Spellings)
    label_keys: set[str] = field(default_factory=set)  # those of the options that some record has
    label_names: dict[str, str] = field(default_factory=dict)  # each -> the first record with it
    flags: dict[str, str] = field(default_factory=dict)  # keys that are true or false -> likewise
    some_keys: frozenset[str] = frozenset()  # of the first record


def only_rate(indexed: Sequence[IndexedTar]) -> float:
    """In Hz. Raises InputError where there are two."""
    (rate_hz, first), *others = _first_records(indexed, lambda one: one.rates).items()
    if others:
        raise InputError(
            f"{others[0][1]} has {others[0][0]:g} Hz, {first} has {rate_hz:g} Hz; a data set has one rate: write the "
            "tars of each rate into a folder of their own"
        )
    return rate_hz


def _first_records(
    indexed: Sequence[IndexedTar], names_of: Callable[[IndexedTar], dict[Value, str]]
) -> dict[Value, str]:
    """Each value with the first record that has it, as ``a.tar: 'x/1'``."""
    first_of: dict[Value, str] = {}
    for one in indexed:
        for value, name in names_of(one).items():
            first_of.setdefault(value, f"{one.path}: {name!r}")
    return first_of


def check_patient_keys(indexed: Sequence[IndexedTar]) -> None:
    """Raises InputError where records name their patients by different keys: ids of two may be of two kinds."""
    first_of = _first_records(indexed, lambda one: one.patient_keys)
    if len(first_of) > 1:
        first, second, *_ = (f"{record} names its patient by {key!r}" for key, record in first_of.items())
        raise InputError(
            f"{second}, {first}; ids under two keys may be of two kinds: give all records one --patient-key, null "
            "where it is unknown"
        )


def dataset_of(fields: Fields) -> str:
    """As its JSON names it, at any depth; "" where it names none."""
    return ", ".join(_names_under(fields, DATASET_KEYS))


def source_of(fields: Fields) -> str:
    """What else may name its data set, "" for nothing: a ``source`` that is no file."""
    return ", ".join(name for name in _names_under(fields, ("source",)) if not _FILE.search(name))


def _names_under(fields: Fields, keys: Sequence[str]) -> list[str]:
    values = [value for one in objects_in(fields) for key, value in one.items() if squashed(key) in keys]
    names = [value.get("name") if isinstance(value, dict) else value for value in values]
    return sorted({name.strip() for name in names if isinstance(name, str) and is_known(name)})


def check_one_dataset(indexed: Sequence[IndexedTar]) -> None:
    """Raises InputError where JSON names several data sets: equal ids are other patients there, but not in one set."""
    first_of = _first_records(indexed, lambda one: one.datasets)
    if len(first_of) > 1:
        first, second, *_ = (f"{record} is of {dataset or 'no data set'!r}" for dataset, record in first_of.items())
        raise InputError(
            f"{second}, {first}; patients are (data set, id): give each set's tars a folder of their own, or --dataset "
            "where equal ids are one person"
        )


def check_sources(indexed: Sequence[IndexedTar]) -> None:
    """Raises InputError where one id stands under two sources, as in two data sets with ids of their own."""
    first_of: dict[tuple[str, str], str] = {}
    for key, patient, source in sorted(set().union(*(one.sources for one in indexed))):
        if (other := first_of.setdefault((key, patient), source)) != source:
            raise InputError(
                f"{folder_of(indexed)}: {key} {patient!r} is of the source {other!r} and of {source!r}; give each "
                "set's tars a folder of their own, or --dataset where equal ids are one person"
            )


def same_patients(indexed: Sequence[IndexedTar]) -> dict[str, int]:
    """Notes on other keys that name the same patients. Raises InputError where they name others."""
    groupings: dict[tuple[str, str], Grouping] = {}
    for key, patient, other_key, other in sorted(set().union(*(one.other_ids for one in indexed))):
        groupings.setdefault((key, other_key), Grouping(key, other_key)).add(patient, other)
    for grouping in groupings.values():
        if refusal := grouping.refusal():
            raise InputError(f"{folder_of(indexed)}: {refusal}")
    return {f"{other} beside {key}, which names the same patients and counts": 1 for key, other in groupings}


def asked_keys(rules: Rules) -> set[str]:
    """Those of --label-keys and --label-columns."""
    return {*rules.label_keys, *(key for _, keys in parse_label_columns(rules.label_columns) for key in keys)}


def check_label_keys(indexed: Sequence[IndexedTar], rules: Rules) -> None:
    """Raises InputError for a key of the options that no record has: most likely a slip of the pen."""
    for key in sorted(asked_keys(rules)):
        if any(key in one.label_keys for one in indexed):
            continue
        keys = sorted({key for one in indexed for key in one.some_keys})
        near = find_key(keys, key) or next(iter(get_close_matches(key, keys, 1)), None)
        hint = f"did you mean {near!r}?" if near else f"the first have {', '.join(keys)[:200]}"
        option = "--label-keys" if key in rules.label_keys else "--label-columns"
        raise InputError(f"{folder_of(indexed)}: {option} {key!r}: no record has that key; {hint}")


def check_label_names(indexed: Sequence[IndexedTar]) -> None:
    """Raises InputError for labels of two spellings, and for flags that are classes here, and labels there."""
    labels: dict[str, str] = {}
    flags: dict[str, str] = {}
    for one in indexed:
        for first_of, names in ((labels, one.label_names), (flags, one.flags)):
            for name, record in names.items():
                first_of.setdefault(name, f"{one.path}: {record!r}")
    spelt: dict[str, str] = {}
    for name in labels:
        if (other := spelt.setdefault(alike(name), name)) != name:
            raise InputError(
                f"{labels[name]} has {name!r}, {labels[other]} {other!r}: they would be two labels; write them alike"
            )
    for name in labels.keys() & flags.keys():
        raise InputError(
            f"{flags[name]} has labels with {name!r} as true or false, which makes it a class, {labels[name]} says it "
            "otherwise, which makes it a label; write true and false in all"
        )


def classes_of(indexed: Sequence[IndexedTar]) -> dict[str, list[str]]:
    """Of each label: see ``Spellings``."""
    spellings = Spellings()
    for one in indexed:
        spellings.add(one.spellings.kept())
    return spellings.kept()


def lead_order(indexed: Sequence[IndexedTar]) -> tuple[str, ...]:
    """The order of rows in all arrays. Raises InputError where there is none."""
    kinds = {leads: f"{one.path}: {name!r}" for one in indexed for leads, name in one.leads.items()}
    order = common_order(kinds)
    if order is None:
        torn = next((pair for pair in combinations(kinds, 2) if common_order(pair) is None), [*kinds][:2])
        orders = " and ".join(f"{','.join(leads)} ({kinds[leads]})" for leads in torn)
        raise InputError(
            f"{folder_of(indexed)}: rows in contradicting orders: {orders}; write all tars in one order of leads"
        )
    return order


def folder_of(indexed: Sequence[IndexedTar]) -> Path:
    """Where the tars are."""
    return indexed[0].path.parent
