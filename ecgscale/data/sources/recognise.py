"""Which known data set a folder or an archive is, also where it lies a level deeper or is only a part of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ecgscale.data.sources.layout import Layout, Place
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.errors import InputError, MachineError

_DEEPEST = 2  # levels below what was given, in which a set may lie
_MOST_FOLDERS = 64  # that a folder may hold to be searched: a known set has more, what holds one has few
_HIGHEST = 3  # levels above: records500/00000, files/p1000/p10000032


Layouts = Mapping[str, type[Layout]]
Tests = Mapping[str, Callable[[Tree], bool]]  # by layout


def recognise(tree: Tree, layouts: Layouts) -> Place | None:
    """The one of these sets that the tree is, holds in a folder of its own, or is a part of.

    Raises InputError where it holds several, or one and other records.
    """
    if isinstance(tree, Folder):
        tree = _ListedOnce(tree.where)
    by_tables = {name: layout.is_here for name, layout in layouts.items()}
    by_shape = {name: layout.has_shape for name, layout in layouts.items()}
    return (
        _at_or_below(tree, layouts, by_tables)
        or (_above(tree, layouts) if isinstance(tree, Folder) else None)
        or _at_or_below(tree, layouts, by_shape)
    )


class _ListedOnce(Folder):
    """A folder that is asked again and again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", functools.lru_cache(super().children))

    def below(self, folder: str) -> Folder:
        return _ListedOnce(self.where / folder)


def _at_or_below(tree: Tree, layouts: Layouts, tests: Tests) -> Place | None:
    if (name := _layout_of(tree, tests)) is not None:
        return Place(name, _plain(tree))
    below = list(_below(tree, tests))
    return _only(tree, layouts, below) if below else None


def _plain(tree: Tree) -> Tree:
    """As it travels to other processes."""
    return Folder(tree.where) if isinstance(tree, Folder) else tree


def _layout_of(tree: Tree, tests: Tests) -> str | None:
    return next((name for name, is_here in tests.items() if is_here(tree)), None)


def _below(tree: Tree, tests: Tests) -> Iterator[Place]:
    level = [""]
    for _ in range(_DEEPEST):
        deeper = []
        for folder in level:
            names = tree.folders(folder)
            for name in names if len(names) <= _MOST_FOLDERS else ():
                path = f"{folder}/{name}" if folder else name
                one = tree.below(path)
                if (layout := _layout_of(one, tests)) is not None:
                    yield Place(layout, _plain(one), "", f"it lies in {path}")
                else:
                    deeper.append(path)
        level = deeper


def _only(tree: Tree, layouts: Layouts, places: list[Place]) -> Place:
    folders = [place.how.removeprefix("it lies in ") for place in places]
    names = [layouts[place.layout].title or place.layout for place in places]
    titles = [f"{name} in {folder}" for name, folder in zip(names, folders, strict=True)]
    if len(places) > 1:
        raise InputError(
            f"{tree.where}: holds {' and '.join(titles[:3])}; give one of them, or --layout wfdb to read all as plain "
            "records, without their tables"
        )
    if (other := tree.header_outside(folders[0])) is not None:
        raise InputError(
            f"{tree.where}: holds {titles[0]} and other records, such as {other}; give {folders[0]} alone (its tables "
            "belong beside its records), or --layout wfdb to read all as plain records"
        )
    return places[0]


def _above(tree: Folder, layouts: Layouts) -> Place | None:
    given = Path(os.path.realpath(tree.where))
    for root in given.parents[:_HIGHEST]:
        within = given.relative_to(root).as_posix()
        for name, layout in layouts.items():
            if layout.has_part(within.partition("/")[0]) and _is_above(root, layout):
                return Place(name, Folder(root), within, f"only what lies in {within}, with the tables of {root}")
    return None


def _is_above(root: Path, layout: type[Layout]) -> bool:
    try:
        return layout.is_here(Folder(root))
    except (InputError, MachineError):
        return False  # a folder above what was given, into which we may not look
