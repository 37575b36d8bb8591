"""Dataclasses from JSON: what was written as ``asdict`` says is read back, with every value of its field's type."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ecgscale.errors import InputError

Built = TypeVar("Built")


def from_tree(kind: type[Built], tree: dict[str, Any]) -> Built:
    """The dataclass that a JSON object says; fields that it leaves out have their defaults.

    Raises InputError that begins with the key for a value of another type, a key that is none, and one that is missing.
    """
    hints = get_type_hints(kind)
    if unknown := next((key for key in tree if key not in hints), None):
        raise InputError(f"{unknown[:80]}: unknown key")
    values = {}
    for each in fields(kind):  # type: ignore[arg-type]  # any dataclass
        if each.name in tree:
            values[each.name] = _value(each.name, tree[each.name], hints[each.name])
        elif each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{each.name} is missing")
    return kind(**values)


def _value(key: str, value: Any, hint: Any) -> Any:
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        try:
            return from_tree(hint, value)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
    if get_origin(hint) is list and isinstance(value, list):
        (of_each,) = get_args(hint)
        return [_value(f"{key}[{number}]", each, of_each) for number, each in enumerate(value)]
    if not _fits(value, hint):
        raise InputError(f"{key} is {repr(value)[:200]}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values())
    return type(value) is hint or (hint is type(None) and value is None)
