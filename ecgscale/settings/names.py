"""Which field a name of the user's means, and what to say where it means none."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from ecgscale.errors import InputError
from ecgscale.settings.given import Given
from ecgscale.settings.options import all_keys, field_types, is_group, option, option_of, shown

_OWN_NAME = option(metavar="VALUE")  # stands for the entries of a mapping, whose names are the user's own


def key_of(config_type: Any, written: str) -> str:
    """The dotted key of an option's name: ``rate-hz`` is ``rate_hz``, and a field may have another name there."""
    for member in fields(config_type):
        if option_of(member).name == written:
            return member.name
    kind, parts = config_type, written.split(".")
    for place, part in enumerate(parts):
        if not is_dataclass(kind):
            break  # names of the user's own
        parts[place] = part.replace("-", "_")
        kind = field_types(kind).get(parts[place])
    return ".".join(parts)


def field_at(config_type: Any, key: str, given: Given) -> tuple[Any, Field[Any]]:
    """The type and the field of a dotted key; raises InputError where there is none."""
    kind, prefix = config_type, ""
    hint: Any = None
    member: Field[Any] | None = None
    for name in key.split("."):
        if get_origin(kind) is dict:  # names of the user's own
            return get_args(kind)[1], _OWN_NAME
        if not is_dataclass(kind):
            raise InputError(f"unknown key {key}; {prefix.rstrip('.')} is no group of keys")
        member = next((other for other in fields(kind) if other.name == name), None)
        if member is None:
            raise InputError(unknown(kind, name, prefix, given))
        hint = kind = field_types(kind)[name]
        prefix += f"{name}."
    assert member is not None
    return hint, member


def unknown(kind: Any, name: str, prefix: str, given: Given) -> str:
    """What to say of a key that a group does not have: unknown, with the nearest right one or all of them."""
    if not prefix and not any(is_group(hint) for hint in field_types(kind).values()):
        known = [f"--{shown(member.name, member).replace('_', '-')}" for member in fields(kind)]
        name = f"--{name.replace('_', '-')}"
        near = get_close_matches(name, known, 1)
        return f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    known = [member.name for member in fields(kind)]
    near = get_close_matches(name, known, 1) or [key for key in all_keys(kind) if key.endswith(f".{name}")]
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(prefix + member for member in known)}"
    return given.elsewhere(kind, name, prefix) or f"unknown key {prefix}{name}; {hint}"
