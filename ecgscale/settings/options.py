"""What the fields of a dataclass say: its keys, their types, and what a command line has to know of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_OPTION = "option"  # key of a field's metadata


@dataclass(frozen=True)
class Option:
    """What a command line knows of a field beside its type."""

    positional: bool = False
    """Given by its place, without a name."""
    several: bool = False
    """Takes all words up to the next option."""
    repeated: bool = False
    """Given again, it adds to what was given before."""
    whole: bool = False
    """A list, of which each word is one item with its commas."""
    metavar: str = ""
    """Stands for the value in the help."""
    name: str = ""
    """On the command line, where it is another than the field's."""
    letter: str = ""
    """Short for the name: ``-f``."""
    without_value: str = ""
    """What the option means where no value follows."""
    resumable: bool = False
    """A run goes on with another value."""


def option(default: Any = MISSING, *, default_factory: Any = MISSING, **what: Any) -> Any:
    """A dataclass field with an `Option`."""
    metadata = {_OPTION: Option(**what)}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(member: Field[Any]) -> Option:
    chosen: Option = member.metadata.get(_OPTION, Option())
    return chosen


def field_types(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return _field_types(kind)


@cache  # Python compiles each annotation anew when it is asked
def _field_types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {member.name: hints[member.name] for member in fields(kind)}


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_group(hint: Any) -> bool:
    return is_dataclass(hint) and isinstance(hint, type)


def places(kind: Any) -> list[Field[Any]]:
    """Fields that are given by their place."""
    return [member for member in fields(kind) if option_of(member).positional]


def all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a tree."""
    hints = field_types(kind)
    for member in fields(kind):
        if is_group(hints[member.name]):
            yield from all_keys(hints[member.name], f"{prefix}{member.name}.")
        else:
            yield prefix + member.name


def resumable_keys(config: Any) -> set[str]:
    """Dotted keys of a config with which a run may go on changed: how it is computed and written down, how long."""
    keys: set[str] = set()
    for member in fields(config):
        value = getattr(config, member.name)
        if is_dataclass(value):
            keys |= {f"{member.name}.{key}" for key in resumable_keys(value)}
        elif option_of(member).resumable:
            keys.add(member.name)
    return keys


def shown(key: str, member: Field[Any]) -> str:
    return option_of(member).name or key


def metavar(member: Field[Any], hint: Any) -> str:
    """What stands for the value of an option."""
    about = option_of(member)
    if about.metavar:
        return about.metavar
    if hint is bool:
        return "true"
    if any(get_origin(kind) in (list, tuple) for kind in alternatives(hint)):
        return "A [B ...]" if about.several else "A,B"
    return member.name.upper()
