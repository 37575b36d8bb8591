"""MIMIC-IV-ECG (Gow et al., PhysioNet 2023): record_list.csv, machine_measurements.csv, files/.

800,000 rows: both tables are read once, row by row, into tables on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ecgscale.data.cells import Cells, is_known
from ecgscale.data.label_table import Description
from ecgscale.data.sources.catalogue import Catalogue
from ecgscale.data.sources.catalogued import Described, Presence
from ecgscale.data.sources.tables import Table, unreadable_row, whole_number
from ecgscale.data.sources.tree import Tree
from ecgscale.errors import InputError

RECORDS, MEASUREMENTS = "record_list.csv", "machine_measurements.csv"
DESCRIPTION = "MIMIC-IV-ECG: {n} records, patients from record_list.csv, label report "
_COLUMNS = ("subject_id", "study_id", "ecg_time", "path")


def description(tree: Tree) -> str:
    with_reports = MEASUREMENTS in tree.children("")
    return DESCRIPTION + (f"from {MEASUREMENTS}" if with_reports else f"missing: no {MEASUREMENTS}")


def described(tree: Tree, scratch: Path) -> Described:
    """The records whose patient's folder is there; ``scratch`` is a folder for a table.

    A patient's folder rather than each record's file: with 800,000 of them, asking for each takes long over a network.
    Raises InputError for tables that are not MIMIC-IV-ECG's.
    """
    reports = Catalogue.make(scratch / "reports.sqlite")
    if MEASUREMENTS in tree.children(""):
        reports.add_notes(_reports(tree))
    there = Presence(tree)
    with tree.table(RECORDS) as stream:
        table = Table(stream, str(tree.where / RECORDS), _COLUMNS)
        subject, study, time, path = (table.columns[name] for name in _COLUMNS)
        for row in table:
            item = (Cells().text(row[path], "path") or "").removesuffix(".hea")
            parts = item.split("/")
            if len(parts) < 3:
                yield unreadable_row(table, f"path {row[path]!r}; it must read like files/p1000/p10000032/s1/1")
            elif "/".join(parts[:-2]) in there:
                yield item, _description(row[subject], row[study], row[time], reports, table.where())


def _description(subject: str, study: str, time: str, reports: Catalogue, where: str) -> Description:
    """What a row says; a cell that cannot be read is its record's fault, not the table's."""
    cells = Cells()
    try:
        patient = cells.identifier(subject, "subject_id")
        number = cells.text(study, "study_id")
        lines = [] if number is None else reports.note(whole_number(number, "study_id"))
        ecg_time = cells.text(time, "ecg_time")
    except InputError as error:
        return Description(None, {}, {}, fault=f"{where}: {error}")
    labels = {"report": lines} if lines else {}
    return Description(patient, labels, {} if ecg_time is None else {"ecg_time": ecg_time}, dict(cells.notes))


def _reports(tree: Tree) -> Iterator[tuple[int, list[str]]]:
    """(study, lines of its report)."""
    with tree.table(MEASUREMENTS) as stream:
        table = Table(stream, str(tree.where / MEASUREMENTS), ("study_id", "report_0"))
        study = table.columns["study_id"]
        numbered = [name for name in table.columns if name.removeprefix("report_").isdigit()]
        lines = [table.columns[name] for name in sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))]
        for row in table:
            if (number := Cells().text(row[study], "study_id")) is not None:
                yield whole_number(number, table.where()), [line for i in lines if is_known(line := row[i].strip())]
