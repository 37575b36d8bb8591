"""Tables of labels (CSV) beside the recordings: which row belongs to which record, and what it says.

The tables are read once, into a table on disk that all worker processes share: a million rows cost a worker no memory.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from ecgscale.data.cells import PATIENT_KEYS, Cells, is_known
from ecgscale.data.csv_rows import CsvText, Row, split_line, swallowed
from ecgscale.data.disk_tables import being_filled, rows_of
from ecgscale.data.grouping import Grouping, patient_keys_in
from ecgscale.data.label_columns import LabelColumns
from ecgscale.data.matching import Matcher
from ecgscale.data.spellings import alike
from ecgscale.errors import InputError

if TYPE_CHECKING:
    from ecgscale.data.sources.scratch import Scratch

WITHOUT_NAME = re.compile(r"(unnamed: \d+(_level_\d+)?)?", re.IGNORECASE)  # the index column that pandas writes
_SCHEMA = "CREATE TABLE rows (item TEXT, file INT, line INT, cells TEXT, PRIMARY KEY (item, file)) WITHOUT ROWID"


@dataclass(frozen=True)
class CsvFile:
    """A CSV of a table, and which of its columns names the records."""

    text: CsvText
    record_column: str
    contradiction: str = ""
    """A line on another column, which names fewer records, and others."""

    @property
    def path(self) -> Path:
        return self.text.path

    @property
    def columns(self) -> tuple[str, ...]:
        return self.text.columns


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The rows of one or several CSVs by record. Pickled, it is the path of its table on disk."""

    rows: Path
    scratch: Scratch  # holds the rows
    files: tuple[CsvFile, ...]
    label_columns: LabelColumns = ()
    patient_columns: tuple[str, ...] = ()
    """Of each file that has one, the first of PATIENT_KEYS that is known in any row; alike but for capitals."""
    passed_over: tuple[str, ...] = ()
    """Lines on other columns of patients, which name the same persons."""
    rows_of_none: int = 0
    """Rows that name no record."""
    row_of_none: str = ""
    """Where the first of them stands, and what it names."""
    contradiction: str = ""
    """What is wrong where the patients stand in columns of different names, or that name other persons."""

    @property
    def columns(self) -> list[str]:
        """All columns, those of later files behind."""
        return list(dict.fromkeys(column for file in self.files for column in file.columns))

    @property
    def remarks(self) -> list[str]:
        """Lines on files that are not written the usual way, and how they were read."""
        of_files = [line for file in self.files for line in (file.text.remark, file.contradiction) if line]
        return [*of_files, *self.passed_over]

    def row(self, item: str) -> dict[str, str]:
        """The record's row: column -> cell; empty where the tables have none."""
        row: dict[str, str] = {}
        for number, _, cells in self._rows(item):
            cell_of_column = dict(zip(self.files[number].columns, json.loads(cells), strict=True))
            row |= {column: cell for column, cell in cell_of_column.items() if cell.strip() or column not in row}
        return row

    def place(self, item: str) -> str:
        """The file and line of the record's row, for errors."""
        return " and ".join(f"{self.files[number].path}: line {line}" for number, line, _ in self._rows(item))

    def coverage(self, items: Sequence[str]) -> list[str]:
        """A line for each of several files: of how many of the records it has a row."""
        if len(self.files) == 1:
            return []
        counts = Counter(number for item in items for number, _, _ in self._rows(item))
        return [
            f"{counts[number]} of {len(items)} records have a row in {file.path}"
            for number, file in enumerate(self.files)
        ]

    def __contains__(self, item: str) -> bool:
        return bool(self._rows(item))

    def _rows(self, item: str) -> list[tuple[int, int, str]]:
        query = "SELECT file, line, cells FROM rows WHERE item = ? ORDER BY file"
        return list(rows_of(self.rows, query, item))


def paths_of(labels_csv: Path | Sequence[Path] | None) -> tuple[Path, ...]:
    """One CSV, several, or none."""
    return () if labels_csv is None else (labels_csv,) if isinstance(labels_csv, Path) else tuple(labels_csv)


def load_label_table(
    csv_paths: Sequence[Path],
    matcher: Matcher,
    scratch: Scratch,
    record_column: str | None = None,
    label_columns: LabelColumns = (),
) -> LabelTable:
    """Match the rows of CSVs (see ``csv_rows``; first line = column names) with records; several CSVs are one table.

    The column that names the record is ``record_column`` or, of those that the matcher knows, the one that names the
    most records. Rows of records that are not there are counted. ``scratch`` takes the table.

    Raises InputError if a file is no such CSV, lacks the record column, names no record at all, names one twice or two
    in two columns, if two files contradict each other, or if a column of ``label_columns`` is missing.
    """
    path = scratch.path / "labels.sqlite"
    with being_filled(path) as table:
        table.execute(_SCHEMA)
        filling = _Filling(table, matcher)
        for csv_path in csv_paths:
            filling.take(csv_path, record_column)
            table.commit()
    column_of = {one.path: one.column for one in filling.patients if one.column}
    done = LabelTable(
        path,
        scratch,
        tuple(filling.files),
        label_columns,
        tuple(dict.fromkeys(column_of.values())),
        tuple(line for one in filling.patients for line in one.passed_over()),
        filling.rows_of_none,
        filling.row_of_none,
        _contradiction(column_of) or "; ".join(filter(None, (one.refusal() for one in filling.patients))),
    )
    _check_label_columns(done)
    return done


