"""Tars that others wrote with the webdataset library: what their JSON means, by rules that the manifest keeps.

A sample is an ``.npy`` of int16 counts (leads, samples) and a ``.json``. The JSON says rate, leads, scale and patient
under one of the usual names, in any case, or an option says it for the whole set. Where both speak they must agree.

Shape suffixes: L the leads of a record, in the order of its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from ecgscale.data.amplitude import GAIN_KEYS, SCALE_KEYS, UNIT_KEYS, read_scale
from ecgscale.data.cells import PATIENT_KEYS, Cells, find_key
from ecgscale.data.json_keys import (
    Fields,
    agreed,
    as_float,
    folded,
    is_number,
    numbers_in,
    objects_in,
    only,
    squashed,
    under_names,
)
from ecgscale.data.label_columns import parse_label_columns
from ecgscale.data.tar import split_name
from ecgscale.errors import InputError
from ecgscale.lead_names import (
    LEADS,
    are_leads,
    canonical_leads,
    in_canonical_order,
    likely_lead,
    parse_renames,
    source_leads,
)
from ecgscale.record import MAX_RATE_HZ, MIN_RATE_HZ, check_rate

RATE_KEYS = (
    *("rate_hz", "fs", "sampling_rate", "sample_rate", "sampling_frequency"),
    *("fs_hz", "srate", "sfreq", "samplerate", "samplingrate", "samplingfrequency", "sample_frequency"),
    *("sampling_rate_hz", "sample_rate_hz", "sampling_frequency_hz", "sample_frequency_hz"),
)
_PERHAPS_RATE_KEYS = ("rate", "frequency", "freq", "hz")  # of a heart too: they contradict, but say nothing themselves
_PERIOD_KEYS = {"samplingintervalms": 1e3, "samplingperiodms": 1e3, "sampleintervalms": 1e3}  # of one sample
_PERIOD_KEYS |= {"samplinginterval": 1.0, "samplingperiod": 1.0, "sampleperiod": 1.0, "dt": 1.0, "deltat": 1.0}  # s
_LEAST_HZ = 200  # under such a key: hearts are slower, per minute, but for the fastest
_OTHER_RATE_KEYS = ("sample_freq", "sampling_freq", "target_fs", "resampled_to")  # likewise
_SQUASHED_RATE_KEYS = frozenset(map(squashed, (*RATE_KEYS, *_OTHER_RATE_KEYS)))
_LENGTH_KEYS = (
    "siglen",
    "nsamples",
    "numsamples",
    "nsamp",
    "numberofsamples",
    "samplecount",
    "samples",
    "recordlength",
)
_DURATION_KEYS = (  # in s
    *("durations", "durationsec", "durationseconds", "recorddurations", "signaldurations", "recordingdurations"),
    *("lengths", "lengthsec", "recordlengths", "recordingtimes"),
)
LEAD_KEYS = ("leads", "lead_names", "sig_name")
_OLDER_PATIENT_KEYS = ["patient", "patient_id", "subject_id"]  # of manifests that do not say theirs

_FOLDED = {lead.casefold() for lead in LEADS}


@dataclass(frozen=True)
class Rules:
    """What holds for all samples of a set; None and (): their JSON says it."""

    rate_hz: float | None = None
    leads: tuple[str, ...] = ()
    mv_per_count: float | None = None
    patient_key: str = ""
    label_keys: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = ()
    """Groups of keys of flags, each as NAME=A,B,C: the classes of one label."""
    signal_ext: str = "npy"
    meta_ext: str = "json"
    lead_order: tuple[str, ...] = LEADS
    """The order of rows in all arrays; a record that lacks leads has the others in this order."""
    rename_leads: tuple[str, ...] = ()
    """NAME=LEAD of rows that the JSON calls otherwise."""
    patient_keys: tuple[str, ...] = PATIENT_KEYS
    """Where the patient is looked for without a ``patient_key``; the first that is known counts."""

    def __post_init__(self) -> None:
        if self.rate_hz is not None:
            check_rate(self.rate_hz, "rate-hz")
        parse_renames(self.rename_leads)
        if self.mv_per_count is not None and not 0 < self.mv_per_count < math.inf:
            raise InputError(f"mv-per-count {self.mv_per_count:g}: give a finite number above 0")
        if not self.signal_ext or not self.meta_ext or self.signal_ext == self.meta_ext:
            raise InputError(f"signal-ext {self.signal_ext!r}, meta-ext {self.meta_ext!r}: give two extensions")
        parse_label_columns(self.label_columns)
        if self.leads and canonical_leads(self.leads) != self.leads:
            raise InputError(f"leads {','.join(self.leads)}: write {','.join(canonical_leads(self.leads))}")
        if sorted(self.lead_order) != sorted(LEADS):
            raise InputError(f"lead_order {','.join(self.lead_order)}: name each of the twelve leads once")

    def to_manifest(self) -> Fields:
        fields = asdict(self)
        if not self.rename_leads:
            del fields["rename_leads"]  # as earlier versions have it
        return fields

    @staticmethod
    def from_manifest(fields: Any, place: str) -> Rules:
        """Raises InputError that names ``place`` for anything but what ``to_manifest`` gives."""
        types: dict[str, type | tuple[type, ...]] = {"rate_hz": (int, float), "mv_per_count": (int, float)}
        lists = ("leads", "label_keys", "label_columns", "lead_order", "rename_leads", "patient_keys")
        if isinstance(fields, dict):  # older manifests know no such rules
            older = {"label_columns": [], "rename_leads": [], "patient_keys": _OLDER_PATIENT_KEYS}
            fields = older | fields
            if all(str(one).startswith("scp") for one in fields.get("likelihoods") or ()):  # others were read otherwise
                fields.pop("likelihoods", None)
        if not isinstance(fields, dict) or fields.keys() != asdict(Rules()).keys():
            raise InputError(f"{place}: its rules for foreign tars are not those of this version; index the tars again")
        for name, value in fields.items():
            if name in lists:
                right = isinstance(value, list) and all(isinstance(one, str) for one in value)
            elif name in types:
                right = value is None or (isinstance(value, types[name]) and not isinstance(value, bool))
            else:
                right = isinstance(value, str)
            if not right:
                raise InputError(f"{place}: its rule {name} is {value!r}; index the tars again")
        try:
            given: Fields = {name: tuple(value) if name in lists else value for name, value in fields.items()}
            return Rules(**given)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error

    def rows(self, bits: int) -> list[int]:
        """The rows of an array with the leads of a bit mask, in the order in which they are canonical."""
        return _rows(self.lead_order, bits)


@lru_cache(maxsize=4096)
def _rows(lead_order: tuple[str, ...], bits: int) -> list[int]:
    return in_canonical_order([lead for lead in lead_order if bits >> LEADS.index(lead) & 1])


@dataclass(frozen=True)
class Described:
    """What is known of a sample, its leads as its rows have them."""

    rate_hz: float
    leads_L: tuple[str, ...]
    scale_L: tuple[float, ...]  # mV per count
    patient: str | None
    labels: dict[str, list[str]]
    metadata: dict[str, str]
    notes: dict[str, int] = field(default_factory=dict)  # what was done to cells (see ``Cells``) -> how often
    patient_key: str = ""  # that names the patient
    flags: frozenset[str] = frozenset()  # keys of its ``labels`` that are true or false alone, so classes of one label
    other_ids: dict[str, str] = field(default_factory=dict)  # key -> what else may be the patient's id


def describe(fields: Fields, rules: Rules, n_leads: int | None = None) -> Described:
    """What a sample's JSON says under the rules. Raises InputError for what is missing, unusable or contradictory."""
    usual = {*RATE_KEYS, *LEAD_KEYS, *SCALE_KEYS, *GAIN_KEYS, "labels"}
    patient_keys = rules.patient_keys
    if rules.patient_key:
        key = find_key(fields, rules.patient_key)
        if key is None:
            raise InputError(
                f"it has no key {rules.patient_key!r}, the --patient-key; it has {', '.join(fields)[:200]}"
            )
        patient_keys, told = (rules.patient_key,), under_names(fields, usual) | {rules.patient_key: fields[key]}
        usual |= {folded(key)}
    else:
        usual |= {*patient_keys}
        told = under_names(fields, usual)
    told |= under_names(fields, {*UNIT_KEYS})
    others = [] if n_leads is None else _other_leads(fields, n_leads)
    if not rules.leads and not others and only(told, LEAD_KEYS) is None:
        _refuse_unread_leads(fields)
    leads_L = _leads(told, rules, n_leads, others)
    rate_hz = agreed("rate-hz", rules.rate_hz, _rate(told, rules.rate_hz is not None))
    check_other_rates(fields, rate_hz)
    scale_L = read_scale(told, rules.mv_per_count, len(leads_L))
    cells = Cells()
    patients = ((cells.identifier(told.get(key), key), key) for key in patient_keys)
    patient, patient_key = next((one for one in patients if one[0] is not None), (None, ""))
    other_keys = patient_keys[patient_keys.index(patient_key) + 1 :] if patient_key else ()
    given = told.get("labels")
    values, flags = _label_values(fields, given, rules)
    labels = {key: cells.classes(value, key) for key, value in values.items()}
    labels |= {name: cells.flagged(group, name) for name, group in flags.items()}
    taken = {*values, *(key for group in flags.values() for key in group)}
    rest = {key: value for key, value in fields.items() if key not in taken and folded(key) not in usual}
    metadata = {key: cells.text(value, key) for key, value in rest.items() if _is_scalar(value)}
    return Described(
        rate_hz,
        leads_L,
        scale_L,
        patient,
        {key: classes for key, classes in labels.items() if classes is not None},
        {key: text for key, text in metadata.items() if text is not None},
        dict(cells.notes),
        patient_key,
        frozenset(given if isinstance(given, dict) and "labels" in values.keys() - given.keys() else ()),
        {key: id_ for key in other_keys if (id_ := _id_or_none(told.get(key))) is not None},
    )


