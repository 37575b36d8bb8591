"""The help of a command, from the dataclass that its options become."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from ecgscale.settings.options import alternatives, field_types, is_group, metavar, option_of, places


@cache
def documentation(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, of its bases too."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in pairwise(body.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
            ):
                assert isinstance(after.value, ast.Constant)
                texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts


More = Mapping[str, Sequence[tuple[Field[Any], type]]]
"""By group, keys that it has where another class stands there, with the class that has each."""


def help_text(
    config_type: Any,
    command: str,
    description: str = "",
    short: bool = False,
    more: More = MappingProxyType({}),
    owners: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Usage, and every key with its meaning, type and default. ``short``: a command without groups of keys.

    ``owners`` says of dotted keys whose they are, where that is not everybody's.
    """
    positional = places(config_type)
    words = " ".join(_name_of(member, False).upper() + " ..." * option_of(member).several for member in positional)
    options = "[--option VALUE ...]" if short else "[--config FILE] [--any.key VALUE ...]"
    lines = [f"usage: {command} {words}{' ' if words else ''}{options}", ""]
    lines += [inspect.cleandoc(description or config_type.__doc__ or ""), ""]
    if positional:
        lines += ["arguments:", *(_entry(_name_of(member, False), member, config_type) for member in positional), ""]
    if not short:
        lines += [_wrapped("--config FILE", "YAML file with any of these keys; later arguments win"), ""]
    lines += _help_of(config_type, "", short, more, owners)
    return "\n".join(lines).rstrip()


def own_options(kind: Any) -> str:
    """The options of a command that has a config too, below a line that says what they are."""
    heading, *options = _help_of(kind, "", True, MappingProxyType({}), MappingProxyType({}))
    return "\n".join([f"{inspect.cleandoc(kind.__doc__ or heading).rstrip('.')}:", *options]).rstrip()


def _help_of(kind: Any, prefix: str, dashed: bool, more: More, owners: Mapping[str, str]) -> list[str]:
    hints = field_types(kind)
    named = [member for member in fields(kind) if not option_of(member).positional]
    own = [(member, kind) for member in named if not is_group(hints[member.name])]
    own += more.get(prefix.rstrip("."), ())
    lines = []
    if own:
        heading = (kind.__doc__ or "").strip().splitlines()[0].rstrip(".") if prefix else "options"
        lines.append(f"{heading}:")
        for member, owner in own:
            lines.append(
                _entry(f"--{prefix}{_name_of(member, dashed)}", member, owner, dashed, owners.get(prefix + member.name))
            )
        lines.append("")
    for member in fields(kind):
        if is_group(hints[member.name]):
            lines += _help_of(hints[member.name], f"{prefix}{member.name}.", False, more, owners)
    return lines


def _name_of(member: Field[Any], dashed: bool) -> str:
    name = option_of(member).name or (member.name.replace("_", "-") if dashed else member.name)
    return f"{name}, -{option_of(member).letter}" if option_of(member).letter else name


def _entry(name: str, member: Field[Any], kind: Any, bare: bool = False, whose: str | None = None) -> str:
    """``bare``: a flag needs no value."""
    hint = field_types(kind)[member.name]
    text = (f"[{whose}] " if whose else "") + documentation(kind).get(member.name, "")
    default = member.default_factory() if member.default_factory is not MISSING else member.default
    if option_of(member).positional:
        return _wrapped(name, text)
    told = [] if hint is bool and bare else [f"default: {_default_in_words(default)}"]
    if default is MISSING:
        told = ["required"]
    kinds = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in alternatives(hint)]
    if choices := [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]:
        told.insert(0, f"one of {', '.join(map(str, choices))}")
    value = "" if hint is bool and bare else f" {metavar(member, hint)}"
    return _wrapped(name + value, f"{text} ({'; '.join(told)})" if told else text)


def _default_in_words(default: Any) -> str:
    if default in (None, "", [], (), {}):
        return "none"
    if isinstance(default, list | tuple):
        return ",".join(map(_default_in_words, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _wrapped(name: str, text: str) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    indent = 24
    lines = textwrap.wrap(text, width - indent)
    if len(name) + 4 > indent or not lines:
        return "\n".join([f"  {name}", *(" " * indent + line for line in lines)])
    return "\n".join([f"  {name:<{indent - 3}} {lines[0]}", *(" " * indent + line for line in lines[1:])])
