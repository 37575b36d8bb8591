"""What header and tables say about a record: its patient, labels and metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ecgscale.data.cells import PATIENT_KEYS, Cells, find_key, is_known
from ecgscale.data.label_table import WITHOUT_NAME, LabelTable
from ecgscale.errors import InputError

METADATA_KEYS = ("age", "sex")


@dataclass(frozen=True)
class Description:
    """What header and table say about a record."""

    patient: str | None
    labels: dict[str, list[str]]  # []: known to have none of the classes; no key: nothing is known
    metadata: dict[str, str]
    notes: dict[str, int] = field(default_factory=dict)  # what was done to cells (see ``Cells``) -> how often
    fault: str = ""  # why the record cannot be used, by the data set's own tables
    place: str = ""  # the data set's own table and line that say it


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
        if column.casefold() not in taken and column not in left_out and not WITHOUT_NAME.fullmatch(column)
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
