"""WFDB records of a tree, with what the data set's own tables say about each."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from tqdm import tqdm

from ecgscale.data.description import Description
from ecgscale.data.label_columns import LabelColumns
from ecgscale.data.label_table import LabelTable, load_label_table, paths_of
from ecgscale.data.matching import NameMatcher, RecordIds
from ecgscale.data.plausibility import plausible
from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources.archive import Archive
from ecgscale.data.sources.catalogue import Catalogue
from ecgscale.data.sources.layout import Layout, Place
from ecgscale.data.sources.listing import header_names, left_out
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.errors import InputError
from ecgscale.record import Record

_PASSED_OVER = "a patient id of the header or of --labels passed over, since the data set's own table names another"

Described = Iterator[tuple[str, Description]]


@dataclass(frozen=True)
class CataloguedWfdb:
    """WFDB records that were listed when the source was opened.

    Where several speak of a record, the user's own table wins over the header, and both over the data set's tables;
    of the patient the data set's tables know best, and a note counts where another was named.
    """

    tree: Folder | Archive
    catalogue: Catalogue
    scratch: Scratch  # holds the catalogue
    dataset: str
    description: str
    labels_csv: Path | tuple[Path, ...] | None = None
    record_column: str | None = None
    patient_key: str | None = None
    ignore_leads: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """What was thought of the tree when it was opened, one line each."""
    others: Callable[[Tree], list[str]] | None = None
    """Lines on what lies in the tree and is not read."""
    rename_leads: tuple[tuple[str, str], ...] = ()
    label_columns: LabelColumns = ()
    record_ids: RecordIds | None = None
    """The number by which the data set calls its records."""

    def items(self) -> list[str]:
        """Sorted names of the records; raises InputError if ``labels_csv`` does not fit."""
        _ = self.labels  # read before the source is handed to workers, which share it
        return self.catalogue.items()

    def read(self, item: str) -> Record:
        """The record of that name; raises InputError that names the file and the reason (see read_wfdb, plausible)."""
        said = self.catalogue.describe(item)
        if said.fault:
            raise InputError(said.fault)
        record = self.tree.read(
            item,
            labels=self.labels,
            patient_key=self.patient_key,
            ignore_leads=self.ignore_leads,
            rename_leads=self.rename_leads,
        )
        notes = Counter(said.notes) + Counter(record.notes)
        for name, one in (said.labels | said.metadata).items():
            if (record.labels | record.metadata).get(name, one) != one:
                notes[f"{name} of the data set's own table passed over, since the header or --labels says another"] += 1
        if said.patient is not None and record.patient not in (None, said.patient):
            notes[_PASSED_OVER] += 1
        return replace(
            plausible(record, self.tree.where / f"{item}.hea"),
            patient=said.patient or record.patient,
            patient_key="" if said.patient else record.patient_key,
            labels=said.labels | record.labels,
            metadata=said.metadata | record.metadata,
            notes=dict(notes),
        )

    def fingerprint(self, item: str) -> bytes:
        """Its headers and samples, and what the data set's tables say of it."""
        return self._said(item) + self.tree.fingerprint(item)

    def stamp(self, item: str) -> bytes:
        """The same without reading samples."""
        return self._said(item) + self.tree.stamp(item)

    def _said(self, item: str) -> bytes:
        return repr(self.catalogue.describe(item)).encode(errors="backslashreplace")

    def unlabelled(self) -> list[str]:
        """Names of the records without a row in ``labels_csv``; all of them where there is no such file."""
        labels = self.labels
        return [item for item in self.items() if labels is None or item not in labels]

    def left_out(self) -> list[str]:
        """Lines on what is not read, and why."""
        return [*self.hints, *(self.others(self.tree) if self.others else ())]

    @functools.cached_property
    def labels(self) -> LabelTable | None:
        """The table of the user's; None where there is none."""
        if not (csv_paths := paths_of(self.labels_csv)):
            return None
        matcher = NameMatcher(self.tree.where, self.catalogue.items(), self.record_ids)
        return load_label_table(csv_paths, matcher, Scratch.make(), self.record_column, self.label_columns)


def all_headers(tree: Tree) -> list[str]:
    """What is not read where all WFDB records of a tree are."""
    return left_out(tree.contents(), ".hea")