class _Filling:
    """A table that takes one CSV after the other, and what is learnt of them meanwhile."""

    def __init__(self, table: sqlite3.Connection, matcher: Matcher) -> None:
        self._table, self._matcher = table, matcher
        self.files: list[CsvFile] = []
        self.patients: list[_Patients] = []
        self.rows_of_none, self.row_of_none = 0, ""

    def take(self, csv_path: Path, record_column: str | None) -> None:
        """Match the rows of a CSV. Raises InputError as ``load_label_table`` does."""
        text = CsvText.open(csv_path)
        _check_columns(text)
        _check_spelling(text, self.files)
        file = CsvFile(text, *_record_column(text, self._matcher, record_column))
        self.files.append(file)
        self.patients.append(_Patients(file))
        at = text.columns.index(file.record_column)
        matched, first_cell = 0, ""
        for row in text.rows():
            _check_nothing_swallowed(file, row, at, self._matcher)
            line, cells, _ = row
            first_cell = first_cell or cells[at]
            item = _record_of(file, line, cells[at], self._matcher)
            if item is None:
                self.rows_of_none += 1
                self.row_of_none = self.row_of_none or f"{csv_path}: line {line}: {cells[at]!r}"
                continue
            matched += 1
            self.patients[-1].add(cells)
            _insert(self._table, self.files, item, line, cells)
        if not matched:
            candidates = " or ".join(self._matcher.columns(text.columns, record_column, csv_path))
            raise InputError(
                f"{csv_path}: column {candidates} names no record below {self._matcher.source}: it says "
                f"{first_cell!r}, {self._matcher.example()}"
            )


class _Patients:
    """The columns of a file that name patients, and whether they name the same ones."""

    def __init__(self, file: CsvFile) -> None:
        self.path = file.path
        columns = patient_keys_in(file.columns)
        self._place = {column: file.columns.index(column) for column in columns}
        self._known: set[str] = set()
        self._groupings = [Grouping(one, other) for one, other in combinations(columns, 2)]

    def add(self, cells: Sequence[str]) -> None:
        """A row that names a record."""
        if len(self._known) < len(self._place):
            self._known |= {column for column, place in self._place.items() if is_known(cells[place])}
        for grouping in self._groupings:
            keys = (grouping.key, grouping.other_key)
            grouping.add(*(Cells().text(cells[self._place[key]], key) for key in keys))

    @property
    def column(self) -> str:
        """The one that counts: the first that is known in any row; "" for none."""
        return next((column for column in self._place if column in self._known), "")

    def _others(self) -> list[Grouping]:
        return [one for one in self._groupings if one.key == self.column and one.other_key in self._known]

    def refusal(self) -> str:
        """What is wrong where others name other persons; "" for nothing."""
        return next((f"{self.path}: {refusal}" for one in self._others() if (refusal := one.refusal())), "")

    def passed_over(self) -> list[str]:
        """Lines on others that name the same persons."""
        return [
            f"{self.path}: {one.key} and {one.other_key} name the same patients; {one.key} counts"
            for one in self._others()
            if not one.contradiction
        ]


def _insert(table: sqlite3.Connection, files: Sequence[CsvFile], item: str, line: int, cells: list[str]) -> None:
    """Raises InputError for a record that has a row in this file already, or contradicts one of another file."""
    file = files[-1]
    if len(files) > 1:
        query = "SELECT file, line, cells FROM rows WHERE item = ?"
        for number, other_line, other_cells in table.execute(query, (item,)):
            if number < len(files) - 1:
                _check_agree(file, line, cells, files[number], other_line, json.loads(other_cells))
    try:
        row = (item, len(files) - 1, line, json.dumps(cells, ensure_ascii=False))
        table.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", row)
    except sqlite3.IntegrityError as error:
        ((earlier,),) = table.execute("SELECT line FROM rows WHERE item = ? AND file = ?", (item, len(files) - 1))
        raise InputError(
            f"{file.path}: line {line}: record {item} stands twice, first in line {earlier}; each may have one row, "
            "with several classes in a cell as A|B"
        ) from error


