"""Which known data set a folder or an archive is, also where it lies a level deeper or is only a part of it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ecgscale.data.sources import cinc2021, code15, mimic_iv_ecg, ptbxl
from ecgscale.data.sources.listing import header_names
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.errors import InputError, MachineError

_DEEPEST = 2  # levels below what was given, in which a set may lie
_MOST_FOLDERS = 64  # that a folder may hold to be searched: a known set has more, what holds one has few
_HIGHEST = 3  # levels above: records500/00000, files/p1000/p10000032


Tests = Mapping[str, Callable[[Tree], bool]]  # by layout


class Layout(NamedTuple):
    """How a data set is known."""

    title: str
    marks: str  # what it is recognised by
    is_here: Callable[[Tree], bool]
    has_part: Callable[[str], bool] = lambda name: False  # whether its recordings lie in a folder of that name
    has_shape: Callable[[Tree], bool] = lambda tree: False  # whether it is known by its folders, without its tables


LAYOUTS = {
    "ptbxl": Layout("PTB-XL", ptbxl.DATABASE, ptbxl.is_here, ptbxl.has_part),
    "mimic-iv-ecg": Layout(
        "MIMIC-IV-ECG", mimic_iv_ecg.RECORDS, mimic_iv_ecg.is_here, mimic_iv_ecg.has_part, mimic_iv_ecg.has_shape
    ),
    "cinc2021": Layout("CinC 2021", cinc2021.MARKS, cinc2021.is_here, cinc2021.has_part),
    "code15": Layout("CODE-15 %", code15.PARTS, code15.is_here),
}


class Place(NamedTuple):
    """Where a known set lies."""

    layout: str
    tree: Tree
    within: str
    """The folder of it that was given; "" for all of it."""
    how: str
    """For people, where it is not what was given itself."""


def recognise(tree: Tree, layouts: Mapping[str, Layout]) -> Place | None:
    """The one of these sets that the tree is, holds in a folder of its own, or is a part of.

    Raises InputError where it holds several, or one and other records.
    """
    if isinstance(tree, Folder):
        tree = _ListedOnce(tree.where)
    by_tables = {name: layout.is_here for name, layout in layouts.items()}
    by_shape = {name: layout.has_shape for name, layout in layouts.items()}
    return (
        _at_or_below(tree, by_tables)
        or (_above(tree, layouts) if isinstance(tree, Folder) else None)
        or _at_or_below(tree, by_shape)
    )


class _ListedOnce(Folder):
    """A folder that is asked again and again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", functools.lru_cache(super().children))

    def below(self, folder: str) -> Folder:
        return _ListedOnce(self.where / folder)


def unrecognised(tree: Tree, forced: bool) -> list[str]:
    """Lines on what plain records look like part of.

    Raises InputError where each recording would be read twice, unless it is ``forced`` to read them as they are.
    """
    about_ptbxl = _looks_like_ptbxl(tree, forced)
    return about_ptbxl if forced else [*about_ptbxl, *mimic_iv_ecg.why_not(tree)]


def _at_or_below(tree: Tree, tests: Tests) -> Place | None:
    if (name := _layout_of(tree, tests)) is not None:
        return Place(name, _plain(tree), "", "")
    below = list(_below(tree, tests))
    return _only(tree, below) if below else None


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


def _only(tree: Tree, places: list[Place]) -> Place:
    folders = [place.how.removeprefix("it lies in ") for place in places]
    titles = [f"{LAYOUTS[place.layout].title} in {folder}" for place, folder in zip(places, folders, strict=True)]
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


def _above(tree: Folder, layouts: Mapping[str, Layout]) -> Place | None:
    given = Path(os.path.realpath(tree.where))
    for root in given.parents[:_HIGHEST]:
        within = given.relative_to(root).as_posix()
        for name, layout in layouts.items():
            if layout.has_part(within.partition("/")[0]) and _is_above(root, layout):
                return Place(name, Folder(root), within, f"only what lies in {within}, with the tables of {root}")
    return None


def _is_above(root: Path, layout: Layout) -> bool:
    try:
        return layout.is_here(Folder(root))
    except (InputError, MachineError):
        return False  # a folder above what was given, into which we may not look


def _looks_like_ptbxl(tree: Tree, forced: bool) -> list[str]:
    headers = header_names(tree.contents())
    first = next(headers, "")
    if not _of_ptbxl(first):
        return []
    rates = {_of_ptbxl(first)} | {_of_ptbxl(name) for name in headers}
    lost = f"no {ptbxl.DATABASE} with it, so its labels and patients"
    if forced:
        twice = (
            "both rates of PTB-XL are read, each recording twice and as two persons; give one of records500, records100"
        )
        return [twice] if {"hr", "lr"} <= rates else []
    if {"hr", "lr"} <= rates:
        raise InputError(
            f"{tree.where}: looks like PTB-XL at both rates (such as {first}), with {lost} would be lost "
            "and each recording be read twice; give the folder that holds the table, one rate alone, or --layout wfdb"
        )
    return [f"it looks like a part of PTB-XL, with {lost} are unknown: give the folder that holds the table"]


def _of_ptbxl(header: str) -> str:
    """``hr`` or ``lr`` for a name such as records500/00000/00001_hr, else "" ."""
    match = re.search(r"(?:^|/)\d{5}_(hr|lr)$", header)
    return match[1] if match else ""
