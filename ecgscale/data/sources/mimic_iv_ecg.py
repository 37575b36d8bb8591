"""MIMIC-IV-ECG (Gow et al., PhysioNet 2023): record_list.csv, machine_measurements.csv, files/.

800,000 rows: both tables are read once, row by row, into tables on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ecgscale.data.cells import Cells, is_known
from ecgscale.data.description import Description
from ecgscale.data.matching import RecordIds
from ecgscale.data.sources.catalogue import Catalogue
from ecgscale.data.sources.catalogued import About, Absent, Described, KnownWfdb, Presence, lies_in, not_named
from ecgscale.data.sources.layout import Place
from ecgscale.data.sources.listing import header_names
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tables import Table, unreadable_row, whole_number
from ecgscale.data.sources.tree import Tree
from ecgscale.errors import InputError

RECORDS, MEASUREMENTS = "record_list.csv", "machine_measurements.csv"
DESCRIPTION = "MIMIC-IV-ECG: {n} records, patients from record_list.csv, label report "
_NO_REPORT = f"no report in {MEASUREMENTS}"
_COLUMNS = ("subject_id", "study_id", "ecg_time", "path")


_PATIENT_FOLDER = re.compile(r"(?:^|/)p(\d{8})/s(\d+)/[^/]+$")
_BY_FOLDERS = "MIMIC-IV-ECG: {n} records, patients by their folders, since there is no record_list.csv; label report "


def _study_id(item: str) -> str:
    """``40689238`` for files/p1000/p10000032/s40689238/40689238."""
    folders = _PATIENT_FOLDER.search(item)
    return str(int(folders[2])) if folders else ""


class MimicIvEcg(KnownWfdb):
    """Recognised by its list of records, or by its folders."""

    title, marks = "MIMIC-IV-ECG", RECORDS
    record_ids = RecordIds("study_id", _study_id)

    @classmethod
    def is_here(cls, tree: Tree) -> bool:
        """By its list of records.

        A list of that name with other columns, beside nothing else of MIMIC-IV-ECG, is somebody's own.
        """
        names = tree.children("")
        return RECORDS in names and (MEASUREMENTS in names or "files" in names or not _lacking(tree))

    @classmethod
    def has_shape(cls, tree: Tree) -> bool:
        """By its folders, p1000/p10000032/s40689238, which name the patients where there is no list of records."""
        if RECORDS in tree.children(""):
            return False
        return any(_holds_patients(tree, folder) for folder in ("", "files"))

    @classmethod
    def has_part(cls, name: str) -> bool:
        """Whether its recordings lie in a folder of that name."""
        return name == "files"

    @classmethod
    def why_not(cls, tree: Tree, forced: bool) -> list[str]:
        """A line where there is a list of records of another kind."""
        if forced or RECORDS not in tree.children(""):
            return []
        lacking = "; ".join(f"no column {name}" for name in _lacking(tree)[:1])
        return [
            f"{RECORDS} is not the list of MIMIC-IV-ECG ({lacking}), so these are read as plain WFDB records; "
            f"--labels {RECORDS} takes its columns as labels"
        ]

    @classmethod
    def about(cls, place: Place, scratch: Scratch, absent: Absent) -> About:
        described = _described(place.tree, scratch.path, place.within, absent)
        return About(described, _title(place.tree), partial(left_out, within=place.within))


def _lacking(tree: Tree) -> list[str]:
    try:
        with tree.table(RECORDS) as stream:
            return [name for name in _COLUMNS if name not in Table(stream, str(tree.where / RECORDS), ()).columns]
    except InputError:
        return list(_COLUMNS)


def _holds_patients(tree: Tree, folder: str) -> bool:
    """Whether a folder holds p1000/p10000032, or p10000032/s40689238."""
    first = next((name for name in tree.folders(folder) if re.fullmatch(r"p\d{4}|p\d{8}", name)), None)
    if first is None:
        return False
    inner = r"p\d{8}" if len(first) == 5 else r"s\d+"
    return any(re.fullmatch(inner, name) for name in tree.folders(f"{folder}/{first}" if folder else first))


def _title(tree: Tree) -> str:
    if RECORDS not in tree.children(""):
        with_reports = MEASUREMENTS in tree.children("")
        return _BY_FOLDERS + (f"from {MEASUREMENTS}" if with_reports else f"missing: no {MEASUREMENTS}")
    with_reports = MEASUREMENTS in tree.children("")
    return DESCRIPTION + (f"from {MEASUREMENTS}" if with_reports else f"missing: no {MEASUREMENTS}")


def _described(tree: Tree, scratch: Path, within: str, absent: Absent) -> Described:
    """The records whose patient's folder is there, or those of a folder; ``scratch`` is a folder for a table.

    A patient's folder rather than each record's file: with 800,000 of them, asking for each takes long over a network.
    Raises InputError for tables that are not MIMIC-IV-ECG's.
    """
    reports = Catalogue.make(scratch / "reports.sqlite")
    has_reports = MEASUREMENTS in tree.children("")
    if has_reports and (contradicted := reports.add_texts(_reports(tree))):
        absent.remarks.append(
            f"{len(contradicted)} rows of {MEASUREMENTS} say other reports or patients than an earlier row, which "
            f"counts; the first is of study {contradicted[0]}"
        )
    is_listed = RECORDS in tree.children("")
    each = _by_list(tree, reports, within, absent) if is_listed else _by_folders(tree, reports, within)
    for item, description in each:
        notes = {_NO_REPORT: 1} if has_reports and not description.labels and not description.fault else {}
        yield item, replace(description, notes=description.notes | notes)


def _by_list(tree: Tree, reports: Catalogue, within: str, absent: Absent) -> Described:
    there = Presence(tree)
    with tree.table(RECORDS) as stream:
        table = Table(stream, str(tree.where / RECORDS), _COLUMNS)
        subject, study, time, path = (table.columns[name] for name in _COLUMNS)
        for row in table:
            item = _item(row[path])
            parts = item.split("/")
            if len(parts) < 3:
                yield unreadable_row(table, f"path {row[path]!r}; it must read like files/p1000/p10000032/s1/1")
            elif not lies_in(item, within):
                continue
            elif "/".join(parts[:-2]) not in there:
                absent.add(item)
            else:
                description = _description(item, row[subject], row[study], row[time], reports, table.where())
                yield item, replace(description, place=table.place())


def left_out(tree: Tree, within: str) -> list[str]:
    """A line on records, or those of a folder, that the list does not name; none where there is no list."""
    if RECORDS not in tree.children(""):
        return []
    with tree.table(RECORDS) as stream:
        table = Table(stream, str(tree.where / RECORDS), _COLUMNS)
        path = table.columns["path"]
        named = {_item(row[path]) for row in table}
    return not_named(tree, within, RECORDS, named)


def _item(path: str) -> str:
    """The record that a cell names."""
    return (Cells().text(path, "path") or "").removesuffix(".hea")


def _description(item: str, subject: str, study: str, time: str, reports: Catalogue, where: str) -> Description:
    """What a row says; a cell that cannot be read is its record's fault, not the table's."""
    cells = Cells()
    try:
        patient = cells.identifier(subject, "subject_id")
        number = cells.text(study, "study_id")
        study_id = None if number is None else whole_number(number, "study_id")
        measured, *lines = ("",) if study_id is None else reports.text(study_id) or ("",)
        _check_agree(item, patient, study_id, measured)
        ecg_time = cells.text(time, "ecg_time")
    except InputError as error:
        return Description(None, {}, {}, fault=f"{where}: {error}")
    labels = {"report": lines} if lines else {}
    return Description(patient, labels, {} if ecg_time is None else {"ecg_time": ecg_time}, dict(cells.notes))


def _check_agree(item: str, patient: str | None, study_id: int | None, measured: str) -> None:
    """Raises InputError where its folders, or the measurements, say another patient or study than the list."""
    folders = _PATIENT_FOLDER.search(item)
    if folders and patient not in (None, str(int(folders[1]))):
        raise InputError(f"subject_id is {patient}, but its path is that of patient {folders[1]}")
    if folders and study_id not in (None, int(folders[2])):
        raise InputError(f"study_id is {study_id}, but its path is that of study {folders[2]}")
    if measured and patient not in (None, measured):
        raise InputError(f"subject_id is {patient}, but {measured} for study {study_id} in {MEASUREMENTS}")


def _by_folders(tree: Tree, reports: Catalogue, within: str) -> Described:
    for item in header_names(tree.contents()):
        if lies_in(item, within):
            match = _PATIENT_FOLDER.search(item)
            patient = str(int(match[1])) if match else None
            measured, *lines = (reports.text(int(match[2])) if match else ()) or ("",)
            try:
                _check_agree(item, patient, int(match[2]) if match else None, measured)
            except InputError as error:
                yield item, Description(None, {}, {}, fault=str(error))
                continue
            yield item, Description(patient, {"report": lines} if lines else {}, {})


def _reports(tree: Tree) -> Iterator[tuple[int, list[str]]]:
    """(study, its patient or "", and the lines of its report)."""
    with tree.table(MEASUREMENTS) as stream:
        table = Table(stream, str(tree.where / MEASUREMENTS), ("study_id", "report_0"))
        study, subject = table.columns["study_id"], table.columns.get("subject_id")
        numbered = [name for name in table.columns if name.removeprefix("report_").isdigit()]
        lines = [table.columns[name] for name in sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))]
        for row in table:
            if (number := Cells().text(row[study], "study_id")) is not None:
                patient = "" if subject is None else Cells().text(row[subject], "subject_id") or ""
                report_lines = [line for i in lines if is_known(line := row[i].strip())]
                yield whole_number(number, table.where()), [patient, *report_lines]
