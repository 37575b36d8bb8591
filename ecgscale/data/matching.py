"""Which record a row of a table names."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from unicodedata import normalize

from ecgscale.data.cells import Cells, find_key
from ecgscale.errors import InputError

RECORD_COLUMNS = ("record", "filename", "filename_hr", "ecg_id", "name")
_DATA_SUFFIXES = (".hea", ".dat", ".mat", ".npy", ".npz", ".flac", ".edf", ".xml", ".dcm", ".csv", ".h5", ".hdf5")


class Matcher(Protocol):
    """How the cells of a record column name records."""

    source: Path
    """Where the records are."""

    def columns(self, columns: Sequence[str], record_column: str | None, path: Path) -> list[str]:
        """Those that may name records, the likeliest first; raises InputError where there is none."""

    def records(self, column: str, cell: str, csv_folder: Path) -> Sequence[str]:
        """The records that a cell may name, none, one or several. Raises InputError for a cell that can name none."""

    def example(self) -> str:
        """What a record is called, for errors."""


class RecordIds(NamedTuple):
    """A number by which a known data set calls its records beside their names."""

    column: str
    """As the data set's own tables name it."""
    id_of: Callable[[str], str]
    """Name of a record -> its number without leading zeros; "" where the name does not tell it."""


class NameMatcher:
    """By the path below ``root`` or below the CSV's own folder, or by the base name, with or without suffix.

    A cell in the column of ``ids`` names a record by its number first.
    """

    def __init__(self, root: Path, items: Sequence[str], ids: RecordIds | None = None) -> None:
        self.source, self._first, self._ids = root, items[0] if items else "", ids
        self._items = frozenset(items)
        self._prefix = os.path.normpath(root.absolute()).rstrip("/") + "/"

    def columns(self, columns: Sequence[str], record_column: str | None, path: Path) -> list[str]:
        usual = dict.fromkeys((*RECORD_COLUMNS, *([self._ids.column] if self._ids else ())))
        wanted = tuple(usual) if record_column is None else (record_column,)
        present = [column for name in wanted if (column := find_key(columns, name)) is not None]
        if not present:
            raise InputError(
                f"{path}: no column {' or '.join(wanted)} that names the record; the columns are {', '.join(columns)}"
            )
        return present

    def records(self, column: str, cell: str, csv_folder: Path) -> Sequence[str]:
        if self._ids and find_key((column,), self._ids.column) and (numbered := self._by_id.get(_number(cell))):
            return numbered
        records = self._named(cell, csv_folder)
        if records or cell.isascii():
            return records
        composed = self._composed._named(normalize("NFC", cell), csv_folder)
        return [item for name in composed for item in self._spellings[name]]

    def _named(self, cell: str, csv_folder: Path) -> Sequence[str]:
        value = cell.replace("\ufeff", "").strip()  # where files were joined, a mark stands within
        if value in self._items:
            return (value,)
        beside_csv = csv_folder.absolute()
        for name in _names_in(value):
            if name in self._items:
                return (name,)
            if "/" not in name and (records := self._by_basename.get(name)):
                return records
            path = os.path.normpath(f"{beside_csv}/{name}")
            if path.startswith(self._prefix) and path[len(self._prefix) :] in self._items:
                return (path[len(self._prefix) :],)
        return ()

    def example(self) -> str:
        return f"a record is called {self._first!r}"

    @functools.cached_property
    def _by_id(self) -> dict[str, tuple[str, ...]]:
        assert self._ids is not None
        records: dict[str, tuple[str, ...]] = {}
        for item in sorted(self._items):
            if number := self._ids.id_of(item):
                records[number] = (*records.get(number, ()), item)
        return records

    @functools.cached_property
    def _spellings(self) -> dict[str, list[str]]:
        """Records by their names with ü as one character: file systems may write u and its dots."""
        spellings: dict[str, list[str]] = {}
        for item in sorted(self._items):
            spellings.setdefault(normalize("NFC", item), []).append(item)
        return spellings

    @functools.cached_property
    def _composed(self) -> NameMatcher:
        return NameMatcher(self.source, list(self._spellings))

    @functools.cached_property
    def _by_basename(self) -> dict[str, tuple[str, ...]]:
        records: dict[str, tuple[str, ...]] = {}
        for item in sorted(self._items):
            if "/" in item:
                name = item.rpartition("/")[2]
                records[name] = (*records.get(name, ()), item)
        return records


def _number(cell: str) -> str:
    """Without leading zeros, where it is one."""
    text = Cells().text(cell, "") or ""
    return str(int(text)) if text.isascii() and text.isdigit() and len(text) < 19 else ""


def _names_in(value: str) -> Iterator[str]:
    """What a cell may call a record, the likeliest first."""
    for path in dict.fromkeys((value, value.replace("\\", "/"))):
        if not path:
            return
        name = os.path.normpath(path)
        yield name
        stem, dot, suffix = name.rpartition(".")
        if stem and f"{dot}{suffix}".casefold() in _DATA_SUFFIXES:
            yield stem
        elif suffix.strip("0") == "" and (whole := Cells().text(name, "")) is not None:
            yield whole  # 17.0, as pandas writes 17 beside empty cells


class RowMatcher:
    """By the number of the row of one array, from 0: lines may stand in any order, but never for themselves."""

    def __init__(self, array: Path, names: Sequence[str]) -> None:
        self.source, self._names = array, names

    def columns(self, columns: Sequence[str], record_column: str | None, path: Path) -> list[str]:
        wanted = ("row", "record") if record_column is None else (record_column,)
        present = [column for name in wanted if (column := find_key(columns, name)) is not None]
        if present:
            return present
        raise InputError(
            f"{path}: no column {' or '.join(wanted)} that says which row of {self.source.name} each line is about, "
            f"from 0 to {len(self._names) - 1}; add one (--record-column NAME): the order of lines counts for nothing"
        )

    def records(self, column: str, cell: str, csv_folder: Path) -> Sequence[str]:
        text = Cells().identifier(cell, "row")
        if text is None:
            return ()
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < len(self._names)):
            raise InputError(f"{cell!r} is no row of {self.source.name}; rows count from 0 to {len(self._names) - 1}")
        return (self._names[int(text)],)

    def example(self) -> str:
        return f"{self.source.name} has the rows 0 to {len(self._names) - 1}"
