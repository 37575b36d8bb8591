"""Groups of config keys whose class one of the keys names: ``objective.name`` says which keys ``objective.*`` has.

In a config's dataclass such a group is a field with a `Choice` as its default factory, of the type that all of its
classes derive from; ``resolved`` puts the named ones in their places. A name with a colon is imported here, so names
are given to ``resolved`` that the user has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from typing import Any

from ecgscale.errors import InputError
from ecgscale.registry import Registry
from ecgscale.settings import field_types


@dataclass(frozen=True)
class Choice:
    """One such group."""

    base: type
    """What the classes of its keys derive from."""
    registry: Registry[Any]
    """Of what the classes configure; its key is that of the config, such as ``objective.name``."""
    usual: str
    """The name where none is given."""
    written_before: frozenset[str] = frozenset()
    """Keys, not all of one class, that earlier versions wrote into the config of each run."""

    @property
    def key(self) -> str:
        """The key of the group that names the class."""
        return self.registry.key.rpartition(".")[2]

    def __call__(self) -> Any:
        """The group of keys where nothing is given."""
        return self.keys(self.usual)(**{self.key: self.usual})

    def keys(self, name: str) -> type:
        """The dataclass of the keys of a named class. Raises InputError for a class without a fitting one."""
        kind = self.registry.find(name)
        config: Any = kind.Config
        if not is_dataclass(config) or not isinstance(config, type) or not issubclass(config, self.base):
            raise InputError(
                f"{self.registry.key} {name!r}: its Config is no dataclass that derives from "
                f"{self.base.__module__}.{self.base.__qualname__}"
            )
        for member in fields(config):
            if member.name != self.key and member.default is MISSING and member.default_factory is MISSING:
                raise InputError(f"{self.registry.key} {name!r}: its Config gives {member.name} no default")
        return config

    def owners(self, key: str) -> list[str]:
        """Those of ours that have a key."""
        return [name for name in self.registry if key in _names(self.keys(name))]


def choices_of(config_type: type) -> dict[str, Choice]:
    """The groups of a config that are chosen by name."""
    factories = {member.name: member.default_factory for member in fields(config_type)}
    return {name: factory for name, factory in factories.items() if isinstance(factory, Choice)}


def named(config_type: type, tree: Mapping[str, Any]) -> dict[str, str]:
    """What a tree names, by group."""
    names = {}
    for group, choice in choices_of(config_type).items():
        given = tree.get(group)
        if isinstance(given, dict) and given.get(choice.key) is not None:
            names[group] = given[choice.key]
    return names


def dotted(config_type: type) -> dict[str, str]:
    """The keys that choose, such as ``objective.name``, with the group of each."""
    return {f"{group}.{choice.key}": group for group, choice in choices_of(config_type).items()}


def resolved(config_type: type, names: Mapping[str, str]) -> type:
    """The config's type with the classes that are named, or the usual ones; as it is where nothing is to choose.

    Raises InputError for a name that is unknown, cannot be imported or does not fit.
    """
    chosen = {group: names.get(group, choice.usual) for group, choice in choices_of(config_type).items()}
    for group, choice in choices_of(config_type).items():
        choice.keys(chosen[group])
    return _with_classes(config_type, tuple(chosen.items())) if chosen else config_type


@cache
def _with_classes(config_type: type, chosen: tuple[tuple[str, str], ...]) -> type:
    names, choices, types = dict(chosen), choices_of(config_type), field_types(config_type)
    members: list[tuple[str, Any, Any]] = []
    for member in fields(config_type):
        if choice := choices.get(member.name):
            kind = choice.keys(names[member.name])
            named_one = replace(choice, usual=names[member.name])
            members.append((member.name, kind, field(default_factory=named_one)))
        elif member.default_factory is not MISSING:
            members.append((member.name, types[member.name], field(default_factory=member.default_factory)))
        else:
            members.append((member.name, types[member.name], field(default=member.default)))
    return make_dataclass(config_type.__name__, members, frozen=True, namespace={"__doc__": config_type.__doc__})


def belonging_elsewhere(config_type: type, keys: type, key: str, prefix: str) -> str:
    """Whose key it is, where it is one of another class of ours; "" where it is nobody's.

    ``keys`` is the class that does not have it, which stands at ``prefix`` in the config.
    """
    choice = choices_of(config_type).get(prefix.removesuffix("."))
    owners = choice.owners(key) if choice else []
    if choice is None or not owners:
        return ""
    own = next((member.default for member in fields(keys) if member.name == choice.key), MISSING)
    name = own if own is not MISSING else f"{keys.__module__}:{keys.__qualname__.removesuffix('.Config')}"
    return f"{prefix}{key} belongs to {_listed(owners)}, not to {name}"


def fitting(config_type: type, tree: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tree with those keys alone that the named classes have."""
    kept = dict(tree)
    for group, choice in choices_of(config_type).items():
        if isinstance(tree.get(group), dict):
            own = _names(choice.keys(names.get(group, choice.usual)))
            kept[group] = {key: value for key, value in tree[group].items() if key in own}
    return kept


def current(config_type: type, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved config of a run as this version writes it: without keys of classes of ours that it does not name.

    Earlier versions wrote the keys of all objectives, or of all tasks, into each config. Nothing is imported that is
    not ours.
    """
    kept, names = dict(saved), named(config_type, saved)
    for group, choice in choices_of(config_type).items():
        name = names.get(group, choice.usual)
        if isinstance(saved.get(group), dict) and name in choice.registry:
            own = _names(choice.keys(name))
            kept[group] = {key: value for key, value in saved[group].items() if key in own or not choice.owners(key)}
    return kept


def is_saved_before(config_type: type, tree: Mapping[str, Any]) -> bool:
    """Whether an earlier version has written a config, as it did into run folders."""
    for group, choice in choices_of(config_type).items():
        given = tree.get(group)
        if choice.written_before and isinstance(given, dict) and given.keys() >= choice.written_before:
            return True
    return False


def _names(kind: type) -> set[str]:
    return {member.name for member in fields(kind)}


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
