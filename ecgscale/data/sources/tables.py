"""Rows of a CSV, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ecgscale.data.csv_rows import rows_in
from ecgscale.data.description import Description
from ecgscale.errors import InputError


class Table:
    """A CSV that must have certain columns; iterating gives its rows as lists, ``columns`` where in them to look.

    Raises InputError, which names ``shown`` and the line, for anything that is no such table.
    """

    def __init__(self, stream: TextIO, shown: str, needed: Sequence[str]) -> None:
        self._shown, self._line = shown, 1
        self._rows = rows_in(stream, shown)
        names = [name.strip() for name in next((row.cells for row in self._rows), [])]
        self.columns = {name: i for i, name in enumerate(names)}
        if missing := [name for name in needed if name not in self.columns]:
            raise InputError(f"{shown}: no column {missing[0]}; the columns are {', '.join(names) or 'none'}")
        if len(self.columns) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{shown}: column {repeated!r} stands {names.count(repeated)} times")

    def __iter__(self) -> Iterator[list[str]]:
        for row in self._rows:
            self._line = row.line
            if len(row.cells) != len(self.columns):
                raise InputError(
                    f"{self.where()} has {len(row.cells)} fields, the first line names {len(self.columns)} columns"
                )
            yield row.cells

    def where(self) -> str:
        """The file and the line on which the row begins that was read last."""
        return f"{self._shown}: line {self._line}"

    def place(self) -> str:
        """The same by the file's name alone."""
        return Path(self.where()).name


def unreadable_row(table: Table, reason: str) -> tuple[str, Description]:
    """A row that names no record, as a record that cannot be read: it is rejected with that reason."""
    return table.place(), Description(None, {}, {}, fault=f"{table.where()}: {reason}", place=table.place())


def whole_number(text: str, where: str) -> int:
    """``"15709"`` and ``"15709.0"``, as pandas writes whole numbers beside empty cells -> 15709."""
    digits = text.strip().removesuffix(".0")
    if not digits.removeprefix("-").isascii() or not digits.removeprefix("-").isdigit() or len(digits) > 18:
        raise InputError(f"{where}: {text!r} is not a whole number")
    return int(digits)
