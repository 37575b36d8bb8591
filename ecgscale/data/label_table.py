"""Tables of labels (CSV) beside the recordings: which row belongs to which record, and what it says.

The tables are read once, into a table on disk that all worker processes share: a million rows cost a worker no memory.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ecgscale.data.cells import PATIENT_KEYS, Cells, find_key, has_likelihoods, is_known
from ecgscale.data.label_columns import LabelColumns
from ecgscale.errors import InputError, MachineError, file_error

if TYPE_CHECKING:
    from ecgscale.data.sources.scratch import Scratch

RECORD_COLUMNS = ("record", "filename", "filename_hr", "ecg_id", "name")
METADATA_KEYS = ("age", "sex")
_DATA_SUFFIXES = (".hea", ".dat", ".mat", ".npy", ".npz", ".flac", ".edf", ".xml", ".dcm", ".csv", ".h5", ".hdf5")
_WITHOUT_NAME = re.compile(r"(unnamed: \d+(_level_\d+)?)?", re.IGNORECASE)  # the index column that pandas writes
_SCHEMA = "CREATE TABLE rows (item TEXT, file INT, line INT, cells TEXT, PRIMARY KEY (item, file)) WITHOUT ROWID"


@dataclass(frozen=True)
class CsvFile:
    """A CSV of a table, and which of its columns names the records."""

    path: Path
    columns: tuple[str, ...]
    record_column: str


@dataclass(frozen=True, eq=False)
class LabelTable:
    """The rows of one or several CSVs by record. Pickled, it is the path of its table on disk."""

    rows: Path
    scratch: Scratch  # holds the rows
    files: tuple[CsvFile, ...]
    label_columns: LabelColumns = ()
    likelihoods: frozenset[str] = frozenset()
    """Columns of likelihoods in percent."""
    patient_column: str | None = None
    """The first of PATIENT_KEYS that is known in any row: ids of two columns may be of two kinds."""
    rows_of_none: int = 0
    """Rows that name no record."""
    row_of_none: str = ""
    """Where the first of them stands, and what it names."""
    contradiction: str = ""
    """What is wrong where the files have their patients in columns of different names."""

    @property
    def columns(self) -> list[str]:
        """All columns, those of later files behind."""
        return list(dict.fromkeys(column for file in self.files for column in file.columns))

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

    def __contains__(self, item: str) -> bool:
        return bool(self._rows(item))

    def _rows(self, item: str) -> list[tuple[int, int, str]]:
        query = "SELECT file, line, cells FROM rows WHERE item = ? ORDER BY file"
        return list(rows_of(self.rows, query, item))


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


class Matcher(Protocol):
    """How the cells of a record column name records."""

    source: Path
    """Where the records are."""

    def columns(self, columns: Sequence[str], record_column: str | None, path: Path) -> list[str]:
        """Those that may name records, the likeliest first; raises InputError where there is none."""

    def records(self, cell: str, csv_folder: Path) -> Sequence[str]:
        """The records that a cell may name, none, one or several. Raises InputError for a cell that can name none."""

    def example(self) -> str:
        """What a record is called, for errors."""


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
    """Match the rows of CSVs (UTF-8, first line = column names) with records; several CSVs are one table.

    The column that names the record is ``record_column`` or, of those that the matcher knows, the one that names the
    most records. Rows of records that are not there are counted. ``scratch`` takes the table.

    Raises InputError if a file is no such CSV, lacks the record column, names no record at all, names one twice or two
    in two columns, if two files contradict each other, or if a column of ``label_columns`` is missing.
    """
    path = scratch.path / "labels.sqlite"
    files: list[CsvFile] = []
    likelihoods: set[str] = set()
    with_patients: dict[Path, set[str]] = {}
    rows_of_none, row_of_none = 0, ""
    with being_filled(path) as table:
        table.execute(_SCHEMA)
        for csv_path in csv_paths:
            columns = _columns(csv_path)
            file = CsvFile(csv_path, tuple(columns), _record_column(csv_path, columns, matcher, record_column))
            files.append(file)
            at = columns.index(file.record_column)
            places = ((key, find_key(columns, key)) for key in PATIENT_KEYS)
            patient_keys = [(key, columns.index(column)) for key, column in places if column is not None]
            matched, first_cell = 0, ""
            named = with_patients.setdefault(csv_path, set())
            for line, cells in _lines(csv_path):
                first_cell = first_cell or cells[at]
                item = _record_of(file, line, cells[at], matcher)
                if item is None:
                    rows_of_none += 1
                    row_of_none = row_of_none or f"{csv_path}: line {line}: {cells[at]!r}"
                    continue
                matched += 1
                likelihoods |= {
                    column
                    for column, cell in zip(columns, cells, strict=True)
                    if cell[:1] == "{" and column not in likelihoods and has_likelihoods(cell)
                }
                named |= {key for key, place in patient_keys if key not in named and is_known(cells[place])}
                _insert(table, files, item, line, cells)
            table.commit()
            if not matched:
                candidates = " or ".join(matcher.columns(columns, record_column, csv_path))
                raise InputError(
                    f"{csv_path}: column {candidates} names no record below {matcher.source}: it says {first_cell!r}, "
                    f"{matcher.example()}"
                )
    column_of = {
        csv_path: next(key for key in PATIENT_KEYS if key in named)
        for csv_path, named in with_patients.items()
        if named
    }
    done = LabelTable(
        path,
        scratch,
        tuple(files),
        label_columns,
        frozenset(likelihoods),
        next(iter(column_of.values()), None),
        rows_of_none,
        row_of_none,
        _contradiction(column_of),
    )
    _check_label_columns(done)
    return done


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
        raise InputError(f"{file.path}: line {line}: record {item} stands twice; each may have one row") from error


def _check_agree(
    file: CsvFile, line: int, cells: list[str], other: CsvFile, other_line: int, other_cells: list[str]
) -> None:
    reader, others = Cells(), dict(zip(other.columns, other_cells, strict=True))
    for column, cell in zip(file.columns, cells, strict=True):
        if column in (file.record_column, other.record_column) or _WITHOUT_NAME.fullmatch(column):
            continue
        values = [reader.text(one, column) for one in (cell, others.get(column))]
        if None not in values and values[0] != values[1]:
            raise InputError(
                f"{file.path}: line {line}: {column} is {cell!r}, but {others[column]!r} in {other.path}: line "
                f"{other_line}; of one record the tables must say one thing"
            )


def _contradiction(column_of: Mapping[Path, str]) -> str:
    """What is wrong where the tables have their patients in columns of different names; "" for nothing."""
    if len(set(column_of.values())) < 2:
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


def _columns(path: Path) -> list[str]:
    columns = [column.strip() for column in next((cells for _, cells in _read(path)), [])]
    named = [column for column in columns if not _WITHOUT_NAME.fullmatch(column)]
    if repeated := sorted({column for column in named if named.count(column) > 1}):
        raise InputError(f"{path}: column {repeated[0]!r} stands {columns.count(repeated[0])} times")
    return columns


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row."""
    rows = _read(path)
    _, columns = next(rows)
    for line, cells in rows:
        if len(cells) != len(columns):
            raise InputError(
                f"{path}: line {line} has {len(cells)} fields, the first line names {len(columns)} columns"
            )
        yield line, cells


