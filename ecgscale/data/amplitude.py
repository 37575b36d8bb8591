"""What a JSON says about amplitude is either read, or refused where it is not what the counts are read by.

Read are a scale or a gain in their usual names, at the top, or an option. Whatever else speaks of scale, zero, polarity
or unit, under any key made of the words of ``amplitude_names``, at any depth, must agree with that.

Shape suffixes: L the leads of a record, in the order of its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

from ecgscale.data.amplitude_names import Meaning, Topic, joined, lead_of, meaning
from ecgscale.data.cells import is_known
from ecgscale.data.json_keys import Fields, agreed, as_float, is_number, only, squashed
from ecgscale.data.units import parse_unit
from ecgscale.errors import InputError

SCALE_KEYS = ("scale_mv", "mv_per_count")
GAIN_KEYS = ("gain", "adc_gain")  # counts per mV, or per what the units say
UNIT_KEYS = ("units", "unit")  # of which a gain gives the counts

_NUMBER_AND_UNIT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?)(.*)", re.IGNORECASE | re.DOTALL)
_ANY_MV = (1e3, 1.0, 1e-3, 1e-6)  # per V, mV, uV and nV, where no unit is given
_UPRIGHT = frozenset(("normal", "positive", "upright", "standard", "regular", "+"))
_TURNED = frozenset(("negative", "inverted", "reversed", "flipped", "-"))
_NO = frozenset(("false", "no", "none", "n", "f", "not", "raw", "normal"))
_EDGES = ("physicalmax", "physicalmin", "digitalmax", "digitalmin")  # as EDF gives a scale


def read_scale(fields: Fields, mv_per_count: float | None, n_leads: int) -> tuple[float, ...]:
    """mV per count of each row, from keys in lower case and --mv-per-count. Raises InputError where there is none."""
    option = None if mv_per_count is None else (mv_per_count,) * n_leads
    said, gain = only(fields, SCALE_KEYS), only(fields, GAIN_KEYS)
    scale_L, gain_L = _numbers(said, n_leads), _numbers(gain, n_leads)
    of_gain_L = None
    if gain_L is not None:
        of_gain_L = tuple(unit / one for unit, one in zip(_mv_per_unit(fields, n_leads), gain_L, strict=True))
    if said is not None and gain is not None and not _are_close(scale_L, of_gain_L):
        raise InputError(
            f"it says a scale of {str(said)[:40]} mV per count and a gain of {str(gain)[:40]} counts per "
            f"{str(only(fields, UNIT_KEYS) or 'mV')[:40]}, which is another; leave one out"
        )
    values = of_gain_L if said is None else scale_L
    if values is None:
        if option is None:
            raise InputError(
                f"its scale is {str(said if said is not None else gain)[:40]!r}; write mv_per_count, or gain in counts "
                f"per mV, one number above 0 or {n_leads}, into the JSON or give --mv-per-count"
            )
        return option
    return agreed("mv-per-count", option, values)


def _are_close(one_L: tuple[float, ...] | None, other_L: tuple[float, ...] | None) -> bool:
    if one_L is None or other_L is None:
        return False
    return all(map(is_close, one_L, other_L))


def is_close(one: float, other: float) -> bool:
    """Whether two scales are one, written with few digits."""
    return abs(one / other - 1) < 1e-3


def _mv_per_unit(fields: Fields, n_leads: int) -> tuple[float, ...]:
    """Of each row, what a gain gives counts of: mV where nothing is said.

    A word under ``unit`` that is no unit, such as a ward, says nothing. Raises InputError for other ``units``.
    """
    names_a_unit = _is_unit(fields.get("unit"))
    said = only(fields, UNIT_KEYS if names_a_unit else UNIT_KEYS[:1])
    units = said if isinstance(said, list) else ["mV" if said is None else said] * n_leads
    if len(units) != n_leads or not all(map(_is_unit, units)):
        raise InputError(f"its units are {str(said)[:60]}; write mV, uV or V, once or for each of {n_leads} rows")
    return tuple(parse_unit(unit) for unit in units)


def _is_unit(said: Any) -> bool:
    if isinstance(said, list):
        return all(isinstance(one, str) and _is_unit(one) for one in said)
    try:
        parse_unit(str(said))
    except InputError:
        return False
    return isinstance(said, str)


def _numbers(said: Any, n_leads: int) -> tuple[float, ...] | None:
    values = said if isinstance(said, list) else [said] * n_leads
    # float32 holds them on the way to the model
    if len(values) != n_leads or not all(is_number(value) and 1e-30 < value < 1e30 for value in values):
        return None
    return tuple(float(value) for value in values)


class _Statement(NamedTuple):
    """One number, word or truth value that a JSON says about amplitude."""

    path: str  # of keys
    whole: Any  # what stands under the key
    meaning: Meaning
    value: float | str | bool
    rows: tuple[int, ...]
    mv_of_row: dict[int, float]  # what a unit beside or around it is; NaN: a unit of something else

    @property
    def told(self) -> str:
        """On one line."""
        return f"{' '.join(self.path.split())[:80]} is {' '.join(str(self.whole)[:60].split())}"

    @property
    def number(self) -> float | None:
        return None if isinstance(self.value, bool | str) else self.value


class _Place(NamedTuple):
    """Where one stands in a JSON."""

    name: str  # of words of amplitude, as far as the keys around are made of them
    path: str
    whole: Any
    rows: tuple[int, ...]
    mv_of_row: dict[int, float]


def check_amplitude(
    fields: Fields, leads_L: Sequence[str], scale_L: Sequence[float], label_keys: Set[str] = frozenset()
) -> None:
    """Raises InputError for what a JSON says about amplitude that is not what the counts are read by.

    ``scale_L``: mV per count, that are read by. Labels are asked for nothing: their names are of diseases.
    """
    others = {key: value for key, value in fields.items() if key not in label_keys and squashed(key) != "labels"}
    top = _Place("", "", None, (*range(len(leads_L)),), {})
    statements = [*_statements(others, top, leads_L)]
    for one in statements:
        if reason := _REASONS[one.meaning.topic](one, scale_L):
            raise InputError(reason)
    units = [
        (one, mv)
        for one in statements
        if one.meaning.topic == "unit" and (mv := _mv(one)) is not None and not math.isnan(mv)
    ]
    if not any(_scale_takes_units(one) for one in statements):
        _check_units_alike(units, scale_L)
    _check_units_of_gains(units, statements)


def check_unit(fields: Fields, leads_L: Sequence[str], mv_per_value: float) -> None:
    """Raises InputError where values are said to be in another unit than the one that they are read in."""
    for statement in _statements(fields, _Place("", "", None, (*range(len(leads_L)),), {}), leads_L):
        mv = _mv(statement) if statement.meaning.topic == "unit" else None
        if mv is not None and not math.isnan(mv) and not is_close(mv, mv_per_value):
            raise InputError(
                f"its {statement.told}, but values are read as {mv_per_value:g} mV each; give --unit "
                f"{statement.value}, or correct what it says"
            )


def _scale_takes_units(one: _Statement) -> bool:
    """Whether it is a scale that units beside it belong to: its own name has none."""
    return one.meaning.topic == "scale" and one.meaning.mv is None and one.number is not None and bool(one.mv_of_row)


def _statements(value: Any, place: _Place, leads_L: Sequence[str]) -> Iterator[_Statement]:
    if isinstance(value, dict):
        yield from _in_object(value, place, leads_L)
    elif isinstance(value, list):
        each = [(row,) for row in place.rows] if len(value) == len(place.rows) else [place.rows] * len(value)
        for child, rows in zip(value, each, strict=True):
            yield from _statements(child, place._replace(rows=rows), leads_L)
    elif value is not None:
        name, said = _number_of(place.name, value)
        if said is not None and (about := meaning(name)) is not None:
            yield _Statement(place.path, place.whole, about, said, place.rows, place.mv_of_row)


def _in_object(fields: Fields, place: _Place, leads_L: Sequence[str]) -> Iterator[_Statement]:
    named = _rows_named(fields, leads_L) if place.path else None  # the whole JSON is about all leads
    rows = place.rows if named is None else named
    places = {
        key: _Place(
            name := joined(place.name, key),
            f"{place.path}.{key}" if place.path else key,
            child,
            _rows_of(name, leads_L, rows),
            place.mv_of_row,
        )
        for key, child in fields.items()
    }
    topics = {key: about.topic for key, at in places.items() if (about := meaning(at.name)) is not None}
    is_measured = meaning(place.name) is None and any(squashed(key) in ("value", "values") for key in fields)
    units = [
        one
        for key, topic in topics.items()
        if topic == "unit" and not is_measured  # such as the height of a wave
        for one in _statements(fields[key], places[key], leads_L)
    ]
    mv_of_row = place.mv_of_row | {row: mv for one in units if (mv := _mv(one)) is not None for row in one.rows}
    yield from units
    yield from _edges(fields, place._replace(rows=rows, mv_of_row=mv_of_row))
    for key, at in places.items():
        if topics.get(key) != "unit" and not _is_superseded(key, fields):
            yield from _statements(fields[key], at._replace(mv_of_row=mv_of_row), leads_L)


def _is_superseded(key: str, fields: Fields) -> bool:
    """Whether another key beside it makes it one that says nothing: as in WFDB headers, and of a wave's end."""
    other = {"adczero": "baseline", "offset": "onset"}.get(squashed(key))
    value = next((value for name, value in fields.items() if squashed(name) == other), None) if other else None
    return bool(value != []) and all(map(is_number, value if isinstance(value, list) else [value]))


