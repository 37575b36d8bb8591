"""What the command line says about a source of recordings. Light: nothing slow is imported before it is needed."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecgscale.data.label_columns import LabelColumns, parse_label_columns
from ecgscale.errors import InputError
from ecgscale.lead_names import parse_renames

if TYPE_CHECKING:
    from ecgscale.data.sources.protocol import OpenedSource

# Layout -> the options that say something about it; any other is refused rather than ignored.
_TABLE_OPTIONS = ("--labels", "--label-columns", "--record-column")
LAYOUTS = {
    "wfdb": (*_TABLE_OPTIONS, "--patient-key", "--ignore-leads", "--rename-leads"),
    "ptbxl": (*_TABLE_OPTIONS, "--ignore-leads", "--rename-leads"),
    "mimic-iv-ecg": (*_TABLE_OPTIONS, "--ignore-leads", "--rename-leads"),
    "cinc2021": (*_TABLE_OPTIONS, "--patient-key", "--ignore-leads", "--rename-leads"),
    "code15": ("--unit",),
    "npy": (*_TABLE_OPTIONS, "--patient-key", "--source-rate-hz", "--source-leads", "--unit", "--mv-per-count"),
}


@dataclass(frozen=True)
class SourceOptions:
    """How a path is to be read. What is left out follows from the path."""

    dataset: str | None = None
    """Name of the data set; None: that of the folder or file."""
    layout: str = "auto"
    """A key of LAYOUTS, or auto."""
    labels_csv: Path | tuple[Path, ...] | None = None
    """Several are one table."""
    label_columns: LabelColumns = ()
    """(label, the columns of flags that are its classes)."""
    record_column: str | None = None
    patient_key: str | None = None
    ignore_leads: tuple[str, ...] = ()
    rename_leads: tuple[tuple[str, str], ...] = ()
    """(name in the file, lead)."""
    source_rate_hz: float | None = None
    """Of .npy arrays."""
    source_leads: tuple[str, ...] = ()
    """Of .npy arrays, in their order; (): the twelve in canonical order."""
    unit: str | None = None
    """Of floats: V, mV or uV, with a factor where need be, such as 0.5mV."""
    mv_per_count: float | None = None
    """Of integers in .npy arrays."""

    def __post_init__(self) -> None:
        if self.layout != "auto" and self.layout not in LAYOUTS:
            raise InputError(f"layout {self.layout!r}: give auto or one of {', '.join(LAYOUTS)}")
        for name, value in (("source-rate-hz", self.source_rate_hz), ("mv-per-count", self.mv_per_count)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} {value:g}: give a finite number above 0")

    def check_for(self, layout: str) -> None:
        """Raises InputError for an option that says nothing about that layout."""
        given = {
            "--labels": self.labels_csv,
            "--label-columns": self.label_columns,
            "--record-column": self.record_column,
            "--patient-key": self.patient_key,
            "--ignore-leads": self.ignore_leads,
            "--rename-leads": self.rename_leads,
            "--source-rate-hz": self.source_rate_hz,
            "--source-leads": self.source_leads,
            "--unit": self.unit,
            "--mv-per-count": self.mv_per_count,
        }
        for option, value in given.items():
            if value and option not in LAYOUTS[layout]:
                fitting = ", ".join(name for name, options in LAYOUTS.items() if option in options)
                raise InputError(f"{option} does not go with layout {layout}, only with {fitting}; leave it out")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``source_from`` reads."""
    parser.add_argument(
        "source", type=Path, help="folder or archive (.zip, .tar, .tar.gz ...) of WFDB records, or another --layout"
    )
    parser.add_argument(
        "--layout",
        default="auto",
        choices=("auto", *LAYOUTS),
        help="how the source is laid out (default auto: by its files)",
    )
    parser.add_argument(
        "--dataset",
        help="name of the data set (default: name of the source folder); patients are (data set, id)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        action="append",
        metavar="CSV",
        help="labels by record name, several in a cell as A|B or as a list; given more than once: one table",
    )
    parser.add_argument(
        "--label-columns",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="columns of 1 and 0 (true and false) that are the classes of one label NAME (default: labels)",
    )
    parser.add_argument("--record-column", metavar="NAME", help="column of the CSV that names the record")
    parser.add_argument(
        "--patient-key",
        metavar="KEY",
        help="CSV column or header comment that names the patient; @folder: the record's folder",
    )
    parser.add_argument(
        "--ignore-leads",
        default="",
        metavar="A,B",
        help="signals to leave out, such as vx,vy,vz; other unknown leads reject a record",
    )
    parser.add_argument(
        "--rename-leads", default="", metavar="DI=I,DII=II", help="leads that the files call otherwise: their names"
    )
    parser.add_argument("--source-rate-hz", type=float, help="sample rate of .npy arrays")
    parser.add_argument(
        "--source-leads", default="", metavar="I,II,...", help="leads of .npy arrays, in their order (default: all 12)"
    )
    parser.add_argument("--unit", help="of floats in .npy and HDF5: V, mV (default) or uV, or a multiple such as 0.5mV")
    parser.add_argument("--mv-per-count", type=float, help="millivolts per count of integers in .npy")


def source_from(options: argparse.Namespace) -> OpenedSource:
    """The source that parsed arguments describe; raises InputError as open_source does."""
    from ecgscale.data.sources import open_source

    chosen = SourceOptions(
        dataset=options.dataset,
        layout=options.layout,
        labels_csv=tuple(options.labels or ()),
        label_columns=parse_label_columns(options.label_columns),
        record_column=options.record_column,
        patient_key=options.patient_key,
        ignore_leads=listed(options.ignore_leads),
        rename_leads=parse_renames(listed(options.rename_leads)),
        source_rate_hz=options.source_rate_hz,
        source_leads=listed(options.source_leads),
        unit=options.unit,
        mv_per_count=options.mv_per_count,
    )
    return open_source(options.source, chosen)


def listed(text: str) -> tuple[str, ...]:
    """``A,B`` -> (A, B)."""
    return tuple(part for part in text.split(",") if part)
