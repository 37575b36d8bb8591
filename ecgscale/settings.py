"""From words to dataclasses: command lines and YAML files become checked trees that know where each value was written.

A dataclass says everything: its fields are the keys, the text under a field is its help, ``__post_init__`` its checks.
A field whose type is a dataclass is a group of keys, ``train.steps``. ``option`` adds what a command line has to know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ecgscale import yaml_text
from ecgscale.errors import InputError

Config = TypeVar("Config")
_OPTION = "option"  # key of a field's metadata
_NO_SHORT: Mapping[str, str] = MappingProxyType({})
_BOOLEANS = ("true", "false", "yes", "no", "on", "off")  # as YAML has them


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


def field_types(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return _field_types(kind)


@cache  # Python compiles each annotation anew when it is asked
def _field_types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {member.name: hints[member.name] for member in fields(kind)}


def option_of(member: Field[Any]) -> Option:
    chosen: Option = member.metadata.get(_OPTION, Option())
    return chosen


# -- what was given --------------------------------------------------------------------------------------------------


Elsewhere = Callable[[type, str, str], str]
"""(group, key, prefix) -> whose key it is, where a group does not have it but another that could stand there."""


def _nowhere(group: type, key: str, prefix: str) -> str:
    return ""


class Given:
    """A tree of values, each with the place where it was written: ``--train.steps`` or ``base.yaml, line 7``."""

    def __init__(self, tree: dict[str, Any] | None = None, elsewhere: Elsewhere = _nowhere) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.elsewhere = elsewhere
        for name, value in (tree or {}).items():
            self._set((name,), value, "")

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key; a later value wins, and groups are merged."""
        self._set(tuple(key.split(".")), value, origin)

    def _set(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        """Set the value at a path of names, of which those of a mapping of the user's own may have dots."""
        if isinstance(value, dict) and value:
            for name, child in value.items():
                self._set((*path, name), child, origin)
            return
        into = self.tree
        for group in path[:-1]:
            if not isinstance(into.get(group), dict):
                into[group] = {}
            into = into[group]
        into[path[-1]] = value
        self.origins[".".join(map(str, path))] = origin

    def update(self, other: Given) -> None:
        """Set all that another one gives."""
        for path, value in other._leaves():
            self._set(path, value, other.origins.get(".".join(map(str, path)), ""))

    def _leaves(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        waiting: list[tuple[tuple[str, ...], Any]] = [((name,), value) for name, value in reversed(self.tree.items())]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, dict) and value:
                waiting += [((*path, name), child) for name, child in reversed(value.items())]
            else:
                yield path, value

    def dotted(self) -> dict[str, Any]:
        """Each dotted key with its value, as it was written."""
        return {".".join(map(str, path)): value for path, value in self._leaves()}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, as it was written."""
        value: Any = self.tree
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                return default
            value = value[name]
        return value

    def place(self, key: str) -> str:
        """``base.yaml, line 7: `` where a file gave the key or the group that it stands in, else nothing."""
        key = key.partition("[")[0]
        inside = next((origin for other, origin in self.origins.items() if other.startswith(f"{key}.")), "")
        while key:
            origin = self.origins.get(key, "") or inside
            if origin and not origin.startswith("--"):
                return f"{origin}: "
            if origin:
                return ""
            key = key.rpartition(".")[0]
        return ""

    def place_of(self, error: str) -> str:
        """Where a file gave the first key that an error names and that was given.

        It may begin with a key that has its default and does not go with another, which a file gave.
        """
        first, *others = re.findall(r"[\w.]+", error) or [""]
        if any(key.startswith(f"{first}.") for key in self.origins):  # a group, or names of the user's own
            return self.place(first)
        return next((self.place(key) for key in (first, *others) if self.origins.get(key)), "")

    def named(self, key: str) -> str:
        """A key for an error: with its file and line, or as the option that it was."""
        option_name = self.origins.get(key, "") if "." not in key else ""
        return option_name if option_name.startswith("--") else self.place(key) + key


def read_file(path: Path, as_written: bool = False) -> Given:
    """What a YAML file gives; ``as_written`` keeps scalars as text."""
    tree, lines = yaml_text.read_with_lines(path, as_written)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of keys, this is {type(tree).__name__}")
    given = Given({str(key): value for key, value in tree.items()})
    given.origins = {key: f"{path}, line {lines[key]}" if key in lines else str(path) for key in given.origins}
    return given


def read_texts(config_type: type, path: Path) -> Given:
    """What a YAML file gives, with text as it was written, ``time: 1:30:00``, and numbers where a field wants them.

    Raises InputError for unknown keys and for what is not YAML.
    """
    given = read_file(path, as_written=True)
    refuse_unknown(config_type, given)
    for names, value in list(given._leaves()):
        key = ".".join(map(str, names))
        hint, _ = _field_at(config_type, key, given)
        if isinstance(value, str) and not is_group(hint) and int in alternatives(hint):
            given.put(key, yaml_text.parse(value, f"{given.place(key)}{key}"), given.origins[key])
    return given


def from_words(
    config_type: type,
    words: list[str],
    short: Mapping[str, str] = _NO_SHORT,
    file: Callable[[Path], Given] = read_file,
    elsewhere: Elsewhere = _nowhere,
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


def take_known(kind: type[Config], words: Sequence[str]) -> tuple[Given, list[str]]:
    """What a command line gives of a dataclass's options, and the words that are none of them, in their order.

    Raises InputError for an option without its value.
    """
    given, rest, others = Given(), list(words), []
    own = {member.name for member in fields(kind)}  # type: ignore[arg-type]
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and _key_of(kind, word[2:].partition("=")[0]) in own:
            _take_option(kind, given, word, rest, _NO_SHORT, read_file)
        else:
            others.append(word)
    return given, others


def places(kind: Any) -> list[Field[Any]]:
    """Fields that are given by their place."""
    return [member for member in fields(kind) if option_of(member).positional]


def _take_option(
    config_type: type,
    given: Given,
    word: str,
    rest: list[str],
    short: Mapping[str, str],
    file: Callable[[Path], Given],
) -> None:
    written, equals, value = word[2:].partition("=")
    key = short.get(written, _key_of(config_type, written))
    if key == "config":
        if not equals and not rest:
            raise InputError("--config: a value is missing; give --config FILE")
        given.update(file(Path(value if equals else rest.pop(0))))
        return
    hint, member = _field_at(config_type, key, given)
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


# -- a checked tree --------------------------------------------------------------------------------------------------


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


def refuse_unknown(config_type: Any, given: Given) -> None:
    """Raises InputError for a key that no group of the tree has, wherever it stands."""
    _refuse_unknown_in(config_type, given.tree, given, "")


def _refuse_unknown_in(kind: Any, tree: dict[str, Any], given: Given, prefix: str) -> None:
    hints = field_types(kind)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InputError(f"{given.place(key)}{_unknown(kind, str(name), prefix, given)}")
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


class _OtherKind(Exception):  # noqa: N818 - no error: the next alternative is tried
    """A value is not of this type."""


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


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _takes(hint: Any, kind: Any) -> bool:
    return kind in alternatives(hint) or hint is Any


def is_group(hint: Any) -> bool:
    return is_dataclass(hint) and isinstance(hint, type)


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


def _missing(kind: Any, tree: dict[str, Any], prefix: str) -> str:
    without = [member for member in fields(kind) if member.default is MISSING and member.default_factory is MISSING]
    missing = [member for member in without if member.name not in tree]
    dashes = ["" if option_of(member).positional else "--" for member in missing]
    names = [prefix + dash + _shown(member.name, member) for dash, member in zip(dashes, missing, strict=True)]
    return f"the following arguments are required: {', '.join(names)}"


_OWN_NAME = option(metavar="VALUE")  # stands for the entries of a mapping, whose names are the user's own


# -- names of keys ---------------------------------------------------------------------------------------------------


def all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a tree."""
    hints = field_types(kind)
    for member in fields(kind):
        if is_group(hints[member.name]):
            yield from all_keys(hints[member.name], f"{prefix}{member.name}.")
        else:
            yield prefix + member.name


def _unknown(kind: Any, name: str, prefix: str, given: Given) -> str:
    """What to say of a key that a group does not have: unknown, with the nearest right one or all of them."""
    if not prefix and not any(is_group(hint) for hint in field_types(kind).values()):
        known = [f"--{_shown(member.name, member).replace('_', '-')}" for member in fields(kind)]
        name = f"--{name.replace('_', '-')}"
        near = get_close_matches(name, known, 1)
        return f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    known = [member.name for member in fields(kind)]
    near = get_close_matches(name, known, 1) or [key for key in all_keys(kind) if key.endswith(f".{name}")]
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(prefix + member for member in known)}"
    return given.elsewhere(kind, name, prefix) or f"unknown key {prefix}{name}; {hint}"


def _key_of(config_type: Any, written: str) -> str:
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


def _shown(key: str, member: Field[Any]) -> str:
    return option_of(member).name or key


def _field_at(config_type: Any, key: str, given: Given) -> tuple[Any, Field[Any]]:
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
            raise InputError(_unknown(kind, name, prefix, given))
        hint = kind = field_types(kind)[name]
        prefix += f"{name}."
    assert member is not None
    return hint, member


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
