"""Where the files of a data set lie: in a folder, or (archive.py) in an archive as if it had been unpacked."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from ecgscale.data.sources.listing import Contents, contents_below, header_names, is_junk
from ecgscale.data.sources.wfdb_listing import fingerprint_of, headers_below, stamp_of, stays_inside, without_segments
from ecgscale.data.sources.wfdb_source import read_wfdb
from ecgscale.errors import InputError, file_error
from ecgscale.record import Record


class Tree(Protocol):
    """Files below a place. Names are relative to it, with slashes."""

    @property
    def where(self) -> Path:
        """What errors call the place."""

    def children(self, folder: str) -> frozenset[str]:
        """Names of what stands directly in a folder ("" is the place itself); none where there is no such folder."""

    def folders(self, folder: str) -> list[str]:
        """Those of them that are folders, sorted; links are not followed."""

    def below(self, folder: str) -> Tree:
        """What lies below one of its folders, as a tree of its own."""

    def header_outside(self, folder: str) -> str | None:
        """The name of some WFDB header that lies in the tree but not in that folder of it."""

    def contents(self) -> Iterator[Contents]:
        """Of the place itself and of all folders below."""

    def headers(self) -> list[str]:
        """The WFDB records, sorted, without those that are segments of another."""

    def table(self, name: str) -> AbstractContextManager[TextIO]:
        """A text file to read from; raises InputError where it cannot be."""

    def read(self, item: str, **options: Any) -> Record:
        """The WFDB record of that name; options as in read_wfdb."""

    def fingerprint(self, item: str) -> bytes:
        """The headers of a record and of its segments, and hashes of their data, as far as they can be read."""

    def stamp(self, item: str) -> bytes:
        """The same, with sizes and times in place of hashes."""


@dataclass(frozen=True)
class Folder:
    """A folder on disk. Links that lead out of it are refused."""

    where: Path

    def children(self, folder: str) -> frozenset[str]:
        path = self.where / folder
        try:
            names = (child.name for child in path.iterdir()) if stays_inside(path, self.where) else ()
            return frozenset(name for name in names if not is_junk(name))
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        except OSError as error:
            raise file_error(path, "cannot be listed", error) from error

    def folders(self, folder: str) -> list[str]:
        path = self.where / folder
        try:
            with os.scandir(path) as entries:  # which tells without a look at each
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise file_error(path, "cannot be listed", error) from error
        return sorted(name for name in names if not is_junk(name))

    def below(self, folder: str) -> Folder:
        return Folder(self.where / folder) if folder else self

    def header_outside(self, folder: str) -> str | None:
        names = header_names(contents_below(self.where))
        return next((name for name in names if not name.startswith(f"{folder}/")), None)

    def contents(self) -> Iterator[Contents]:
        return contents_below(self.where)

    def headers(self) -> list[str]:
        return without_segments(self.where, headers_below(self.where))

    @contextmanager
    def table(self, name: str) -> Iterator[TextIO]:
        path = self.where / name
        if not stays_inside(path, self.where):
            raise InputError(f"{path}: lies outside of {self.where}; links may not lead out")
        try:
            stream = io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", newline="")
        except OSError as error:
            raise file_error(path, "cannot be read", error) from error
        with stream:
            yield stream

    def fingerprint(self, item: str) -> bytes:
        return fingerprint_of(self.where, item)

    def stamp(self, item: str) -> bytes:
        return stamp_of(self.where, item)

    def read(self, item: str, **options: Any) -> Record:
        return read_wfdb(self.where / f"{item}.hea", name=item, root=self.where, **options)