def _rows_of(name: str, leads_L: Sequence[str], rows: tuple[int, ...]) -> tuple[int, ...]:
    lead = lead_of(name)
    return rows if lead is None else tuple(row for row in rows if leads_L[row] == lead)


def _rows_named(fields: Fields, leads_L: Sequence[str]) -> tuple[int, ...] | None:
    """Those of the lead that an object is about by its name; None where it names none."""
    for key in ("name", "lead", "channel", "label", "lead_name", "sig_name"):
        if isinstance(text := fields.get(key), str) and (lead := lead_of(squashed(text))) is not None:
            return tuple(row for row, other in enumerate(leads_L) if other == lead)
    return None


def _number_of(name: str, value: Any) -> tuple[str, float | str | bool | None]:
    """The number that is said, with the words after it in the name: ``5 uV/LSB`` as a scale. None: unknown."""
    if isinstance(value, bool):
        return name, value
    if isinstance(value, int | float):
        return name, None if value != value else as_float(value)
    if not is_known(value) and value.strip() not in _TURNED:
        return name, None
    matched = _NUMBER_AND_UNIT.fullmatch(value)
    if matched and meaning(longer := name + squashed(matched[2])) is not None:
        return longer, float(matched[1])
    return name, value.strip()


def _edges(fields: Fields, place: _Place) -> Iterator[_Statement]:
    """The scale, and the zero, of a physical and a digital range, as EDF has them."""
    told = {squashed(key): value for key, value in fields.items()}
    edges = [told.get(name, told.get(name.replace("ical", "").replace("ital", ""))) for name in _EDGES]
    numbers = [as_float(edge) for edge in edges if edge is not None and is_number(edge)]
    if len(numbers) < len(_EDGES) or numbers[2] == numbers[3]:
        return
    physical_max, physical_min, digital_max, digital_min = numbers
    per_count = (physical_max - physical_min) / (digital_max - digital_min)
    where = place._replace(path=f"{place.path}.physical_max".strip("."), whole=physical_max)
    yield _Statement(where.path, where.whole, Meaning("scale", None, "mv per count", False), per_count, *where[3:])
    zero = digital_min - physical_min / per_count if per_count else 0.0
    if abs(zero) > 1:  # EDF's own ranges are not symmetric: half a count is no offset
        yield _Statement(where.path, where.whole, Meaning("zero", None, "", False), zero, *where[3:])


