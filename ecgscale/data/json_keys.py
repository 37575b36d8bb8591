"""The JSON of others: what stands under a name, in any case and at any depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence, Set
from functools import lru_cache
from typing import Any, TypeVar

from ecgscale.errors import InputError

T = TypeVar("T")
_HERTZ = re.compile(r"\s*(\d+\.?\d*)\s*(?:hz)?\s*", re.IGNORECASE)
Fields = dict[str, Any]


def objects_in(fields: Fields) -> Iterator[Fields]:
    """The JSON itself, and all objects in it, also in lists."""
    yield fields
    for value in fields.values():
        yield from _objects_within(value)


def _objects_within(value: Any) -> Iterator[Fields]:
    if isinstance(value, dict):
        yield from objects_in(value)
    elif isinstance(value, list):
        for child in value:
            yield from _objects_within(child)


@lru_cache(maxsize=1 << 14)
def squashed(key: str) -> str:
    """Without case, and without what stands between words; a stroke, as in uV/LSB, is per."""
    return "".join(letter for letter in key.casefold().replace("/", "per") if letter.isalnum())


def numbers_in(value: Any) -> Iterator[float]:
    """The number, or all numbers of a list or an object; texts such as ``500`` and ``500 Hz`` are numbers too."""
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(child)
    elif isinstance(value, str):
        if matched := _HERTZ.fullmatch(value):
            yield float(matched[1])
    elif is_number(value) and value == value:
        yield as_float(value)


def as_float(number: float) -> float:
    """JSON has integers that no float holds."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def under_names(fields: Fields, names: Set[str]) -> Fields:
    """What stands under the names, in any case. Raises InputError where two spellings of one name contradict."""
    told: Fields = {}
    for key, value in fields.items():
        if value is None or (name := folded(key)) not in names:
            continue
        if (first := told.setdefault(name, value)) != value and first is not value:  # NaN is another than itself
            raise InputError(f"it says {name} twice, {str(told[name])[:40]!r} and {str(value)[:40]!r}; leave one out")
    return told


def folded(key: str) -> str:
    return key.strip().casefold()


def agreed(name: str, option: T | None, said: T | None) -> T:
    if option is not None and said is not None and option != said:
        raise InputError(f"its JSON says {said}, --{name} says {option}; leave out the option or correct the JSON")
    value = said if option is None else option
    assert value is not None
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def only(fields: Fields, keys: Sequence[str]) -> Any:
    """What stands under the keys. Raises InputError where two of them say different things."""
    told = {key: fields[key] for key in keys if fields.get(key) is not None}
    for key, value in told.items():
        first = next(iter(told))
        if _comparable(value) != _comparable(told[first]):
            raise InputError(f"it says {first} {str(told[first])[:40]!r} and {key} {str(value)[:40]!r}; leave one out")
    return next(iter(told.values()), None)


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return [_comparable(one) for one in value]
    return folded(value) if isinstance(value, str) else value