def _read(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the first line and each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
    except OSError as error:
        raise file_error(path, "not a readable CSV of labels", error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV of labels ({error})") from error


def _record_column(path: Path, columns: list[str], matcher: Matcher, record_column: str | None) -> str:
    """The column that names the most records. Raises InputError where two name as many, and others."""
    candidates = matcher.columns(columns, record_column, path)
    if len(candidates) == 1:
        return candidates[0]
    matched = Counter[str]()
    contradictions: dict[str, str] = {}
    for line, cells in _lines(path):
        records = {column: matcher.records(cells[columns.index(column)], path.parent) for column in candidates}
        named = {column: items[0] for column, items in records.items() if len(items) == 1}
        matched.update(named.keys())
        if len(set(named.values())) > 1:
            for column, item in named.items():
                contradictions.setdefault(column, f"line {line}: {column} names the record {item}")
    best = max(candidates, key=lambda column: matched[column])
    for column in candidates:
        if column != best and matched[column] == matched[best] and {column, best} <= contradictions.keys():
            raise InputError(
                f"{path}: {contradictions[best]}, {column} another; say which one counts with --record-column"
            )
    return best


def _record_of(file: CsvFile, line: int, cell: str, matcher: Matcher) -> str | None:
    try:
        records = matcher.records(cell, file.path.parent)
    except InputError as error:
        raise InputError(f"{file.path}: line {line}: {file.record_column} {error}") from error
    if len(records) > 1:
        raise InputError(
            f"{file.path}: line {line}: {file.record_column} {cell!r} could be {records[0]} or {records[1]}; "
            "give the path below the folder"
        )
    return records[0] if records else None


# -- which record a row names ----------------------------------------------------------------------------------------


class NameMatcher:
    """By the path below ``root`` or below the CSV's own folder, or by the base name, with or without suffix."""

    def __init__(self, root: Path, items: Sequence[str]) -> None:
        self.source, self._first = root, items[0] if items else ""
        self._items = frozenset(items)
        self._prefix = os.path.normpath(root.absolute()).rstrip("/") + "/"

    def columns(self, columns: Sequence[str], record_column: str | None, path: Path) -> list[str]:
        wanted = RECORD_COLUMNS if record_column is None else (record_column,)
        present = [column for name in wanted if (column := find_key(columns, name)) is not None]
        if not present:
            raise InputError(
                f"{path}: no column {' or '.join(wanted)} that names the record; the columns are {', '.join(columns)}"
            )
        return present

    def records(self, cell: str, csv_folder: Path) -> Sequence[str]:
        value = cell.strip()
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
    def _by_basename(self) -> dict[str, tuple[str, ...]]:
        records: dict[str, tuple[str, ...]] = {}
        for item in sorted(self._items):
            if "/" in item:
                name = item.rpartition("/")[2]
                records[name] = (*records.get(name, ()), item)
        return records


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
        for name in wanted:
            if (column := find_key(columns, name)) is not None:
                return [column]
        raise InputError(
            f"{path}: no column {' or '.join(wanted)} that says which row of {self.source.name} each line is about, "
            f"from 0 to {len(self._names) - 1}; add one (--record-column NAME): the order of lines counts for nothing"
        )

    def records(self, cell: str, csv_folder: Path) -> Sequence[str]:
        text = Cells().identifier(cell, "row")
        if text is None:
            return ()
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < len(self._names)):
            raise InputError(f"{cell!r} is no row of {self.source.name}; rows count from 0 to {len(self._names) - 1}")
        return (self._names[int(text)],)

    def example(self) -> str:
        return f"{self.source.name} has the rows 0 to {len(self._names) - 1}"


# -- what is known of a record ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What header and table say about a record."""

    patient: str | None
    labels: dict[str, list[str]]  # []: known to have none of the classes; no key: nothing is known
    metadata: dict[str, str]
    notes: dict[str, int] = field(default_factory=dict)  # what was done to cells (see ``Cells``) -> how often
    fault: str = ""  # why the record cannot be used, by the data set's own tables


def describe(
    comments: Iterable[str],
    table: LabelTable | None,
    item: str,
    patient_key: str | None = None,
    folder_name: str | None = None,
) -> Description:
    """Patient, labels and metadata of a record, by its header's ``Key: value`` comments and its table row.

    ``Dx`` (all its lines) and the named columns of the table are labels; other comments, and age and sex from either,
    are metadata. What cells mean, ``Cells`` says; what is unknown is left out. Where both speak, the table
    wins. The patient stands under ``patient_key``, in ``folder_name`` for ``"@folder"``, otherwise under the first of
    PATIENT_KEYS that is there.

    Raises InputError where ``patient_key`` is given and exists neither as a column nor as a comment, where a header
    names two patients, and for cells that could mean two things.
    """
    values_of_comment = _key_values(comments)
    patient_keys: tuple[str, ...] = PATIENT_KEYS if patient_key is None or patient_key == "@folder" else (patient_key,)
    cells, row = Cells(), {} if table is None else table.row(item)
    if patient_key == "@folder":
        if folder_name is None:
            raise InputError("stands in the root itself; with patient '@folder' every patient has a folder")
        patient = cells.identifier(folder_name, "folder")
    else:
        columns = table.columns if table else []
        if patient_key is not None and find_key([*values_of_comment, *columns], patient_key) is None:
            raise InputError(f"no patient {patient_key!r}: neither a comment of the header nor a column of labels")
        in_table = _patient_columns(table, patient_key)
        patient = _patient(cells, row, values_of_comment, patient_keys, in_table)
        named_columns = [column for column in in_table if find_key(columns, column) is not None]
        if patient is not None and named_columns and _patient(Cells(), row, {}, (), named_columns) is None:
            cells.notes[f"a patient id of the header, for a record without one in column {named_columns[0]}"] += 1
    metadata: dict[str, str] = {}
    for key in METADATA_KEYS:
        for place in ({column: [cell] for column, cell in row.items()}, values_of_comment):
            texts = [text for one in _values(place, key) if (text := cells.text(one, key)) is not None]
            if texts and key not in metadata:
                metadata[key] = " | ".join(dict.fromkeys(texts))
    taken = {key.casefold() for key in (*patient_keys, *METADATA_KEYS)}
    for key, values in values_of_comment.items():
        known = [value for value in values if is_known(value)]
        if known and key.casefold() not in taken | {"dx"}:
            metadata[key] = " | ".join(dict.fromkeys(known))
    labels: dict[str, list[str]] = {}
    if (diagnoses := cells.listed(_values(values_of_comment, "Dx"), "Dx")) is not None:
        labels["Dx"] = diagnoses
    if table is not None and row:
        try:
            labels |= _labels_of_row(cells, table, row, taken)
        except InputError as error:
            raise InputError(f"{table.place(item)}: {error}") from error
    return Description(patient, labels, metadata, dict(cells.notes))


def _labels_of_row(cells: Cells, table: LabelTable, row: Mapping[str, str], taken: set[str]) -> dict[str, list[str]]:
    flags = {column for _, columns in table.label_columns for column in columns}
    left_out = flags | {file.record_column for file in table.files}
    values = {
        column: cells.classes(cell, column, column in table.likelihoods)
        for column, cell in row.items()
        if column.casefold() not in taken and column not in left_out and not _WITHOUT_NAME.fullmatch(column)
    }
    for name, columns in table.label_columns:
        values[name] = cells.flagged({column: row.get(column) for column in columns}, name)
    return {name: classes for name, classes in values.items() if classes is not None}


def _patient_columns(table: LabelTable | None, patient_key: str | None) -> Sequence[str]:
    if table is not None and patient_key is None and table.contradiction:
        raise InputError(table.contradiction)
    column = table.patient_column if table is not None and patient_key is None else patient_key
    return () if column is None else (column,)


def _patient(
    cells: Cells,
    row: Mapping[str, str],
    values_of_comment: Mapping[str, list[str]],
    keys: Sequence[str],
    columns: Sequence[str],
) -> str | None:
    """The first id that is known, of the row (its ``columns``) before the header (its ``keys``)."""
    of_row = {column: [cell] for column, cell in row.items()}
    for place, names in ((of_row, columns), (values_of_comment, keys)):
        for key in names:
            patients = {cells.identifier(value, key) for value in _values(place, key)} - {None}
            if len(patients) > 1:
                names = " and ".join(map(repr, sorted(filter(None, patients))))
                raise InputError(f"{key} names two patients, {names}; a recording is of one")
            if patients:
                return patients.pop()
    return None


def _key_values(comments: Iterable[str]) -> dict[str, list[str]]:
    """``Key: value`` comments; a key that is repeated, upper or lower case alike, has several values."""
    values: dict[str, list[str]] = {}
    for comment in comments:
        key, colon, value = comment.partition(":")
        if colon and key.strip():
            values.setdefault(find_key(values, key) or key.strip(), []).append(value.strip())
    return values


def _values(place: Mapping[str, list[str]], wanted: str) -> list[str]:
    key = find_key(place, wanted)
    return [] if key is None else place[key]
