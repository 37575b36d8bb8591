"""Classes of one label that differ in capitals alone: they may be one, which no program can know."""

from __future__ import annotations

from ecgscale.data.cells import Cells
from ecgscale.errors import InputError, one_line

_MOST = 1000  # different cells of a label that are kept: with more it is no list of classes


class Spellings:
    """The cells of labels, as they are added."""

    def __init__(self) -> None:
        self._cells: dict[str, set[str]] = {}

    def add(self, label: str, cell: str) -> None:
        """One cell."""
        cells = self._cells.setdefault(label, set())
        if len(cells) < _MOST:
            cells.add(cell)

    def lines(self) -> list[str]:
        """For people, one for each label with such classes."""
        told = []
        for label, cells in self._cells.items():
            first: dict[str, str] = {}
            pairs = []
            for name in sorted({name for cell in cells for name in _classes(cell, label)}):
                if (other := first.setdefault(name.casefold(), name)) != name:
                    pairs.append(f"{other!r} and {name!r}")
            if pairs:
                told.append(
                    one_line(
                        f"{len(pairs)} classes of {label} differ from another in capitals alone, such as {pairs[0]}; "
                        "they count as other classes: if they are the same, write them alike"
                    )
                )
        return told


def _classes(cell: str, label: str) -> list[str]:
    try:
        return Cells().classes(cell, label) or []
    except InputError:
        return []  # the record with it is rejected
