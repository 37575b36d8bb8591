"""What a layout is: how the files of a data set lie, by what it is recognised, and how it becomes a source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

from ecgscale.data.label_table import LabelTable
from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources.protocol import OpenedSource
from ecgscale.data.sources.tree import Tree
from ecgscale.record import Record


class Place(NamedTuple):
    """Where a data set lies."""

    layout: str
    tree: Tree
    within: str = ""
    """The folder or file of it that was given; "" for all of it."""
    how: str = ""
    """For people, where it is not what was given itself."""
    recognised: bool = True
    """False: the user says that it is this layout."""

    @property
    def path(self) -> Path:
        """What is read of it."""
        return self.tree.where / self.within if self.within else self.tree.where


class Layout(ABC):
    """How a data set lies. Nothing but ``open`` needs to be defined; then it is read where ``--layout`` names it."""

    title: ClassVar[str] = ""
    """For people, where it is recognised."""
    options: ClassVar[tuple[str, ...]] = ()
    """Options of `ecgscale ingest` that say something about it; any other is refused rather than ignored."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of single files that are a data set of it."""
    reads_archives: ClassVar[bool] = False
    """Whether an archive is read as if it had been unpacked."""

    @classmethod
    def is_here(cls, tree: Tree) -> bool:
        """Whether it is recognised by its files."""
        return False

    @classmethod
    def has_part(cls, name: str) -> bool:
        """Whether its recordings lie in a folder of that name."""
        return False

    @classmethod
    def has_shape(cls, tree: Tree) -> bool:
        """Whether it is known by its folders, without its tables."""
        return False

    @classmethod
    def is_plain(cls, tree: Tree) -> bool:
        """Whether records that no layout recognises are read so; the first one of ours that says so counts."""
        return False

    @classmethod
    def why_not(cls, tree: Tree, forced: bool) -> list[str]:
        """Lines on why plain records that look like it are not taken for it; ``forced``: the user wants them plain."""
        return []

    @classmethod
    @abstractmethod
    def open(cls, place: Place, options: SourceOptions) -> OpenedSource:
        """The source; raises InputError for tables that are damaged and options that leave something open."""


class FileSource(Layout):
    """A layout that is its source too: derive a frozen dataclass, for it travels to other processes."""

    dataset: str
    """Name of the data set."""
    description: str
    """One line for people: what was recognised."""

    @abstractmethod
    def items(self) -> list[str]:
        """The names of the records, sorted."""

    @abstractmethod
    def read(self, item: str) -> Record:
        """One record; raises InputError that names the file and the reason."""

    def fingerprint(self, item: str) -> bytes:
        """What tells that a record's files have changed since an ingest was interrupted; here nothing."""
        return b""

    def unlabelled(self) -> list[str]:
        """Names of the records without a row in the user's table of labels; all of them where there is none."""
        return self.items()

    def left_out(self) -> list[str]:
        """Lines on what lies there and is not read, with the reason."""
        return []

    @property
    def labels(self) -> LabelTable | None:
        """The user's table of labels; None where there is none."""
        return None