def _id_or_none(value: Any) -> str | None:
    try:
        return Cells().identifier(value, "")
    except InputError:
        return None  # such as an object under "patient": it is none of an id


def keys_of(fields: Fields) -> frozenset[str]:
    """The keys under which --label-keys and --label-columns find something."""
    within = under_names(fields, {"labels"}).get("labels")
    return frozenset((*fields, *(within if isinstance(within, dict) else ())))


def as_own(described: Described, name: str, dataset: str, samples: int) -> Fields:
    """The same under the keys, and with the leads in the order, of our own JSON."""
    at = in_canonical_order(described.leads_L)
    return {
        "name": name,
        "dataset": dataset,
        "patient": described.patient,
        "leads": [described.leads_L[i] for i in at],
        "rate_hz": described.rate_hz,
        "scale_mv": [described.scale_L[i] for i in at],
        "samples": samples,
        "invalid_samples": 0,
        "labels": described.labels,
        "metadata": described.metadata,
    }


def foreign_name(place: str, member: str) -> str:
    """A sample's name, which is its own in the whole set: keys may begin anew in each tar."""
    return f"{PurePosixPath(place).stem}/{split_name(member)[0]}"


def common_order(kinds: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    """An order of the twelve leads in which the leads of each kind of record stand; None where there is none."""
    listed = [*kinds]
    if all([*leads] == [lead for lead in LEADS if lead in leads] for leads in listed):
        return LEADS
    behind: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(LEADS, ()))
    for leads in listed:
        for one, next_one in pairwise(leads):
            behind.add(next_one, one)
    try:
        return tuple(behind.static_order())
    except CycleError:
        return None


