"""CODE-15 % (Ribeiro et al., Zenodo 4916206): exams.csv and exams_part*.hdf5. The sole importer of h5py.

Each part holds ``exam_id`` (N,) and ``tracings`` (N, T, 12) at 400 Hz, padded with zeros at both ends.

The unit. The data set's page gives the scale as "1e-4V" and in the same sentence says that volts times 1,000, so
millivolts, are meant; the PhysioNet/CinC Challenge 2025 takes the values as mV, and so does this module. However, the
authors' own conversion is documented as having run with ``--scale 2`` (README of antonior92/ecg-preprocessing), and
users found amplitudes twice as high as elsewhere (antonior92/ecg-age-prediction, issues 1 and 5): ``--unit 0.5mV``
undoes that.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from ecgscale.data.amplitude import check_amplitude, check_unit
from ecgscale.data.cells import Cells
from ecgscale.data.description import Description
from ecgscale.data.foreign import check_lead_names, check_other_rates
from ecgscale.data.json_keys import Fields
from ecgscale.data.label_table import LabelTable
from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources.catalogue import Catalogue
from ecgscale.data.sources.layout import Layout, Place
from ecgscale.data.sources.listing import is_junk
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tables import Table
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.data.sources.wfdb_listing import stays_inside
from ecgscale.data.units import parse_unit, to_signal
from ecgscale.errors import InputError, disk_failed, file_error, unreadable
from ecgscale.lead_names import LEADS
from ecgscale.record import Record

EXAMS = "exams.csv"
PARTS = "exams_part*.hdf5"
_TRACE_FILE = "trace_file"  # column with the name of the part
RATE_HZ = 400.0
ABNORMALITIES = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")
DESCRIPTION = (
    "CODE-15 %: {n} exams in {parts} parts, labels abnormality and normal_ecg from exams.csv; values taken as {unit} "
    "(the authors' conversion doubled them: --unit 0.5mV undoes it)"
)
_MAX_EXAMS = 1 << 24
_MAX_SAMPLES = 1 << 20
_MAX_CHUNK_BYTES = 1 << 28
_MAX_STATED = 64  # values of an attribute, or attributes of an object, that are asked for what they say
_TEXTS = ("age", "sex", "nn_predicted_age", "death", "timey")
_SEX = {True: "male", False: "female"}
# What is part of HDF5 or of h5py: gzip, shuffle, checksum, szip, n-bit, scale-offset, LZF. Others are plugins, that is
# foreign code.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}
_BROKEN: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, LookupError, TypeError, MemoryError)


@dataclass(frozen=True)
class Code15(Layout):
    """Exams by the name ``<part>/<row>_<exam_id>``, so that sorted names stand in the order of the files."""

    root: Path
    catalogue: Catalogue  # exam_id -> what exams.csv says
    scratch: Scratch  # holds the catalogue
    dataset: str
    description: str
    parts: tuple[str, ...]  # names of the files
    mv_per_value: float
    twice: frozenset[int] = frozenset()  # exam_ids of several tracings

    title = "CODE-15 %"
    options = ("--unit",)
    suffixes = (".hdf5", ".h5")

    @classmethod
    def is_here(cls, tree: Tree) -> bool:
        """By its parts: without exams.csv beside them the patients are unknown, which is to be said."""
        names = tree.children("")
        return any(fnmatch(name, PARTS) for name in names) or (
            EXAMS in names and any(name.startswith("exams_part") for name in names)
        )

    @classmethod
    def open(cls, place: Place, options: SourceOptions) -> Code15:
        """All parts of a folder, or one; raises InputError for a missing or broken table."""
        root = place.tree.where
        parts = (place.within,) if place.within else parts_in(root)
        if not parts:
            packed = any(root.glob("exams_part*.zip"))
            hint = "unpack exams_part*.zip first" if packed else "they belong beside exams.csv"
            raise InputError(f"{root}: no {PARTS} in it; {hint}")
        if not (root / EXAMS).is_file():
            raise InputError(f"{root}: no {EXAMS} beside the parts; it names the patients")
        _part.cache_clear()  # a file may have been replaced since
        unit = options.unit or "mV"
        mv_per_value = parse_unit(unit)
        scratch = Scratch.make()
        catalogue = Catalogue.make(scratch.path / "exams.sqlite")
        try:
            unnamed: list[str] = []
            repeated = catalogue.add_records(_exams(root, unnamed))
        except InputError as error:
            raise error if str(error).startswith(str(root)) else InputError(f"{root / EXAMS}: {error}") from error
        for part in parts:
            _check_stated(root / part, _part(root, part).stated, mv_per_value)
        ids = np.concatenate([_part(root, part).exam_ids for part in parts])
        n, (different, counts) = len(ids), np.unique(ids, return_counts=True)
        twice = frozenset(different[counts > 1].tolist()) - {0}  # of rows that pad a part
        description = DESCRIPTION.format(n=n, parts=len(parts), unit=unit)
        if unnamed:
            description += f"; {len(unnamed)} rows of {EXAMS} name no exam and are left out, the first: {unnamed[0]}"
        description += "".join(f"; {line}" for line in repeated)
        return cls(root, catalogue, scratch, options.dataset or "", description, parts, mv_per_value, twice)

    def items(self) -> list[str]:
        """Sorted names; raises InputError for a part that is no such file."""
        return sorted(item for part in self.parts for item in _items_of(self.root, part))

    def read(self, item: str) -> Record:
        """One exam without its padding.

        Raises InputError, which names the part and the row, where it cannot be read, is zero throughout, holds NaN or
        has no row in exams.csv: its patient would be unknown. Raises MachineError where the disk fails.
        """
        stem, _, place = item.rpartition("/")
        part_name, row, exam_id = f"{stem}.hdf5", *map(int, place.split("_"))
        shown = f"{self.root / part_name}: row {row}, exam {exam_id}"
        description = self.catalogue.describe(str(exam_id))
        try:
            if description.fault:
                raise InputError(description.fault)
            if exam_id in self.twice:
                raise InputError(f"several tracings have this exam_id, so which of them {EXAMS} means is unknown")
            metadata = dict(description.metadata)
            trace_file = metadata.pop(_TRACE_FILE, part_name)
            if trace_file.endswith(".hdf5") and trace_file != part_name:  # a placeholder names no part
                raise InputError(f"{EXAMS} says that it lies in {trace_file}")
            values_TL = _padding_removed(_part(self.root, part_name).read(row))
            if description.patient is None:
                raise InputError(f"no row in {EXAMS}, so its patient is unknown")
            signal = to_signal(values_TL.T, LEADS, self.mv_per_value, RATE_HZ)
        except InputError as error:
            raise type(error)(f"{shown}: {error}") from error
        except OSError as error:
            raise file_error(shown, "cannot be read", error) from error
        known: dict[str, Any] = {"patient": description.patient, "labels": description.labels, "metadata": metadata}
        known["notes"] = description.notes
        return Record.of(item, signal.fitted, RATE_HZ, signal.leads, remarks=signal.remarks, **known)

    def fingerprint(self, item: str) -> bytes:
        """What exams.csv says of it, and the size of its part."""
        stem, _, place = item.rpartition("/")
        description = self.catalogue.describe(place.rpartition("_")[2])
        path = self.root / f"{stem}.hdf5"
        return f"{description!r} {path.stat().st_size if path.is_file() else 0}".encode(errors="backslashreplace")

    def unlabelled(self) -> list[str]:
        """All: there is no table of the user's."""
        return self.items()

    @property
    def labels(self) -> LabelTable | None:
        """None: all stands in exams.csv."""
        return None

    def left_out(self) -> list[str]:
        """Lines on parts that are still packed, and on rows of exams.csv without an exam."""
        packed = [path.name for path in self.root.glob("exams_part*.zip") if f"{path.stem}.hdf5" not in self.parts]
        reason = "parts are still packed; unpack them here"
        lines = [f"left out: {len(packed)} {reason}; the first is {min(packed)}"] if packed else []
        there = {str(exam_id) for part in self.parts for exam_id in _part(self.root, part).exam_ids.tolist()}
        if absent := sorted({*self.catalogue.items()} - there, key=int):
            lines.append(f"left out: {len(absent)} rows of {EXAMS} whose exam is in no part; the first is {absent[0]}")
        return lines


