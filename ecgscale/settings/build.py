"""A tree of values becomes a checked dataclass."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from ecgscale import yaml_text
from ecgscale.errors import InputError
from ecgscale.settings.given import Given, read_file
from ecgscale.settings.names import field_at, unknown
from ecgscale.settings.options import alternatives, field_types, is_group, option_of, shown

Config = TypeVar("Config")


def build(config_type: type[Config], given: Given) -> Config:
    """A dataclass of what was given.

    Raises InputError for unknown keys (with the nearest right one), wrong types, values out of range, missing ones.
    """
    refuse_unknown(config_type, given)
    built: Config = _group(config_type, given.tree, given, "")
    return built


def from_tree(kind: type[Config], tree: dict[str, Any]) -> Config:
    """A dataclass of a JSON object; fields that it leaves out have their defaults. Raises InputError as ``build``."""
    return build(kind, Given(tree))


def read_texts(config_type: type, path: Path) -> Given:
    """What a YAML file gives, with text as it was written, ``time: 1:30:00``, and numbers where a field wants them.

    Raises InputError for unknown keys and for what is not YAML.
    """
    given = read_file(path, as_written=True)
    refuse_unknown(config_type, given)
    for names, value in list(given.leaves()):
        key = ".".join(map(str, names))
        hint, _ = field_at(config_type, key, given)
        if isinstance(value, str) and not is_group(hint) and int in alternatives(hint):
            given.put(key, yaml_text.parse(value, f"{given.place(key)}{key}"), given.origins[key])
    return given


def refuse_unknown(config_type: Any, given: Given) -> None:
    """Raises InputError for a key that no group of the tree has, wherever it stands."""
    _refuse_unknown_in(config_type, given.tree, given, "")


def _refuse_unknown_in(kind: Any, tree: dict[str, Any], given: Given, prefix: str) -> None:
    hints = field_types(kind)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InputError(f"{given.place(key)}{unknown(kind, str(name), prefix, given)}")
        for inner, item, where in _groups_in(hints[name], value, key):
            if not isinstance(item, dict):
                raise InputError(f"{given.place(key)}{where}: a group of keys, not the value {item!r}")
            _refuse_unknown_in(inner, item, given, f"{where}.")


def _groups_in(hint: Any, value: Any, key: str) -> list[tuple[Any, Any, str]]:
    """(type, value, key) of a group, or of each in a list of groups."""
    if is_group(hint):
        return [] if value is None else [(hint, value, key)]
    inner = [get_args(kind)[0] for kind in alternatives(hint) if get_origin(kind) is list]
    if inner and is_group(inner[0]) and isinstance(value, list):
        return [(inner[0], item, f"{key}[{number}]") for number, item in enumerate(value)]
    return []


def _group(kind: Any, tree: dict[str, Any], given: Given, prefix: str) -> Any:
    hints = field_types(kind)
    values: dict[str, Any] = {}
    for member in fields(kind):
        key = prefix + member.name
        if member.name not in tree:
            if is_group(hints[member.name]):
                values[member.name] = _group(hints[member.name], {}, given, f"{key}.")
            elif member.default is MISSING and member.default_factory is MISSING:
                raise InputError(_missing(kind, tree, prefix))
            continue
        values[member.name] = _value(hints[member.name], tree[member.name], given, key)
    try:
        return kind(**values)
    except InputError as error:
        place = given.place_of(str(error))
        if place and not str(error).startswith(place):
            raise InputError(f"{place}{error}") from error
        raise


def _missing(kind: Any, tree: dict[str, Any], prefix: str) -> str:
    without = [member for member in fields(kind) if member.default is MISSING and member.default_factory is MISSING]
    missing = [member for member in without if member.name not in tree]
    dashes = ["" if option_of(member).positional else "--" for member in missing]
    names = [prefix + dash + shown(member.name, member) for dash, member in zip(dashes, missing, strict=True)]
    return f"the following arguments are required: {', '.join(names)}"


class _OtherKind(Exception):  # noqa: N818 - no error: the next alternative is tried
    """A value is not of this type."""


def _value(hint: Any, value: Any, given: Given, key: str) -> Any:
    if value is None and not _takes(hint, NoneType):
        raise InputError(f"{given.named(key)}: a value is missing; give one or leave the key out")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{given.named(key)} {value}: give a finite number")
    if is_group(hint):
        return _group(hint, value, given, f"{key}.")
    if groups := _groups_in(hint, value, key):
        return [_group(kind, item, given, f"{where}.") for kind, item, where in groups]
    for kind in alternatives(hint):
        try:
            return _as(kind, value)
        except _OtherKind:
            continue
    raise InputError(f"{given.named(key)} {str(value)[:100]!r}: give {_in_words(hint)}")


def _as(kind: Any, value: Any) -> Any:
    """The value as one type without alternatives; raises _OtherKind."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _OtherKind
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _OtherKind
        return origin(_as_any(arguments[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise _OtherKind
        return {_as_any(arguments[0], name): _as_any(arguments[1], item) for name, item in value.items()}
    if kind is float:
        return _as_float(value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if type(value) is kind:
        return value
    raise _OtherKind


def _as_any(hint: Any, value: Any) -> Any:
    for kind in alternatives(hint):
        try:
            return _as(kind, value)
        except _OtherKind:
            continue
    raise _OtherKind


def _as_float(value: Any) -> float:
    """Numbers, and text that is one: YAML 1.1 takes 5e-5 for text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _OtherKind
    return float(value)


def _takes(hint: Any, kind: Any) -> bool:
    return kind in alternatives(hint) or hint is Any


_WORDS = {int: "a whole number (int)", float: "a number (float)", bool: "true or false (bool)", str: "text"}


def _in_words(hint: Any) -> str:
    """What would be right, for people."""
    parts = []
    for kind in alternatives(hint):
        if kind is NoneType:
            continue
        if get_origin(kind) is Literal:
            parts.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif get_origin(kind) in (list, tuple):
            parts.append(f"a list of {_in_words(get_args(kind)[0]).removeprefix('a ')}")
        elif get_origin(kind) is dict:
            parts.append(f"names, each with {_in_words(get_args(kind)[1])}")
        else:
            parts.append(_WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}"))
    return " or ".join(parts)
