"""A small layout of one's own: a folder with one ECG in each .csv, PATIENT_NUMBER.csv, a column per lead in mV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources.layout import FileSource, Place
from ecgscale.data.sources.tree import Tree
from ecgscale.data.units import to_signal
from ecgscale.errors import InputError
from ecgscale.lead_names import canonical_leads
from ecgscale.record import Record


@dataclass(frozen=True)
class CsvFolder(FileSource):
    """The first line of a file names the leads; files do not say the rate."""

    title = "ECGs as CSV"
    options = ("--source-rate-hz",)

    root: Path
    dataset: str
    rate_hz: float

    @classmethod
    def is_here(cls, tree: Tree) -> bool:
        return any(name.endswith(".csv") for name in tree.children(""))

    @classmethod
    def open(cls, place: Place, options: SourceOptions) -> CsvFolder:
        if options.source_rate_hz is None:
            raise InputError(f"{place.path}: .csv files say no sample rate; give --source-rate-hz")
        return cls(place.path, options.dataset or "", options.source_rate_hz)

    @property
    def description(self) -> str:
        return f"{self.root}: {len(self.items())} ECGs as CSV"

    def items(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("*.csv"))

    def read(self, item: str) -> Record:
        path = self.root / f"{item}.csv"
        try:
            leads = canonical_leads(path.read_text().partition("\n")[0].split(","))
            values_TL = np.loadtxt(path, np.float32, delimiter=",", skiprows=1, ndmin=2)
            signal = to_signal(values_TL.T, leads, 1.0, self.rate_hz)
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: {error}") from error
        patient = item.rpartition("_")[0]
        return Record.of(item, signal.fitted, self.rate_hz, signal.leads, patient=patient, remarks=signal.remarks)

    def fingerprint(self, item: str) -> bytes:
        return (self.root / f"{item}.csv").read_bytes()
