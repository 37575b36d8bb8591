"""Tables on disk that all worker processes share: the files of an archive, and what a data set says of its records.

A pickled source carries the path of the tables and each process looks rows up by name, so that memory does not grow
with the number of records or of processes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ecgscale.data.label_table import Description, being_filled, rows_of
from ecgscale.errors import InputError

_SCHEMA = """
CREATE TABLE files (name TEXT PRIMARY KEY, offset INT, packed INT, size INT, method INT, crc INT) WITHOUT ROWID;
CREATE TABLE records (item TEXT PRIMARY KEY, said TEXT) WITHOUT ROWID;
CREATE TABLE texts (key INTEGER PRIMARY KEY, said TEXT);
"""
_NOTHING = Description(None, {}, {})
_LAST = "\U0010ffff"  # sorts behind every other character


class Member(NamedTuple):
    """Where a file lies in an archive."""

    offset: int  # of the data in a tar, of the local header in a zip
    packed: int  # bytes in the archive
    size: int  # bytes unpacked
    method: int  # a zip's number for the compression; TAR
    crc: int  # of a zip


TAR = -1


@dataclass(frozen=True)
class Catalogue:
    """The tables. ``Catalogue.make`` fills them once; afterwards they are only read.

    All methods raise MachineError that names the folder or file where the disk fails.
    """

    path: Path

    @classmethod
    def make(cls, path: Path) -> Catalogue:
        """Empty tables in a new file."""
        with being_filled(path) as tables:
            tables.executescript(_SCHEMA)
        return cls(path)

    def add_files(self, members: Iterable[tuple[str, Member]]) -> None:
        """Raises InputError for a name that stands twice."""
        rows = ((name, *member) for name, member in members)
        self._insert("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", rows, "two files have the same name")

    def add_records(self, described: Iterable[tuple[str, Description]]) -> None:
        """Raises InputError for a record that stands twice."""
        rows = ((item, "" if said == _NOTHING else json.dumps(list(vars(said).values()))) for item, said in described)
        self._insert("INSERT INTO records VALUES (?, ?)", rows, "a record stands twice")

    def add_texts(self, texts: Iterable[tuple[int, list[str]]]) -> None:
        """Lines of text by number, for tables whose rows have to find each other; of a repeated number the first."""
        rows = ((key, json.dumps(lines)) for key, lines in texts)
        self._insert("INSERT OR IGNORE INTO texts VALUES (?, ?)", rows, "")

    def _insert(self, statement: str, rows: Iterable[tuple[object, ...]], conflict: str) -> None:
        with being_filled(self.path) as tables:
            latest = ""

            def remembered() -> Iterator[tuple[object, ...]]:
                nonlocal latest
                for row in rows:
                    latest = str(row[0])
                    yield row

            try:
                with tables:
                    tables.executemany(statement, remembered())
            except sqlite3.IntegrityError as error:
                raise InputError(f"{conflict}: {latest!r}") from error

    def file(self, name: str) -> Member | None:
        row = next(rows_of(self.path, "SELECT * FROM files WHERE name = ?", name), None)
        return None if row is None else Member(*row[1:])

    def headers(self, prefix: str) -> list[str]:
        """Names of the WFDB headers that start so, sorted, without the prefix."""
        return [
            name for name in self.names(prefix) if name.endswith(".hea") and not f"{prefix}{name}".endswith("/.hea")
        ]

    def names(self, prefix: str) -> Iterator[str]:
        """Of all files that start so, sorted, without the prefix."""
        query = "SELECT name FROM files WHERE name >= ? AND name < ? ORDER BY name"
        for (name,) in rows_of(self.path, query, prefix, prefix + _LAST):
            yield name[len(prefix) :]

    def children(self, folder: str) -> frozenset[str]:
        """Names of what stands directly in a folder, which is "" or ends with a slash."""
        return frozenset(child for child, _ in self._children(folder))

    def folders(self, folder: str) -> list[str]:
        """Those of them that are folders, sorted."""
        return sorted(child for child, is_folder in self._children(folder) if is_folder)

    def _children(self, folder: str) -> Iterator[tuple[str, bool]]:
        after = folder
        query = "SELECT name FROM files WHERE name > ? ORDER BY name LIMIT 1"
        while (row := next(rows_of(self.path, query, after), None)) and row[0].startswith(folder):
            child, slash, _ = row[0][len(folder) :].partition("/")
            yield child, bool(slash)
            after = f"{folder}{child}/{_LAST}" if slash else row[0]  # past all that the child holds

    def items(self) -> list[str]:
        """The records, sorted."""
        return [item for (item,) in rows_of(self.path, "SELECT item FROM records ORDER BY item")]

    def n_records(self) -> int:
        ((count,),) = rows_of(self.path, "SELECT count(*) FROM records")
        return int(count)

    def describe(self, item: str) -> Description:
        """What is known of a record; nothing for one that is not there."""
        row = next(rows_of(self.path, "SELECT said FROM records WHERE item = ?", item), None)
        return Description(*json.loads(row[0])) if row is not None and row[0] else _NOTHING

    def text(self, key: int) -> list[str]:
        row = next(rows_of(self.path, "SELECT said FROM texts WHERE key = ?", key), None)
        lines: list[str] = json.loads(row[0]) if row else []
        return lines
