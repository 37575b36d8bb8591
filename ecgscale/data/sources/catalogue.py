"""Tables on disk that all worker processes share: the files of an archive, and what a data set says of its records.

A pickled source carries the path of the tables and each process looks rows up by name, so that memory does not grow
with the number of records or of processes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ecgscale.data.description import Description
from ecgscale.data.disk_tables import being_filled, rows_of
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
        with being_filled(self.path) as tables:
            latest = ""

            def remembered() -> Iterator[tuple[object, ...]]:
                nonlocal latest
                for row in rows:
                    latest = str(row[0])
                    yield row

            try:
                with tables:
                    tables.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", remembered())
            except sqlite3.IntegrityError as error:
                raise InputError(f"two files have the same name: {latest!r}") from error

    def add_records(self, described: Iterable[tuple[str, Description]]) -> list[str]:
        """Returns a line on rows that say again what an earlier one says; those count once.

        Of a record whose rows contradict each other, that is kept as its fault.
        """
        repeated, first = 0, ""
        with being_filled(self.path) as tables, tables:
            for item, description in described:
                if tables.execute("INSERT OR IGNORE INTO records VALUES (?, ?)", (item, _packed(description))).rowcount:
                    continue
                ((packed,),) = tables.execute("SELECT said FROM records WHERE item = ?", (item,))
                earlier = _unpacked(packed)
                if _content(description) == _content(earlier):
                    repeated += 1
                    first = first or f"{description.place}, of the record {item}"
                    continue
                fault = f"{earlier.place} and {description.place} contradict each other; a record may have one row"
                kept = _packed(replace(earlier, fault=fault))
                tables.execute("UPDATE records SET said = ? WHERE item = ?", (kept, item))
        return [f"{repeated} rows repeat others and count once; the first is {first}"] if repeated else []

    def add_texts(self, texts: Iterable[tuple[int, list[str]]]) -> list[int]:
        """Lines of text by number, for tables whose rows have to find each other; of a repeated number the first.

        Returns the numbers of which others were said later.
        """
        contradicted = []
        with being_filled(self.path) as tables, tables:
            for key, lines in texts:
                packed = json.dumps(lines)
                if not tables.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (key, packed)).rowcount:
                    ((earlier,),) = tables.execute("SELECT said FROM texts WHERE key = ?", (key,))
                    contradicted += [key] if earlier != packed else []
        return contradicted

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
        return _NOTHING if row is None else _unpacked(row[0])

    def text(self, key: int) -> list[str]:
        row = next(rows_of(self.path, "SELECT said FROM texts WHERE key = ?", key), None)
        lines: list[str] = json.loads(row[0]) if row else []
        return lines


def _packed(description: Description) -> str:
    return "" if description == _NOTHING else json.dumps(list(vars(description).values()))


def _unpacked(text: str) -> Description:
    return Description(*json.loads(text)) if text else _NOTHING


def _content(description: Description) -> tuple[object, ...]:
    """What two rows of one record must agree in."""
    return description.patient, description.labels, description.metadata, bool(description.fault)
