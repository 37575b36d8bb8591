"""Named choices that a user can add to: a name of ours, or ``package.module:Class`` from the user's own path.

A registry says what a config key such as ``objective.name`` may be. A name of ours is looked up and imported when it is
first used; a name with a colon is the user's own code, imported from the Python path. Such a name is code: it is
imported where the user wrote it (command line, config file), never where it was read from data (an export, a
checkpoint, somebody's run folder), unless the user names it again.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any, Generic, TypeVar

from ecgscale.errors import InputError

Kind = TypeVar("Kind")
Function = TypeVar("Function", bound=Callable[..., object])


class Registry(Generic[Kind]):
    """The classes that one config key can name."""

    def __init__(self, key: str, base: str, ours: Mapping[str, str], by: str = "") -> None:
        """``ours`` maps each name to ``module:Class``; ``base`` is the class that all of them derive from, likewise.

        Both are looked up late, so that a registry can stand below the rooms that it names. ``by`` says how a command
        names code that stands in what it reads.
        """
        self.key, self._base, self._ours, self._by = key, base, dict(ours), by

    def __repr__(self) -> str:
        return f"Registry({self.key})"

    def __iter__(self) -> Iterator[str]:
        return iter(self._ours)

    def __len__(self) -> int:
        return len(self._ours)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._ours

    def find(self, name: str) -> type[Kind]:
        """The class of that name, which the user has written.

        Raises InputError for a name that is unknown, cannot be imported or is no class of this kind.
        """
        if name in self:
            return self._imported(self._ours[name])
        if is_code(name):
            return self._imported(name)
        raise _unknown(self.key, name, self._ours, "package.module:Class for a class")

    def find_read(self, name: str, where: object, named: Collection[str] = ()) -> type[Kind]:
        """The class of a name that was read from ``where``, which is data: code only if it is among the ``named``.

        ``named`` are those that the user has written for this command.
        """
        if is_code(name) and name not in self and name not in named:
            raise InputError(
                f"{where}: {self.key} {name!r} is code that is not ours; name it in your command to have it imported"
                + (f" ({self._by})" if self._by else "")
            )
        return self.find(name)

    def place(self, name: str) -> str:
        """``name from FILE`` for a class of the user's own; ``name`` for one of ours."""
        return name if name in self else f"{name} from {inspect.getfile(self.find(name))}"

    def _imported(self, place: str) -> type[Kind]:
        module, class_name = _import(self.key, place)
        kind: Any = getattr(module, class_name, None)
        home, base_name = _import(self.key, self._base)
        base: type[Kind] = getattr(home, base_name)
        if not inspect.isclass(kind):
            members = ((n, member) for n, member in vars(module).items() if inspect.isclass(member))
            classes = [n for n, member in members if issubclass(member, base) and not inspect.isabstract(member)]
            near = get_close_matches(class_name, classes, 1) or classes[:1]
            hint = f"; did you mean {module.__name__}:{near[0]}?" if near else ""
            raise InputError(f"{self.key} {place!r}: {module.__name__} has no class {class_name}{hint}")
        if not issubclass(kind, base):
            raise InputError(f"{self.key} {place!r}: is no {base.__name__}; derive it from {_path_of(base)}")
        if missing := sorted(getattr(kind, "__abstractmethods__", ())):
            raise InputError(f"{self.key} {place!r}: does not define {', '.join(missing)} of {_path_of(base)}")
        return kind


def find_function(key: str, ours: Mapping[str, Function], name: str) -> Function:
    """The function of that name, one of ``ours`` or ``package.module:function``, which the user has written.

    Raises InputError for a name that is unknown, cannot be imported or is no function.
    """
    if name in ours:
        return ours[name]
    if not is_code(name):
        raise _unknown(key, name, ours, "package.module:function for one")
    module, function_name = _import(key, name)
    function: Function | None = getattr(module, function_name, None)
    if not callable(function):
        functions = [n for n, member in vars(module).items() if inspect.isfunction(member)]
        near = get_close_matches(function_name, functions, 1)
        hint = f"; did you mean {module.__name__}:{near[0]}?" if near else ""
        raise InputError(f"{key} {name!r}: {module.__name__} has no function {function_name}{hint}")
    return function


def _import(key: str, place: str) -> tuple[ModuleType, str]:
    """The module of ``module:name``, and the name."""
    module_name, _, name = place.partition(":")
    try:
        return importlib.import_module(module_name), name
    except Exception as error:  # whatever somebody's module does while it is imported
        reason = " ".join(str(error).split())
        raise InputError(f"{key} {place!r}: cannot import {module_name} ({reason})") from error


def _unknown(key: str, name: object, known: Collection[str], or_else: str) -> InputError:
    near = get_close_matches(str(name), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return InputError(f"{key} {name!r} is unknown; {hint} (or {or_else} of your own)")


def is_code(name: object) -> bool:
    """Whether a name stands for code outside this package: ``package.module:Class``."""
    return isinstance(name, str) and ":" in name


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