def _check_agree(
    file: CsvFile, line: int, cells: list[str], other: CsvFile, other_line: int, other_cells: list[str]
) -> None:
    reader, others = Cells(), dict(zip(other.columns, other_cells, strict=True))
    for column, cell in zip(file.columns, cells, strict=True):
        if column in (file.record_column, other.record_column) or WITHOUT_NAME.fullmatch(column):
            continue
        values = [reader.text(one, column) for one in (cell, others.get(column))]
        if None not in values and values[0] != values[1]:
            raise InputError(
                f"{file.path}: line {line}: {column} is {cell!r}, but {others[column]!r} in {other.path}: line "
                f"{other_line}; of one record the tables must say one thing"
            )


def _contradiction(column_of: Mapping[Path, str]) -> str:
    """What is wrong where the tables have their patients in columns of different names; "" for nothing."""
    if len({column.casefold() for column in column_of.values()}) < 2:
        return ""
    columns = " and ".join(f"{column} of {path}" for path, column in column_of.items())
    return f"the patients stand in {columns}; call the columns alike, or name one by --patient-key"


def _check_label_columns(table: LabelTable) -> None:
    flags = {column for _, columns in table.label_columns for column in columns}
    for column in flags.difference(table.columns):
        near = get_close_matches(column, table.columns, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the columns are {', '.join(table.columns)}"
        raise InputError(f"--label-columns: no column {column!r} in the labels; {hint}")
    for name, _ in table.label_columns:
        if name in set(table.columns) - flags:
            raise InputError(f"--label-columns: {name!r} is a column already; name the label otherwise: NAME=A,B,C")


def _check_columns(text: CsvText) -> None:
    named = [column for column in text.columns if not WITHOUT_NAME.fullmatch(column)]
    if repeated := sorted({column for column in named if named.count(column) > 1}):
        raise InputError(f"{text.path}: column {repeated[0]!r} stands {named.count(repeated[0])} times")


def _check_spelling(text: CsvText, others: Sequence[CsvFile]) -> None:
    """Raises InputError for a column that another file writes otherwise: they would be two labels."""
    for other in others:
        for column in text.columns:
            spelt = next((name for name in other.columns if alike(name) == alike(column)), column)
            if (
                column not in other.columns
                and spelt != column
                and alike(column)
                and column.casefold() not in PATIENT_KEYS
            ):
                raise InputError(f"{text.path}: column {column!r} is {spelt!r} in {other.path}; write it alike in both")


def _check_nothing_swallowed(file: CsvFile, row: Row, at: int, matcher: Matcher) -> None:
    """Raises InputError where a line inside of a row is the row of another record: a quote was not closed."""
    for number, line in enumerate(row.inner_lines, row.line + 1):
        cells = split_line(line, file.text.delimiter)
        if len(cells) == len(file.columns) and _records_or_none(
            matcher, file.record_column, cells[at], file.path.parent
        ):
            raise swallowed(str(file.path), row.line, number)


def _records_or_none(matcher: Matcher, column: str, cell: str, csv_folder: Path) -> Sequence[str]:
    """Those that a cell may name; none for a cell that can name none."""
    try:
        return matcher.records(column, cell, csv_folder)
    except InputError:
        return ()


def _record_column(text: CsvText, matcher: Matcher, record_column: str | None) -> tuple[str, str]:
    """The column that names the most records, and a line on one that names others.

    Raises InputError where two name as many, and others.
    """
    path, columns = text.path, text.columns
    candidates = matcher.columns(columns, record_column, path)
    if len(candidates) == 1:
        return candidates[0], ""
    matched = Counter[str]()
    contradictions: dict[str, str] = {}
    for line, cells, _ in text.rows():
        records = {
            column: _records_or_none(matcher, column, cells[columns.index(column)], path.parent)
            for column in candidates
        }
        named = {column: items[0] for column, items in records.items() if len(items) == 1}
        matched.update(named.keys())
        if len(set(named.values())) > 1:
            for column, item in named.items():
                contradictions.setdefault(column, f"line {line}: {column} names the record {item}")
    best = max(candidates, key=lambda column: matched[column])
    told = ""
    for column in candidates:
        if column == best or not {column, best} <= contradictions.keys():
            continue
        others = f"{path}: {contradictions[best]}, {column} another"
        if matched[column] == matched[best]:
            raise InputError(f"{others}; say which one counts with --record-column")
        told = told or f"{others}; {best} counts, since it names more records; if it should not, give --record-column"
    return best, told


def _record_of(file: CsvFile, line: int, cell: str, matcher: Matcher) -> str | None:
    try:
        records = matcher.records(file.record_column, cell, file.path.parent)
    except InputError as error:
        raise InputError(f"{file.path}: line {line}: {file.record_column} {error}") from error
    if len(records) > 1:
        raise InputError(
            f"{file.path}: line {line}: {file.record_column} {cell!r} could be {records[0]} or {records[1]}; "
            "give the path below the folder"
        )
    return records[0] if records else None
