"""Arrays in .npy files: a folder with one per record, or one file with a record in each row.

What such files do not say, the options do: rate, leads, and what a 1 is worth. Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import functools
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from ecgscale.data.amplitude import check_amplitude, check_unit
from ecgscale.data.description import Description, describe
from ecgscale.data.foreign import check_other_rates
from ecgscale.data.json_keys import squashed
from ecgscale.data.label_columns import LabelColumns
from ecgscale.data.label_table import LabelTable, load_label_table, paths_of
from ecgscale.data.matching import NameMatcher, RowMatcher
from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources.layout import Layout, Place
from ecgscale.data.sources.listing import contents_below, left_out, tables_left_out
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.data.sources.wfdb_listing import stamp, stays_inside
from ecgscale.data.units import mv_per_value, parse_unit, to_signal
from ecgscale.errors import InputError, unreadable
from ecgscale.lead_names import LEADS, canonical_leads
from ecgscale.record import Record, check_rate

_BROKEN: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, EOFError, OverflowError, MemoryError)
_BROKEN += (RecursionError, SyntaxError, tokenize.TokenError)


@dataclass(frozen=True)
class NpyTable(Layout):
    """A folder of arrays (leads, samples) or (samples, leads), or one array with an axis for the records before.

    A record's name is its path below the folder without suffix, or the number of its row, with leading zeros.
    """

    path: Path
    dataset: str
    rate_hz: float
    leads: tuple[str, ...]  # canonical names, in the order of the arrays
    unit: str | None = None
    """Of floats; None: not said, so mV."""
    mv_per_count: float | None = None
    labels_csv: Path | tuple[Path, ...] | None = None
    """As in load_label_table; of one array, a column ``row`` (or the record column) has the numbers of its rows."""
    record_column: str | None = None
    patient_key: str | None = None
    label_columns: LabelColumns = ()

    options = (
        *("--labels", "--label-columns", "--record-column", "--patient-key"),
        *("--source-rate-hz", "--source-leads", "--unit", "--mv-per-count"),
    )
    suffixes = (".npy",)

    @classmethod
    def is_plain(cls, tree: Tree) -> bool:
        """Whether there are .npy and no WFDB headers below a folder; one header ends the search."""
        arrays = False
        for contents in tree.contents() if isinstance(tree, Folder) else ():
            if any(file.endswith(".hea") for file in contents.files):
                return False
            arrays = arrays or any(file.endswith(".npy") for file in contents.files)
        return arrays

    @classmethod
    def open(cls, place: Place, options: SourceOptions) -> NpyTable:
        """Raises InputError where the options do not say what the arrays leave open."""
        path = place.path
        _stacked.cache_clear()  # a file may have been replaced since
        rate_hz = options.source_rate_hz
        if rate_hz is None:
            raise InputError(f"{path}: .npy arrays say no sample rate; give --source-rate-hz")
        try:
            check_rate(rate_hz)
        except InputError as error:
            raise InputError(f"--source-rate-hz: {error}") from error
        parse_unit(options.unit or "mV")
        source = cls(
            path,
            options.dataset or "",
            rate_hz,
            canonical_leads(options.source_leads or LEADS),
            options.unit,
            options.mv_per_count,
            options.labels_csv,
            options.record_column,
            options.patient_key,
            options.label_columns,
        )
        if source.is_stacked and options.patient_key == "@folder":
            raise InputError(f"{path}: one array; its records have no folders, so --patient-key @folder names nobody")
        return source

    @property
    def is_stacked(self) -> bool:
        return self.path.suffix.lower() == ".npy"

    @property
    def description(self) -> str:
        """One line for people."""
        what = f"{len(self.items())} records in one array" if self.is_stacked else f"{len(self.items())} arrays"
        names = " and ".join(map(str, paths_of(self.labels_csv)))
        labels = f", labels from {names}" if names else ", no labels"
        return f"npy: {what}, {len(self.leads)} leads at {self.rate_hz:g} Hz{labels}"

    def items(self) -> list[str]:
        """Sorted names; raises InputError where there is no array, or if ``labels_csv`` does not fit."""
        _ = self.labels  # read before the source is handed to workers, which share it
        return self._names()

    def read(self, item: str) -> Record:
        """One record; raises InputError that names the file and the reason, such as a shape, a type or NaN."""
        path = self.path if self.is_stacked else self.path / f"{item}.npy"
        shown = f"{path}: row {int(item)}" if self.is_stacked else str(path)
        try:
            array = self._array_of(item)
            signal = to_signal(self._leads_first(array), self.leads, self._mv_per_value(array), self.rate_hz)
            folder = Path(item).parent.name or None
            known = describe((), self.labels, item, self.patient_key, folder)
            self._check_columns(known, array)
        except InputError as error:
            raise error if str(error).startswith(str(path)) else type(error)(f"{shown}: {error}") from error
        told: dict[str, Any] = {"patient": known.patient, "labels": known.labels, "metadata": known.metadata}
        told |= {"notes": known.notes, "patient_key": known.patient_key}
        return Record.of(item, signal.fitted, self.rate_hz, signal.leads, remarks=signal.remarks, **told)

    def _check_columns(self, known: Description, array: npt.NDArray[np.generic]) -> None:
        """Raises InputError where the record's row says another rate, unit, scale or zero than it is read by."""
        columns: dict[str, Any] = {name: values[0] for name, values in known.labels.items() if len(values) == 1}
        columns |= known.metadata
        check_other_rates({name: text for name, text in columns.items() if squashed(name) != "rate"}, self.rate_hz)
        mv_per_value = self._mv_per_value(array)
        if array.dtype.kind == "f":
            check_unit(columns, self.leads, mv_per_value)
        else:
            check_amplitude(columns, self.leads, [mv_per_value] * len(self.leads))

    def fingerprint(self, item: str) -> bytes:
        """Its shape and type, and a hash of its samples."""
        try:
            array = self._array_of(item)
        except InputError:
            return b""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return f"{array.shape} {array.dtype} ".encode() + xxh3_128(content).digest()

    def stamp(self, item: str) -> bytes:
        """Size and time of its file."""
        return stamp(self.path if self.is_stacked else self.path / f"{item}.npy")

    def unlabelled(self) -> list[str]:
        """Names of the records without a row in ``labels_csv``; all of them where there is no such file."""
        labels = self.labels
        return [item for item in self.items() if labels is None or item not in labels]

    def left_out(self) -> list[str]:
        """Lines on what below the folder is not read, and why."""
        if self.is_stacked:
            return []
        tables = [] if paths_of(self.labels_csv) else tables_left_out(contents_below(self.path))
        return [*left_out(contents_below(self.path), ".npy"), *tables]

    def _names(self) -> list[str]:
        if not self.is_stacked:
            return _arrays_below(self.path)
        n = len(_stacked(self.path))
        return [f"{row:0{len(str(n))}d}" for row in range(n)]

    def _array_of(self, item: str) -> npt.NDArray[np.generic]:
        if self.is_stacked:
            row: npt.NDArray[np.generic] = _stacked(self.path)[int(item)]
            return row
        return _array(self.path / f"{item}.npy", self.path)

    def _leads_first(self, array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        n = len(self.leads)
        if array.ndim == 3 and not self.is_stacked:
            raise InputError(f"of shape {array.shape}, {len(array)} records in one array; give this file by itself")
        if array.ndim != 2 or n not in array.shape or not array.size:
            raise InputError(f"of shape {array.shape}; a record is (leads, samples) or reverse, with {n} leads")
        if array.shape[0] == array.shape[1]:
            raise InputError(f"of shape {array.shape}: leads and samples cannot be told apart")
        return array if array.shape[0] == n else array.T

    def _mv_per_value(self, array: npt.NDArray[np.generic]) -> float:
        if array.dtype.kind != "f" and (array.dtype.kind not in "iu" or array.dtype.itemsize > 4):
            raise InputError(f"of type {array.dtype}; floats, or integers of at most 32 bits, are needed")
        return mv_per_value(array.dtype, self.unit, self.mv_per_count)

    @functools.cached_property
    def labels(self) -> LabelTable | None:
        """The table of the user's; None where there is none."""
        if not (csv_paths := paths_of(self.labels_csv)):
            return None
        names = self._names()
        matcher = RowMatcher(self.path, names) if self.is_stacked else NameMatcher(self.path, names)
        return load_label_table(csv_paths, matcher, Scratch.make(), self.record_column, self.label_columns)


def _arrays_below(root: Path) -> list[str]:
    names = []
    for folder, files, _ in contents_below(root):
        stems = [file.removesuffix(".npy") for file in files if Path(file).suffix == ".npy"]
        names += [f"{folder}/{stem}" if folder else stem for stem in stems]
    if not names:
        others = "".join(f"; {line}" for line in left_out(contents_below(root), ".npy"))
        raise InputError(f"{root}: no .npy in or below it; links are not followed{others}")
    return sorted(names)


@functools.lru_cache(maxsize=4)
def _stacked(path: Path) -> npt.NDArray[np.generic]:
    array = _array(path)
    if array.ndim != 3 or not len(array):
        raise InputError(f"{path}: of shape {array.shape}; it must be (records, leads, samples) or their reverse")
    return array


def _array(path: Path, root: Path | None = None) -> npt.NDArray[np.generic]:
    """Mapped, so that a header that promises more than the file holds is refused before anything is allocated."""
    if root is not None and not stays_inside(path, root):
        raise InputError(f"{path}: lies outside of {root}; links may not lead out")
    try:
        array: npt.NDArray[np.generic] = np.lib.format.open_memmap(path, mode="r")
    except _BROKEN as error:
        raise unreadable(path, "not a readable .npy of numbers", error) from error
    return array
