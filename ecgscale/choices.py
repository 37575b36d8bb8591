"""Groups of config keys whose class one of the keys names: ``objective.name`` says which keys ``objective.*`` has.

In a config's dataclass such a group has the type that all of its classes derive from; ``resolved`` puts the named ones
in their places. A name with a colon is imported here, so names are given to ``resolved`` that the user has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache, partial
from typing import Any

from ecgscale import downstream, model, objectives
from ecgscale.downstream import TASKS
from ecgscale.downstream.task import WRITTEN_BEFORE, TaskConfig
from ecgscale.errors import InputError
from ecgscale.model import ENCODERS, EncoderConfig
from ecgscale.objectives import OBJECTIVES, ObjectiveConfig
from ecgscale.registry import Registry
from ecgscale.settings import field_types


@dataclass(frozen=True)
class Choice:
    """One such group."""

    base: type
    """What the classes of its keys derive from."""
    key: str
    """The key of the group that names the class."""
    registry: Registry[Any]
    usual: str
    """The name where none is given."""
    written_before: frozenset[str] = frozenset()
    """Keys, not all of one class, that earlier versions wrote into the config of each run."""

    def keys(self, name: str) -> type:
        """The dataclass of the keys of a named class. Raises InputError for a class without a fitting one."""
        kind = self.registry.find(name)
        config: Any = kind.Config
        if not is_dataclass(config) or not isinstance(config, type) or not issubclass(config, self.base):
            raise InputError(
                f"{self.registry.key} {name!r}: its Config is no dataclass that derives from "
                f"{self.base.__module__}.{self.base.__qualname__}"
            )
        for one in fields(config):
            if one.name != self.key and one.default is MISSING and one.default_factory is MISSING:
                raise InputError(f"{self.registry.key} {name!r}: its Config gives {one.name} no default")
        return config

    def owners(self, key: str) -> list[str]:
        """Those of ours that have a key."""
        return [name for name in self.registry if key in _names(self.keys(name))]


CHOICES = (
    Choice(ObjectiveConfig, "name", OBJECTIVES, objectives.DEFAULT, frozenset(objectives.keys.WRITTEN_BEFORE)),
    Choice(EncoderConfig, "encoder", ENCODERS, model.DEFAULT),
    Choice(TaskConfig, "kind", TASKS, downstream.DEFAULT, frozenset(WRITTEN_BEFORE)),
)


def choices_of(config_type: type) -> dict[str, Choice]:
    """The groups of a config that are chosen by name."""
    found = {}
    for name, hint in field_types(config_type).items():
        choice = next((one for one in CHOICES if isinstance(hint, type) and issubclass(hint, one.base)), None)
        if choice is not None:
            found[name] = choice
    return found


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
            name = names[member.name]
            kind = choice.keys(name)
            members.append((member.name, kind, field(default_factory=partial(kind, **{choice.key: name}))))
        elif member.default_factory is not MISSING:
            members.append((member.name, types[member.name], field(default_factory=member.default_factory)))
        else:
            members.append((member.name, types[member.name], field(default=member.default)))
    return make_dataclass(config_type.__name__, members, frozen=True, namespace={"__doc__": config_type.__doc__})


def belonging_elsewhere(config_type: type, key: str, prefix: str) -> str:
    """Whose key it is, where it is one of another class of ours; "" where it is nobody's."""
    choice = next((one for one in CHOICES if issubclass(config_type, one.base)), None)
    owners = choice.owners(key) if choice else []
    if choice is None or not owners:
        return ""
    own = next((one.default for one in fields(config_type) if one.name == choice.key), MISSING)
    name = own if own is not MISSING else f"{config_type.__module__}:{config_type.__qualname__.removesuffix('.Config')}"
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
    return {one.name for one in fields(kind)}


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