class Absent:
    """Records that a table names and that are not there; ``remarks`` takes other lines on the tables."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""
        self.remarks: list[str] = []

    def add(self, item: str) -> None:
        self.count += 1
        self.first = self.first or item

    def lines(self) -> list[str]:
        said = f"left out: {self.count} records that the tables name and that are not there; the first is {self.first}"
        return [said, *self.remarks] if self.count else self.remarks


def not_named(tree: Tree, within: str, table: str, named: Set[str]) -> list[str]:
    """A line on the WFDB headers of a folder ("" is the root) that a table does not name."""
    prefix = f"{within}/" if within else ""
    items = (f"{prefix}{name}" for name in header_names(tree.below(within).contents()))
    others = [item for item in items if item not in named]
    return [f"left out: {len(others)} records that {table} does not name; the first is {min(others)}"] if others else []


def lies_in(item: str, within: str) -> bool:
    """Whether a record lies in a folder; "" is the root."""
    return not within or item.startswith(f"{within}/")


def catalogued(
    tree: Folder | Archive,
    scratch: Scratch,
    described: Described,
    description: str,
    options: SourceOptions,
    hints: Sequence[str] = (),
    others: Callable[[Tree], list[str]] | None = None,
    absent: Absent | None = None,
    record_ids: RecordIds | None = None,
) -> CataloguedWfdb:
    """The source of the records that ``described`` gives; ``{n}`` in the description becomes their number.

    ``described`` fills ``absent``.
    """
    catalogue = Catalogue.make(scratch.path / "records.sqlite")
    try:
        repeated = catalogue.add_records(tqdm(described, desc="list", unit="rec", disable=None))
    except InputError as error:
        raise error if str(error).startswith(str(tree.where)) else InputError(f"{tree.where}: {error}") from error
    if not (n := catalogue.n_records()):
        raise InputError(f"{tree.where}: no WFDB record (*.hea) in it, or none that its tables name")
    return CataloguedWfdb(
        tree,
        catalogue,
        scratch,
        options.dataset or "",
        description.replace("{n}", str(n)),
        options.labels_csv,
        options.record_column,
        options.patient_key,
        options.ignore_leads,
        (*hints, *repeated, *(absent.lines() if absent else ())),
        others,
        rename_leads=options.rename_leads,
        label_columns=options.label_columns,
        record_ids=record_ids,
    )


class Presence:
    """Which files of a table are there, asked folder by folder."""

    def __init__(self, tree: Tree) -> None:
        self._children = functools.lru_cache(maxsize=8)(tree.children)

    def __contains__(self, name: str) -> bool:
        folder, _, child = name.rpartition("/")
        return child in self._children(folder)


class About(NamedTuple):
    """What the tables of a known set say."""

    described: Described
    description: str
    """One line for people, ``{n}`` is the number of records."""
    others: Callable[[Tree], list[str]]
    """Lines on what is left out."""


class KnownWfdb(Layout):
    """A known data set of WFDB records, which its own tables or folders describe."""

    marks: ClassVar[str]
    """What it is recognised by, for people."""
    record_ids: ClassVar[RecordIds | None] = None
    """The number by which tables may name its records."""
    options: ClassVar[tuple[str, ...]] = (
        *("--labels", "--label-columns", "--record-column"),
        *("--ignore-leads", "--rename-leads"),
    )
    reads_archives = True

    @classmethod
    @abstractmethod
    def about(cls, place: Place, scratch: Scratch, absent: Absent) -> About:
        """What is known of the records; ``scratch`` has room for tables, ``absent`` takes what is not there."""

    @classmethod
    def open(cls, place: Place, options: SourceOptions) -> CataloguedWfdb:
        tree = place.tree
        if not place.recognised:
            raise InputError(f"{tree.where}: no {cls.marks} in it, so not layout {place.layout}; leave --layout out")
        assert isinstance(tree, Folder | Archive)
        scratch, absent = tree.disk if isinstance(tree, Archive) else Scratch.make(), Absent()
        try:
            about = cls.about(place, scratch, absent)
            description = f"{about.description}; {place.how}" if place.how else about.description
            known = (about.others, absent, cls.record_ids)
            return catalogued(tree, scratch, about.described, description, options, (), *known)
        except InputError as error:
            if options.layout != "auto":
                raise
            raise InputError(
                f"{error} (taken for {cls.title} because of {cls.marks}; --layout wfdb reads plain records)"
            ) from error