def _other_leads(fields: Fields, n_leads: int) -> list[tuple[str, list[str]]]:
    """(key, names of as many leads as there are rows), under keys that are none of LEAD_KEYS."""
    others = []
    for one in objects_in(fields):
        for key, value in one.items():
            names = value.split(",") if isinstance(value, str) and "," in value else value
            if not isinstance(names, list) or len(names) != n_leads or (one is fields and folded(key) in LEAD_KEYS):
                continue
            if all(isinstance(name, str) for name in names) and are_leads(names):
                others.append((key, names))
    return others


def _refuse_unread_leads(fields: Fields) -> None:
    """Raises InputError where a JSON names leads in a form that is not read: the usual twelve would be taken for them.

    Such as objects with a name each, a mapping of names to rows, or one text. A few letters that look like leads, as in
    the grades of a disease, are none.
    """
    named = {word for text in _texts(fields) for word in re.split(r"[^a-z0-9]+", text.casefold()) if word in _FOLDED}
    if 2 * len(named) >= len(LEADS):
        raise InputError(
            f"it names {len(named)} leads, but in no list of as many names as there are rows; write them as leads: "
            "[I, II, ...] in the order of the rows, or give --leads I,II,..."
        )


def _texts(value: Any) -> Iterator[str]:
    """All keys and texts of a JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)


def _leads(fields: Fields, rules: Rules, n_leads: int | None, others: list[tuple[str, list[str]]]) -> tuple[str, ...]:
    said = only(fields, LEAD_KEYS)
    if isinstance(said, list) and said and all(isinstance(name, str) for name in said):
        others = [("leads", said), *others]
    key_of_leads = {source_leads(names, _renames(rules.rename_leads), can_ignore=False): key for key, names in others}
    if len(key_of_leads) > 1:
        told = " and ".join(f"{key} {','.join(leads)[:100]}" for leads, key in [*key_of_leads.items()][:2])
        raise InputError(f"it says {told}; leave one out")
    if others:
        leads = next(iter(key_of_leads))
        if rules.leads and leads != rules.leads:
            raise InputError(f"it says the leads {','.join(leads)[:100]}, --leads says {','.join(rules.leads)}")
    elif rules.leads or said is None:
        leads = rules.leads or LEADS
    else:
        raise InputError(f"its leads are {str(said)[:100]!r}, not a list of names; give --leads I,II,...")
    if n_leads is not None and len(leads) != n_leads:
        raise InputError(f"its array has {n_leads} rows for the {len(leads)} leads {','.join(leads)}; {_hint(said)}")
    return leads


@lru_cache(maxsize=8)
def _renames(texts: tuple[str, ...]) -> dict[str, str]:
    return dict(parse_renames(texts))


def _hint(said: Any) -> str:
    return "give --leads I,II,..." if said is None else "store (leads, samples), one row for each lead that it names"


def _rate(fields: Fields, has_option: bool) -> float | None:
    said = only(fields, RATE_KEYS)
    if is_number(said) and MIN_RATE_HZ <= said <= MAX_RATE_HZ:
        return float(said)
    if not has_option:
        raise InputError(
            f"its sample rate is {str(said)[:40]!r}; write rate_hz, {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g} Hz, into the "
            "JSON or give --rate-hz"
        )
    return None


def check_other_rates(fields: Fields, rate_hz: float) -> None:
    """Raises InputError where a key that may be the sample rate's says another."""
    for key, value in ((key, value) for one in objects_in(fields) for key, value in one.items()):
        name = squashed(key)
        if period_s := _PERIOD_KEYS.get(name):
            others = [round(period_s / period, 3) for period in numbers_in(value) if period > 0]
        elif name in _SQUASHED_RATE_KEYS or name in _PERHAPS_RATE_KEYS:
            others = [*numbers_in(value)]
        else:
            continue
        for other_hz in others:
            if abs(other_hz - rate_hz) > 1e-3 and (name not in _PERHAPS_RATE_KEYS or other_hz >= _LEAST_HZ):
                raise InputError(f"its sample rate is {rate_hz:g} Hz, but {key!r} says {other_hz:g}; leave one out")


