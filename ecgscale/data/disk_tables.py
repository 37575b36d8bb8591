"""Tables on disk (SQLite) that are filled once and then read by all processes."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ecgscale.errors import MachineError


@contextmanager
def being_filled(path: Path) -> Iterator[sqlite3.Connection]:
    """A table on disk, which whoever made it throws away if it is not finished. What SQLite cannot do, MachineError."""
    try:
        with closing(sqlite3.connect(path)) as tables:
            tables.execute("PRAGMA journal_mode=OFF")
            tables.execute("PRAGMA synchronous=OFF")
            yield tables
    except sqlite3.Error as error:
        raise MachineError(f"{path.parent}: {error}; set TMPDIR to a folder with more room") from error


def rows_of(path: Path, query: str, *given: object) -> Iterator[tuple[Any, ...]]:
    """What a query of a filled table comes to. Raises MachineError that names the table where it cannot be read."""
    try:
        yield from _open(path).execute(query, given)
    except sqlite3.Error as error:
        raise MachineError(f"{path}: cannot be read: {error}") from error


@functools.lru_cache(maxsize=8)
def _open(path: Path) -> sqlite3.Connection:
    # Once per process, and never while the table is being filled by another connection.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