def parts_in(root: Path) -> tuple[str, ...]:
    """Names of the parts, as far as they do not lead out of the folder."""
    paths = (path for path in root.glob(PARTS) if not is_junk(path.name))
    return tuple(sorted(path.name for path in paths if stays_inside(path, root)))


def _items_of(root: Path, part: str) -> Iterator[str]:
    exam_ids = _part(root, part).exam_ids
    width = len(str(len(exam_ids)))
    for row, exam_id in enumerate(exam_ids.tolist()):
        yield f"{part.removesuffix('.hdf5')}/{row:0{width}d}_{exam_id}"


def _padding_removed(values_TL: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    used = np.flatnonzero(np.nan_to_num(values_TL).any(axis=1))  # a lead that is NaN throughout is so in the padding
    if not len(used):
        raise InputError("all samples are zero")
    return values_TL[used[0] : used[-1] + 1]


# --- exams.csv ---


def _exams(root: Path, unnamed: list[str]) -> Iterator[tuple[str, Description]]:
    """(exam_id, what its row says). Rows without an exam_id that could be read are added to ``unnamed``."""
    with Folder(root).table(EXAMS) as stream:
        table = Table(stream, str(root / EXAMS), ("exam_id", "patient_id", *ABNORMALITIES))
        for cells in table:
            row = {name: cells[i] for name, i in table.columns.items()}
            exam_id = Cells().text(row["exam_id"], "exam_id") or ""
            if exam_id.isascii() and exam_id.isdigit():
                yield str(int(exam_id)), replace(_description(row, table.where()), place=table.place())
            else:
                unnamed.append(f"{table.where()}: exam_id is {row['exam_id']!r}")


def _description(row: dict[str, str], where: str) -> Description:
    """What a row says; a cell that cannot be read is its exam's fault, not the table's."""
    cells = Cells()
    try:
        patient = cells.identifier(row["patient_id"], "patient_id")
        if patient is None:
            raise InputError(f"patient_id is {row['patient_id']!r}; every exam names its patient")
        abnormality = cells.flagged({name: row[name] for name in ABNORMALITIES}, "abnormality")
        normal = cells.flag(row.get("normal_ecg"), "normal_ecg")
        male = cells.flag(row.get("is_male"), "is_male")
        texts = {name: cells.text(row.get(name), name) for name in _TEXTS}
    except InputError as error:
        return Description(None, {}, {}, fault=f"{where}: {error}")
    labels = {} if abnormality is None else {"abnormality": abnormality}
    if normal is not None:
        labels["normal_ecg"] = [str(normal).lower()]
    metadata = {name: text for name, text in texts.items() if text is not None}
    if male is not None:
        metadata["sex"] = _SEX[male]
    if trace_file := cells.text(row.get(_TRACE_FILE), _TRACE_FILE):
        metadata[_TRACE_FILE] = Path(trace_file).name
    return Description(patient, labels, metadata, dict(cells.notes))


# --- HDF5 ---


class _Part(NamedTuple):
    """An open part. h5py's objects cannot be pickled, nor survive a fork: each process opens its own."""

    exam_ids: npt.NDArray[np.int64]
    tracings: Any  # h5py.Dataset (N, T, L)
    stated: Fields  # what the file says of itself

    def read(self, row: int) -> npt.NDArray[np.floating]:
        """(T, L), nothing else of the file."""
        try:
            values: npt.NDArray[np.floating] = self.tracings[row]
        except _BROKEN as error:
            if disk_failed(error):
                raise
            raise InputError(f"cannot be read ({_first_line(error)})") from error
        return values


@functools.lru_cache(maxsize=4)
def _part(root: Path, name: str) -> _Part:
    path = root / name
    try:
        file = h5py.File(path, "r", locking=False)  # nobody writes; some network file systems have no locks
        exam_id = _dataset(file, "exam_id", 1, "iu")
        tracings = _dataset(file, "tracings", 3, "f")
        if len(exam_id) != len(tracings):
            raise InputError(f"{len(exam_id)} exam_id, {len(tracings)} tracings; each tracing has one")
        if tracings.shape[2] != len(LEADS) or not 0 < tracings.shape[1] <= _MAX_SAMPLES:
            raise InputError(f"tracings of shape {tracings.shape}; it must be (exams, samples, {len(LEADS)})")
        return _Part(exam_id[:].astype(np.int64), tracings, _stated(file))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _BROKEN as error:
        raise unreadable(path, "not a readable HDF5 file", error) from error


def _dataset(file: Any, name: str, n_axes: int, kinds: str) -> Any:
    """A data set that lies in the file itself; raises InputError for any other, without following it."""
    if name not in file:
        raise InputError(f"no data set {name}; it holds {', '.join(sorted(file)[:5]) or 'nothing'}")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise InputError(f"{name} is a link; the data must lie in the file itself")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{name} is a group; it must be a data set")
    if _elsewhere(dataset):
        raise InputError(f"{name} lies in other files; the data must lie in the file itself")
    if foreign := _foreign(dataset):
        raise InputError(f"{name} needs the foreign filter {foreign[0]}; only HDF5's own are used")
    if dataset.dtype.kind not in kinds or dataset.ndim != n_axes:
        raise InputError(f"{name} is {dataset.dtype} of shape {dataset.shape}; that is no CODE-15 part")
    if len(dataset) > _MAX_EXAMS or (dataset.size and not dataset.id.get_storage_size()):
        raise InputError(f"{name} claims {len(dataset)} rows, which the file does not hold")
    chunk_bytes = int(np.prod(dataset.chunks or (0,), dtype=np.float64)) * dataset.dtype.itemsize
    if chunk_bytes > _MAX_CHUNK_BYTES:
        raise InputError(f"{name} in chunks of {chunk_bytes} bytes; at most {_MAX_CHUNK_BYTES}")
    return dataset


def _elsewhere(dataset: Any) -> bool:
    return bool(dataset.is_virtual or dataset.external)


def _foreign(dataset: Any) -> list[int]:
    """Numbers of the filters that HDF5 itself does not have."""
    stored = dataset.id.get_create_plist()
    return sorted({stored.get_filter(i)[0] for i in range(stored.get_nfilters())} - _FILTERS)


def _check_stated(path: Path, stated: Fields, mv_per_value: float) -> None:
    """Raises InputError where a part says another rate, unit, scale, zero or order of leads than it is read by."""
    try:
        check_other_rates(stated, RATE_HZ)
        check_lead_names(stated, LEADS)
        check_unit(stated, LEADS, mv_per_value)
        check_amplitude(stated, LEADS, [mv_per_value] * len(LEADS))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _stated(place: Any, depth: int = 3) -> Fields:
    """Attributes, and what small data sets hold, by name. The parts as they are published have neither."""
    told: Fields = {}
    for name in islice(place.attrs, _MAX_STATED):
        told[name] = _small(place.attrs.get_id(name).shape, functools.partial(place.attrs.__getitem__, name))
    if not isinstance(place, h5py.Group) or depth == 0:
        return told
    for name in islice(place, _MAX_STATED):
        if not isinstance(place.get(name, getlink=True), h5py.HardLink):
            continue
        child = place[name]
        told[f"{name} attributes"] = _stated(child, depth - 1)
        is_small = isinstance(child, h5py.Dataset) and child.ndim < 2 and not (_elsewhere(child) or _foreign(child))
        told[name] = _small(child.shape, functools.partial(child.__getitem__, ())) if is_small else None
    return told


def _small(shape: tuple[int, ...] | None, read: Callable[[], Any]) -> Any:
    """A value of HDF5 as JSON has it: text, numbers, and lists of these. None for other types, and for a large one."""
    if shape is None or int(np.prod(shape)) > _MAX_STATED:
        return None
    try:
        value = np.asarray(read()).tolist()
    except _BROKEN as error:
        if disk_failed(error):
            raise
        return None
    if isinstance(value, list):
        return [text.decode(errors="replace") if isinstance(text, bytes) else text for text in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str | int | float) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