def check_lead_names(fields: Fields, leads_L: Sequence[str]) -> None:
    """Raises InputError where a list of as many names as there are leads has them in another order, or others."""
    for value in (value for objects in objects_in(fields) for value in objects.values()):
        names = value.split(",") if isinstance(value, str) and "," in value else value
        if not isinstance(names, list) or len(names) != len(leads_L):
            continue
        if not all(isinstance(name, str) for name in names) or not are_leads(names):
            continue
        if [*map(likely_lead, names)] != [*leads_L]:
            raise InputError(f"its leads are {','.join(names)[:100]}, but its rows are read as {','.join(leads_L)}")


def check_length(fields: Fields, n_samples: int, rate_hz: float) -> None:
    """Raises InputError where a JSON says another length than the array has: it may be at another rate."""
    for key, value in ((key, value) for one in objects_in(fields) for key, value in one.items()):
        name = squashed(key)
        if not is_number(value) or value != value or not (name in _LENGTH_KEYS or name in _DURATION_KEYS):
            continue
        samples = as_float(value) * (1 if name in _LENGTH_KEYS else rate_hz)
        tolerance = 0 if name in _LENGTH_KEYS else 0.02 * n_samples + 2  # durations are rounded
        if abs(samples - n_samples) > tolerance:
            raise InputError(
                f"its {key} is {str(value)[:40]}, but its array has {n_samples} samples at {rate_hz:g} Hz: was it "
                "cut, or resampled? Correct the JSON, or give --rate-hz"
            )


def _label_values(fields: Fields, given: Any, rules: Rules) -> tuple[Fields, dict[str, Fields]]:
    """(label -> what the JSON says, label of --label-columns -> key of a flag -> what the JSON says).

    Labels are the keys of ``given``, unless they are flags alone, which are the classes of one, and the listed keys.
    """
    within: Fields = given if isinstance(given, dict) else {}
    groups = parse_label_columns(rules.label_columns)
    grouped = {key for _, keys in groups for key in keys}
    values = {key: value for key, value in within.items() if key not in grouped}
    if any(isinstance(one, bool) for one in values.values()) and all(
        one is None or isinstance(one, bool) for one in values.values()
    ):
        values = {"labels": values}
    elif given is not None and not isinstance(given, dict):
        values = {"labels": given}
    flags = {name: {key: _said_once(fields, within, key) for key in keys} for name, keys in groups}
    values |= {key: _said_once(fields, within, key) for key in rules.label_keys if key in fields}
    for name in flags.keys() & values.keys():
        raise InputError(f"it has a label {name!r} already; name that of --label-columns otherwise: NAME=A,B,C")
    return values, flags


def _said_once(fields: Fields, within: Fields, key: str) -> Any:
    """What stands under a key, or in ``labels``. Raises InputError where the two contradict."""
    told = [place[key] for place in (fields, within) if place.get(key) is not None]
    if len(told) > 1 and Cells().classes(told[0], key) != Cells().classes(told[1], key):
        raise InputError(f"it says {key} {str(told[0])[:40]!r}, but {str(told[1])[:40]!r} in labels; leave one out")
    return told[0] if told else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
