"""A command line becomes a tree of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin

from ecgscale import yaml_text
from ecgscale.errors import InputError
from ecgscale.settings.given import Elsewhere, Given, nowhere, read_file
from ecgscale.settings.names import field_at, key_of
from ecgscale.settings.options import alternatives, field_types, is_group, metavar, option_of, places

_NO_SHORT: Mapping[str, str] = MappingProxyType({})
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")  # as YAML has them


def from_words(
    config_type: type,
    words: list[str],
    short: Mapping[str, str] = _NO_SHORT,
    file: Callable[[Path], Given] = read_file,
    elsewhere: Elsewhere = nowhere,
) -> Given:
    """A command line -> what it gives; ``--config FILE`` reads a YAML file in its place. Raises InputError.

    ``short`` has other names of keys.
    """
    letters = {f"-{option_of(member).letter}": f"--{member.name}" for member in fields(config_type)}
    given, rest = Given(elsewhere=elsewhere), [letters.get(word, word) for word in words]
    waiting = places(config_type)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and len(word) > 2:
            _take_option(config_type, given, word, rest, short, file)
        elif waiting:
            member = waiting.pop(0)
            taken = [word]
            while option_of(member).several and rest and not rest[0].startswith("--"):
                taken.append(rest.pop(0))
            given.put(member.name, taken if option_of(member).several else word, f"--{member.name}")
        else:
            raise InputError(f"unexpected argument {word!r}; options begin with --")
    return given


def take_known(kind: Any, words: Sequence[str]) -> tuple[Given, list[str]]:
    """What a command line gives of a dataclass's options, and the words that are none of them, in their order.

    Raises InputError for an option without its value.
    """
    given, rest, others = Given(), list(words), []
    own = {member.name for member in fields(kind)}
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and key_of(kind, word[2:].partition("=")[0]) in own:
            _take_option(kind, given, word, rest, _NO_SHORT, read_file)
        else:
            others.append(word)
    return given, others


def _take_option(
    config_type: type,
    given: Given,
    word: str,
    rest: list[str],
    short: Mapping[str, str],
    file: Callable[[Path], Given],
) -> None:
    written, equals, value = word[2:].partition("=")
    key = short.get(written, key_of(config_type, written))
    if key == "config":
        if not equals and not rest:
            raise InputError("--config: a value is missing; give --config FILE")
        given.update(file(Path(value if equals else rest.pop(0))))
        return
    hint, member = field_at(config_type, key, given)
    how, origin = option_of(member), f"--{key if '.' in key else written}"
    if is_dataclass(hint):
        inside = ", ".join(f"{origin}.{member.name}" for member in fields(hint))
        raise InputError(f"{origin}: a group of keys; give one of {inside}")
    follows = bool(rest) and not rest[0].startswith("--")
    if equals:
        words = [value]
    elif hint is bool and not (follows and (rest[0].casefold() in _BOOLEANS or _is_tree(config_type))):
        words = ["true"]
    elif how.without_value and not follows:
        words = [how.without_value]
    elif not follows:
        raise InputError(f"{origin}: a value is missing; give {origin} {metavar(member, hint)}")
    else:
        words = [rest.pop(0)]
        while how.several and rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
    separate = how.several or how.whole
    read: Any = _each_from_text(hint, words, origin) if separate else _from_text(hint, words[0], origin)
    if how.repeated:
        before = given.get(key, [])
        read = [*before, *(read if isinstance(read, list) else [read])]
    given.put(key, read, origin)


def _is_tree(kind: Any) -> bool:
    """Whether all words are keys with values: then what follows a key is its value, right or wrong."""
    return not places(kind) and any(map(is_group, field_types(kind).values()))


def _from_text(hint: Any, text: str, origin: str) -> Any:
    """A word of a command line as YAML would have it, by the type of its field."""
    kinds = [kind for kind in alternatives(hint) if kind is not NoneType]
    if kinds and all(kind in (str, Path) for kind in kinds):
        return text
    if all(get_origin(kind) in (list, tuple) for kind in kinds) and not text.startswith("["):
        return [item for item in text.split(",") if item]
    return yaml_text.parse(text, f"{origin}: cannot read the value {text[:100]!r}")


def _each_from_text(hint: Any, words: list[str], origin: str) -> list[Any]:
    """Words of a command line that are a list together; one of lists, where the option may be given again."""
    (items,) = {get_args(kind)[0] for kind in alternatives(hint) if get_origin(kind) in (list, tuple)}
    if get_origin(items) is list:
        return [_each_from_text(items, words, origin)]
    return [_from_text(items, word, origin) for word in words]
