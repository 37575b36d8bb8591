"""A tree of values as a user wrote them, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ecgscale import yaml_text
from ecgscale.errors import InputError

Elsewhere = Callable[[type, str, str], str]


def nowhere(group: type, key: str, prefix: str) -> str:
    return ""


class Given:
    """A tree of values, each with the place where it was written: ``--train.steps`` or ``base.yaml, line 7``."""

    def __init__(self, tree: dict[str, Any] | None = None, elsewhere: Elsewhere = nowhere) -> None:
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
        for path, value in other.leaves():
            self._set(path, value, other.origins.get(".".join(map(str, path)), ""))

    def leaves(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        waiting: list[tuple[tuple[str, ...], Any]] = [((name,), value) for name, value in reversed(self.tree.items())]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, dict) and value:
                waiting += [((*path, name), child) for name, child in reversed(value.items())]
            else:
                yield path, value

    def dotted(self) -> dict[str, Any]:
        """Each dotted key with its value, as it was written."""
        return {".".join(map(str, path)): value for path, value in self.leaves()}

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
