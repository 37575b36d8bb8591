"""A table of labels (CSV) beside the recordings: which row belongs to which record, and what it says."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ecgscale.errors import InputError, unreadable

RECORD_COLUMNS = ("record", "filename", "filename_hr", "ecg_id", "name")
PATIENT_KEYS = ("patient_id", "patientid", "subject_id", "patient")
METADATA_KEYS = ("age", "sex")
_DATA_SUFFIXES = (".hea", ".dat", ".mat")
_UNKNOWN = ("", "unknown", "nan")


@dataclass(frozen=True)
class LabelTable:
    """The rows of a CSV by record. ``row(item)`` is the record's row, or empty where the table has none."""

    record_column: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]  # record name -> column -> value

    def row(self, item: str) -> Mapping[str, str]:
        return self.rows.get(item, {})


def load_label_table(path: Path, root: Path, items: Sequence[str], record_column: str | None = None) -> LabelTable:
    """Match the rows of a CSV (UTF-8, first line = column names) with the records ``items`` below ``root``.

    A row names its record by the path below ``root`` or below the CSV's own folder, or by its base name, with
    or without suffix. The column is ``record_column``, or the first of RECORD_COLUMNS that names at least one
    record. Rows of records that are not there are left out.

    Raises InputError if the file is no such CSV, lacks the record column, names no record at all, names one
    twice, or names one by a base name that several share.
    """
    columns, rows = read_rows(path)
    wanted = RECORD_COLUMNS if record_column is None else (record_column,)
    present = [column for name in wanted if (column := find_key(columns, name)) is not None]
    if not present:
        raise InputError(
            f"{path}: no column {' or '.join(wanted)} that names the record; the columns are {', '.join(columns)}"
        )
    matcher = _Matcher(root, path.parent, items)
    for column in present:
        if matched := matcher.match(path, column, rows):
            return LabelTable(column, tuple(columns), matched)
    example = rows[0][1][present[0]] if rows else ""
    raise InputError(
        f"{path}: column {' or '.join(present)} names no record below {root}: it says {example!r}, "
        f"a record is called {items[0] if items else ''!r}"
    )


def find_key(keys: Iterable[str], wanted: str) -> str | None:
    """The key that equals ``wanted``, upper or lower case alike."""
    return next((key for key in keys if key.strip().casefold() == wanted.strip().casefold()), None)


def is_known(value: str) -> bool:
    """Whether a value of a header or table says anything: not empty, ``Unknown`` or ``NaN``."""
    return value.strip().casefold() not in _UNKNOWN


@dataclass(frozen=True)
class Description:
    """What header and table say about a record."""

    patient: str | None
    labels: dict[str, list[str]]
    metadata: dict[str, str]


def describe(
    comments: Iterable[str],
    table: LabelTable | None,
    item: str,
    patient_key: str | None = None,
    folder_name: str | None = None,
) -> Description:
    """Patient, labels and metadata of a record, by its header's ``Key: value`` comments and its table row.

    ``Dx`` (comma-separated codes) and the columns of the table (values split at ``|``) are labels; other
    comments, and age and sex from either, are metadata. What is empty, ``Unknown`` or ``NaN`` is left out of
    metadata. Where both speak, the table wins. The patient stands under ``patient_key``, in ``folder_name``
    for ``"@folder"``, otherwise under the first of PATIENT_KEYS that is there.

    Raises InputError where ``patient_key`` is given and exists neither as a column nor as a comment.
    """
    said = _key_values(comments)
    patient_keys: tuple[str, ...] = PATIENT_KEYS if patient_key is None or patient_key == "@folder" else (patient_key,)
    row = {} if table is None else table.row(item)
    if patient_key == "@folder":
        if folder_name is None:
            raise InputError("stands in the root itself; with patient '@folder' every patient has a folder")
        patient = folder_name
    else:
        if patient_key is not None and find_key([*said, *(table.columns if table else ())], patient_key) is None:
            raise InputError(f"no patient {patient_key!r}: neither a comment of the header nor a column of labels")
        patient = _first_known((row, said), patient_keys)
    metadata = {key: value for key in METADATA_KEYS if (value := _first_known((row, said), (key,)))}
    taken = {key.casefold() for key in (*patient_keys, *METADATA_KEYS)}
    metadata |= {key: value for key, value in said.items() if key.casefold() not in taken | {"dx"} and is_known(value)}
    codes = [code.strip() for code in _first_known((said,), ("Dx",)).split(",")]
    labels = {"Dx": [code for code in codes if is_known(code)]}
    if table is not None:
        taken.add(table.record_column.casefold())
    for column, value in row.items():
        if column.casefold() not in taken:
            labels[column] = [part.strip() for part in value.split("|") if part.strip()]
    return Description(patient or None, {key: values for key, values in labels.items() if values}, metadata)


def _key_values(comments: Iterable[str]) -> dict[str, str]:
    """``Key: value`` comments; of a repeated key the first."""
    found: dict[str, str] = {}
    for comment in comments:
        key, colon, value = comment.partition(":")
        if colon and key.strip():
            found.setdefault(key.strip(), value.strip())
    return found


def _first_known(places: Iterable[Mapping[str, str]], keys: Iterable[str]) -> str:
    """The first value that says anything, or an empty string."""
    for place in places:
        for wanted in keys:
            key = find_key(place, wanted)
            if key is not None and is_known(place[key]):
                return place[key].strip()
    return ""


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(column names, [(line number, column -> value)])."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = [column.strip() for column in next(reader, [])]
            numbered = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, "not a readable CSV of labels", error) from error
    if repeated := sorted({column for column in columns if columns.count(column) > 1}):
        raise InputError(f"{path}: column {repeated[0]!r} stands {columns.count(repeated[0])} times")
    for line, row in numbered:
        if len(row) != len(columns):
            raise InputError(f"{path}: line {line} has {len(row)} fields, the first line names {len(columns)} columns")
    return columns, [(line, dict(zip(columns, row, strict=True))) for line, row in numbered]


class _Matcher:
    """Values of a record column -> record names."""

    def __init__(self, root: Path, csv_folder: Path, items: Sequence[str]) -> None:
        self._items = set(items)
        self._root, self._csv_folder = root, csv_folder
        self._items_by_basename = defaultdict(list)
        for item in items:
            self._items_by_basename[PurePosixPath(item).name].append(item)

    def match(
        self, path: Path, column: str, rows: Sequence[tuple[int, dict[str, str]]]
    ) -> dict[str, Mapping[str, str]]:
        matched: dict[str, Mapping[str, str]] = {}
        for line, row in rows:
            candidates = self._candidates(row[column].strip())
            if len(candidates) > 1:
                raise InputError(
                    f"{path}: line {line}: {column} {row[column]!r} could be {candidates[0]} "
                    f"or {candidates[1]}; give the path below the folder"
                )
            for item in candidates:
                if item in matched:
                    raise InputError(f"{path}: line {line}: record {item} stands twice; each may have one row")
                matched[item] = row
        return matched

    def _candidates(self, value: str) -> Sequence[str]:
        if not value:
            return ()
        name = PurePosixPath(value)
        for stem in (name, name.with_suffix("")) if name.suffix in _DATA_SUFFIXES else (name,):
            if stem.as_posix() in self._items:
                return (stem.as_posix(),)
            if len(stem.parts) == 1 and (found := self._items_by_basename.get(stem.name)):
                return found
            below_csv = Path(os.path.relpath(self._csv_folder / stem, self._root)).as_posix()
            if below_csv in self._items:
                return (below_csv,)
        return ()
