"""What header and tables say about a record: its patient, labels and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ecgscale.data.cells import PATIENT_KEYS, Cells, find_key, is_known
from ecgscale.data.label_table import WITHOUT_NAME, LabelTable
from ecgscale.errors import InputError

METADATA_KEYS = ("age", "sex")
_SIGN = "[:=\uff1a]"  # the last is the colon of Chinese text


@dataclass(frozen=True)
class Description:
    """What header and table say about a record."""

    patient: str | None
    labels: dict[str, list[str]]  # []: known to have none of the classes; no key: nothing is known
    metadata: dict[str, str]
    notes: dict[str, int] = field(default_factory=dict)  # what was done to cells (see ``Cells``) -> how often
    fault: str = ""  # why the record cannot be used, by the data set's own tables
    place: str = ""  # the data set's own table and line that say it
    patient_key: str = ""  # the column or the comment that names the patient


def describe(
    comments: Iterable[str],
    table: LabelTable | None,
    item: str,
    patient_key: str | None = None,
    folder_name: str | None = None,
) -> Description:
    """Patient, labels and metadata of a record, by its header's ``Key: value`` comments (or ``=``) and its table row.

    ``Dx`` (all its lines) and the named columns of the table are labels; other comments, and age and sex from either,
    are metadata. Where a table has a column Dx, it alone counts for all records, since its classes may be other words
    than the headers' codes. What cells mean, ``Cells`` says; what is unknown is left out. Where both speak, the table
    wins, and what it contradicts is counted. The patient stands under ``patient_key``, in ``folder_name`` for
    ``"@folder"``, otherwise under any of PATIENT_KEYS.

    Raises InputError where ``patient_key`` is given and exists neither as a column nor as a comment, where a header
    names two patients, and for cells that could mean two things.
    """
    patient_keys: tuple[str, ...] = PATIENT_KEYS if patient_key is None or patient_key == "@folder" else (patient_key,)
    cells, row = Cells(), {} if table is None else table.row(item)
    values_of_comment = _key_values(cells, comments, (*patient_keys, *METADATA_KEYS, "Dx"))
    if patient_key == "@folder":
        if folder_name is None:
            raise InputError("stands in the root itself; with patient '@folder' every patient has a folder")
        patient, named_by = cells.identifier(folder_name, "folder"), patient_key
    else:
        columns = table.columns if table else []
        if patient_key is not None and find_key([*values_of_comment, *columns], patient_key) is None:
            raise InputError(f"no patient {patient_key!r}: neither a comment of the header nor a column of labels")
        in_table = [
            column for key in _patient_columns(table, patient_key) if (column := find_key(columns, key)) is not None
        ]
        patient, named_by = _patient(cells, row, values_of_comment, patient_keys, in_table)
    metadata: dict[str, str] = {}
    for key in METADATA_KEYS:
        for place in ({column: [cell] for column, cell in row.items()}, values_of_comment):
            texts = [text for one in _values(place, key) if (text := cells.text(one, key)) is not None]
            text = " | ".join(dict.fromkeys(texts))
            if len({*texts}) > 1:
                cells.notes[f"{key} with several values, all kept"] += 1
            if texts and metadata.setdefault(key, text) != text:
                cells.notes[passed_over(key)] += 1
    taken = {key.casefold() for key in (*patient_keys, *METADATA_KEYS)}
    for key, values in values_of_comment.items():
        known = [value for value in values if is_known(value)]
        if known and key.casefold() not in taken | {"dx"}:
            metadata[key] = " | ".join(dict.fromkeys(known))
    labels: dict[str, list[str]] = {}
    if table is not None and row:
        try:
            labels = _labels_of_row(cells, table, row, taken)
        except InputError as error:
            raise InputError(f"{table.place(item)}: {error}") from error
    diagnoses = cells.listed(_values(values_of_comment, "Dx"), "Dx")
    column = find_key(_label_names(table), "Dx")
    if diagnoses is not None and column is None:
        labels["Dx"] = diagnoses
    elif diagnoses is not None and column not in labels:
        cells.notes[f"Dx of the header passed over, since the tables have a column {column}, without a word on it"] += 1
    elif diagnoses is not None and column is not None and {*labels[column]} != {*diagnoses}:
        cells.notes[passed_over("Dx")] += 1
    return Description(patient, labels, metadata, dict(cells.notes), patient_key=named_by)


def passed_over(key: str) -> str:
    """The note of a record whose header is overruled by a table."""
    return f"{key} of the header passed over, since the table says another"


def _label_names(table: LabelTable | None) -> list[str]:
    """What the tables may have as labels."""
    return [] if table is None else [*table.columns, *(name for name, _ in table.label_columns)]


def _labels_of_row(cells: Cells, table: LabelTable, row: Mapping[str, str], taken: set[str]) -> dict[str, list[str]]:
    flags = {column for _, columns in table.label_columns for column in columns}
    left_out = flags | {file.record_column for file in table.files}
    values = {
        column: cells.classes(cell, column)
        for column, cell in row.items()
        if column.casefold() not in taken and column not in left_out and not WITHOUT_NAME.fullmatch(column)
    }
    for name, columns in table.label_columns:
        values[name] = cells.flagged({column: row.get(column) for column in columns}, name)
    return {name: classes for name, classes in values.items() if classes is not None}


def _patient_columns(table: LabelTable | None, patient_key: str | None) -> Sequence[str]:
    if table is not None and patient_key is None and table.contradiction:
        raise InputError(table.contradiction)
    if patient_key is not None:
        return (patient_key,)
    return () if table is None else table.patient_columns


def _patient(
    cells: Cells,
    row: Mapping[str, str],
    values_of_comment: Mapping[str, list[str]],
    keys: Sequence[str],
    columns: Sequence[str],
) -> tuple[str | None, str]:
    """The id of the row (its ``columns``), or else that of the header (its ``keys``), and what names it."""
    in_row, column = _only_id(cells, {column: [row[column]] for column in columns if column in row})
    if in_row is None:
        in_header, key = _only_id(cells, {key: _values(values_of_comment, key) for key in keys})
        if in_header is not None and columns:
            cells.notes[f"a patient id of the header, for a record without one in column {columns[0]}"] += 1
        return in_header, key
    any_key = dict.fromkeys((*keys, *PATIENT_KEYS))  # a column that --patient-key names may contradict the usual ones
    try:
        in_header, _ = _only_id(Cells(), {key: _values(values_of_comment, key) for key in any_key})
        is_other = in_header not in (None, in_row)
    except InputError:
        is_other = True
    if is_other:
        cells.notes[f"a patient id of the header passed over, since column {column} says another"] += 1
    return in_row, column


def _only_id(cells: Cells, values_of_key: Mapping[str, list[str]]) -> tuple[str | None, str]:
    """The id that is known under any of the keys, and the first of them. Raises InputError where two ids are."""
    key_of_id: dict[str, str] = {}
    for key, values in values_of_key.items():
        for value in values:
            if (patient := cells.identifier(value, key)) is not None:
                key_of_id.setdefault(patient, key)
    if len(key_of_id) < 2:
        return next(iter(key_of_id.items()), (None, ""))
    (one, key), (other, other_key) = sorted(key_of_id.items())[:2]
    if key == other_key:
        raise InputError(f"{key} names two patients, {one!r} and {other!r}; a recording is of one")
    raise InputError(
        f"it names two patients, {key} {one!r} and {other_key} {other!r}; say which key counts with --patient-key"
    )


def _key_values(cells: Cells, comments: Iterable[str], known_keys: Iterable[str]) -> dict[str, list[str]]:
    """``Key: value`` comments, also with ``=``; a key that is repeated, upper or lower case alike, has several values.

    Lines that seem to say something of a known key, and are not read so, are counted.
    """
    longest_first = "|".join(sorted(map(re.escape, known_keys), key=len, reverse=True))
    known_key = re.compile(rf"\b({longest_first})\b", re.IGNORECASE)
    values: dict[str, list[str]] = {}
    for comment in comments:
        key, *behind = (part.strip() for part in re.split(_SIGN, comment, maxsplit=1))
        if key and behind:
            values.setdefault(find_key(values, key) or key, []).append(behind[0])
            second = re.search(rf"{known_key.pattern}\s*{_SIGN}", behind[0], re.IGNORECASE)
            if second:
                cells.notes[f"a line of the header with {second[1]} behind another key, not read"] += 1
        elif (first := known_key.match(key)) and re.search(r"\w", key[first.end() :]):
            cells.notes[f"a line of the header that begins with {first[1]} and has no colon, not read"] += 1
    return values


def _values(place: Mapping[str, list[str]], wanted: str) -> list[str]:
    """Under all keys that are alike but for capitals."""
    return [value for key, values in place.items() if find_key((key,), wanted) is not None for value in values]
