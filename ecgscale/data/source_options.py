"""What is said about a source of recordings. Light: nothing slow is imported before it is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecgscale.data.label_columns import LabelColumns
from ecgscale.errors import InputError
from ecgscale.registry import Registry

if TYPE_CHECKING:
    from ecgscale.data.sources.layout import Layout


LAYOUTS: Registry[Layout] = Registry(
    "layout",
    "ecgscale.data.sources.layout:Layout",
    {
        "ptbxl": "ecgscale.data.sources.ptbxl:PtbXl",
        "mimic-iv-ecg": "ecgscale.data.sources.mimic_iv_ecg:MimicIvEcg",
        "cinc2021": "ecgscale.data.sources.cinc2021:Cinc2021",
        "code15": "ecgscale.data.sources.code15:Code15",
        "npy": "ecgscale.data.sources.npy_table:NpyTable",
        "wfdb": "ecgscale.data.sources.wfdb_layout:PlainWfdb",
    },
)
"""In the order in which a path is asked what it is; plain WFDB records are what nothing else is."""


@dataclass(frozen=True)
class SourceOptions:
    """How a path is to be read. What is left out follows from the path."""

    dataset: str | None = None
    """Name of the data set; None: that of the folder or file."""
    layout: str = "auto"
    """A name of LAYOUTS, package.module:Class of one's own, or auto."""
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
        if self.layout != "auto":
            LAYOUTS.find(self.layout)
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
            if value and option not in LAYOUTS.find(layout).options:
                fitting = ", ".join(name for name in LAYOUTS if option in LAYOUTS.find(name).options)
                raise InputError(f"{option} does not go with layout {layout}, only with {fitting}; leave it out")


def listed(text: str) -> tuple[str, ...]:
    """``A,B`` -> (A, B)."""
    return tuple(part for part in text.split(",") if part)