def _mv(one: _Statement) -> float | None:
    """The mV of a unit. NaN: under ``units`` but no unit of volts; None: another word, as of a ward."""
    if one.number is not None and one.meaning.mv is not None:
        return one.number * one.meaning.mv or math.nan  # as in 0.5mV
    try:
        return parse_unit(str(one.value))
    except InputError:
        return math.nan if squashed(one.path.rpartition(".")[2]).endswith("units") else None


def _wrong_scale(one: _Statement, scale_L: Sequence[float]) -> str:
    if one.number is None:
        return ""
    for row in one.rows:
        if not any(is_close(scale, scale_L[row]) for scale in _scales(one, row)):
            return (
                f"its {one.told}, which is not the scale that counts are read by, "
                f"{scale_L[row]:g} mV per count; write the right one as mv_per_count, and leave out the other"
            )
    return ""


def _scales(one: _Statement, row: int) -> Iterator[float]:
    """mV per count, in all ways to understand it."""
    about, number = one.meaning, one.number
    if not number:
        return
    stated = one.mv_of_row.get(row) if about.mv is None else about.mv
    if stated is None or (math.isnan(stated) and not about.is_gain):
        units: tuple[float, ...] = (1.0,) if about.is_gain else _ANY_MV
    else:
        units = (stated,)
    for mv in units:
        if about.direction != "counts per mv":
            yield number * mv
        if about.direction != "mv per count":
            yield mv / number


def _wrong_zero(one: _Statement, scale_L: Sequence[float]) -> str:
    if not one.number:
        return ""
    return f"its {one.told}, so that 0 mV is not the count 0; subtract it from the counts, and write 0 or leave it out"


def _turned(one: _Statement, scale_L: Sequence[float]) -> str:
    """Under names such as polarity and inverted, of which ``sign`` may be a disease's."""
    word = str(one.value).casefold()
    if one.meaning.topic == "turned":
        is_upright = one.value in (0, False) or word in _NO | _UPRIGHT
    elif isinstance(one.value, str):
        is_sign = "sign" in squashed(one.path.rpartition(".")[2])
        is_upright = word not in _TURNED if is_sign else word in _UPRIGHT | _NO
    else:
        is_upright = one.value > 0
    if is_upright:
        return ""
    return f"its {one.told}, so that leads are upside down; turn the counts, and leave it out"


def _changed(one: _Statement, scale_L: Sequence[float]) -> str:
    word = str(one.value).casefold()
    is_changed = word not in _NO if isinstance(one.value, str) else one.value == 1
    if not is_changed:
        return ""
    return f"its {one.told}, so that counts are no mV; store the counts as they were recorded"


def _no_reason(one: _Statement, scale_L: Sequence[float]) -> str:
    return ""


_REASONS: dict[Topic, Callable[[_Statement, Sequence[float]], str]] = {
    "scale": _wrong_scale,
    "zero": _wrong_zero,
    "polarity": _turned,
    "turned": _turned,
    "changed": _changed,
    "unit": _no_reason,  # read with the scales beside it
}


def _check_units_of_gains(units: Sequence[tuple[_Statement, float]], statements: Sequence[_Statement]) -> None:
    """Raises InputError for a unit that stands elsewhere than a gain, and is not what the gain gives counts of."""
    gains = [one for one in statements if one.meaning.topic == "scale" and one.meaning.is_gain and one.number]
    mv_of_gains = {(row, one.mv_of_row.get(row, 1.0)) for one in gains if one.meaning.mv is None for row in one.rows}
    rows = {row for row, _ in mv_of_gains}
    for one, mv in units:
        if any(row in rows and (row, mv) not in mv_of_gains for row in one.rows):
            raise InputError(
                f"its {one.told}, which is not the unit that its gain is read by; write it as units beside the gain, "
                "or write mv_per_count for gain"
            )


def _check_units_alike(units: Sequence[tuple[_Statement, float]], scale_L: Sequence[float]) -> None:
    """Raises InputError where units of leads differ, and not as their scales do."""
    mv_of_row = {row: mv for one, mv in units for row in one.rows}
    ratios = [mv / scale_L[row] for row, mv in mv_of_row.items()]
    if ratios and not is_close(min(ratios), max(ratios)):
        raise InputError(
            f"its units differ from lead to lead, its scale of {min(scale_L):g} mV per count does not; write "
            f"mv_per_count: [{len(scale_L)} numbers], one for each row"
        )
