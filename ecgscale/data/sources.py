"""Folders of raw recordings -> Records. The sole importer of wfdb.

wfdb decodes the samples; everything that can be wrong before (header, file names, sizes) is checked here first,
so that nothing is allocated, followed or defaulted on the word of a broken header. What is refused, is refused
with one InputError that names the file.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import wfdb

from ecgscale.data.label_table import LabelTable, describe, load_label_table
from ecgscale.data.wfdb_header import MAX_RATE_HZ, Header, SignalLine, parse_header
from ecgscale.errors import InputError
from ecgscale.record import LEADS, Record, canonical_leads, fit_counts, in_canonical_order

# Bits per sample; wfdb's formats without 8 (differences), which has no code for an invalid sample.
_FORMAT_BITS = {"80": 8, "508": 8, "310": 10, "311": 10, "212": 12, "16": 16, "61": 16, "160": 16, "516": 16}
_FORMAT_BITS |= {"24": 24, "524": 24, "32": 32}
_PACKED_BYTES = {"8": 1.0, "212": 1.5, "310": 4 / 3, "311": 4 / 3}
_FLAC_FORMATS = ("508", "516", "524")
_FLAC_SAMPLES_PER_BYTE = 65_535 / 8  # the most that a FLAC file can hold: a constant block of 65,535 samples
_KNOWN_FORMATS = " ".join(sorted(_FORMAT_BITS.keys() | {"8"}, key=int))
_MAX_HEADER_BYTES = 1 << 24
_MAX_VALUES = 1 << 29  # leads x samples of one record: 12 leads, 24 hours, 500 Hz
_SEGMENT_PEEK_BYTES = 4096

# What wfdb and the libraries below it raise for damaged files, seen by mutating headers and data. Its own
# HeaderSyntaxError is a ValueError, soundfile's LibsndfileError a RuntimeError, as is RecursionError.
_WFDB_ERRORS = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Source(Protocol):
    """A data set of recordings. Instances travel to worker processes, so they must be picklable."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""

    def items(self) -> list[str]:
        """The names of the records, sorted."""

    def read(self, item: str) -> Record:
        """One record; raises InputError that names the file and the reason."""


@dataclass(frozen=True)
class WfdbFolder:
    """All WFDB records below a folder.

    A record's name is its path below ``root``, without suffix, with ``/``.
    """

    root: Path
    dataset: str
    labels_csv: Path | None = None  # UTF-8 with column names; one row per record, see load_label_table
    record_column: str | None = None  # the column that names the record; None: the first usual one that does
    patient_key: str | None = (
        None  # column or comment with the patient; "@folder": the record's folder is the patient
    )
    ignore_leads: tuple[str, ...] = ()  # signals to leave out, by their name in the header, in any case
    # Interpolated at most, per lead. 1 % of 10 s is 100 ms: shorter than a QRS complex, so a gap cannot swallow a beat.
    max_invalid_fraction: float = 0.01
    verify_checksums: bool = (
        True  # of 2,843 real records all that fail have pages of 0xFF where samples should be
    )

    def items(self) -> list[str]:
        """Sorted names of the records; the segments of multi-segment records are no records of their own.

        Links to folders are not followed, nor are links to files outside ``root``. Raises InputError if there is no
        record or if ``labels_csv`` does not fit.
        """
        names = _headers_below(self.root)
        if not names:
            raise InputError(
                f"{self.root}: no WFDB header (*.hea) in this folder or below; links are not followed"
            )
        if self.labels_csv is not None:
            self._labels()
        segments = {segment for name in names for segment in _segments_of(self.root, name)}
        return [name for name in names if name not in segments]

    def read(self, item: str) -> Record:
        """The record of that name; raises InputError that names the file and the reason (see read_wfdb)."""
        labels = self._labels()
        return read_wfdb(
            self.root / f"{item}.hea",
            name=item,
            root=self.root,
            labels=labels,
            patient_key=self.patient_key,
            ignore_leads=self.ignore_leads,
            max_invalid_fraction=self.max_invalid_fraction,
            verify_checksums=self.verify_checksums,
        )

    def unlabelled(self) -> list[str]:
        """Names of the records without a row in ``labels_csv``; all of them where there is no such file."""
        labels = self._labels()
        return [item for item in self.items() if labels is None or item not in labels.rows]

    def _labels(self) -> LabelTable | None:
        return (
            None if self.labels_csv is None else _label_table(self.root, self.labels_csv, self.record_column)
        )


@functools.lru_cache(maxsize=4)
def _label_table(root: Path, labels_csv: Path, record_column: str | None) -> LabelTable:
    # Once per process, and outside of WfdbFolder, so that a pickled source stays a few hundred bytes.
    return load_label_table(labels_csv, root, _headers_below(root), record_column)


def read_wfdb(
    path: Path,
    *,
    name: str | None = None,
    root: Path | None = None,
    labels: LabelTable | None = None,
    patient_key: str | None = None,
    ignore_leads: Sequence[str] = (),
    max_invalid_fraction: float = 0.01,
    verify_checksums: bool = True,
) -> Record:
    """Read one WFDB record, single- or multi-segment, by the path of its header (with or without ``.hea``).

    ``signal_LT`` holds counts minus the baseline, exact where they fit into int16; ``scale_L`` mV per count. Where
    the header leaves the gain out it is 200 counts per mV, as header(5) defines; gain 0 is refused. Samples marked
    as invalid are interpolated along the lead and counted in ``invalid_samples``. Files outside ``root`` are
    refused if it is given. ``name`` (default: the file's) finds the record's row in ``labels``.

    Raises InputError that names the header and the reason: unreadable or implausible header, missing or truncated
    data, leads that are unknown, repeated or sampled at unequal rates, unknown units, a checksum that does not match,
    or more than ``max_invalid_fraction`` invalid samples in a lead.
    """
    header_path = path if path.suffix == ".hea" else path.with_name(f"{path.name}.hea")
    record_name = header_path.stem if name is None else name
    reader = _Reader(root, tuple(lead.strip().casefold() for lead in ignore_leads), verify_checksums)
    with _naming(header_path):
        header = reader.header(header_path)
        signals = reader.signals(header, header_path)
        filled_LT, n_invalid = _fill_invalid(signals, max_invalid_fraction)
        order = in_canonical_order(signals.leads)
        signal_LT, scale_L = fit_counts(filled_LT[order], signals.mv_per_count_L[order])
        known = describe(header.comments, labels, record_name, patient_key, _folder_name(header_path, root))
        return Record(
            name=record_name,
            signal_LT=signal_LT,
            scale_L=scale_L,
            rate_hz=signals.rate_hz,
            leads=tuple(signals.leads[i] for i in order),
            patient=known.patient,
            labels=known.labels,
            metadata=known.metadata,
            invalid_samples=n_invalid,
        )


def _folder_name(path: Path, root: Path | None) -> str | None:
    """The name of the record's own folder; None where that is ``root`` itself, which is nobody's."""
    folder = path.absolute().parent
    return None if root is not None and folder == root.absolute() else folder.name


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


# --- finding records ---


def _headers_below(root: Path) -> list[str]:
    """Sorted names of all headers, segments included."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; a folder with WFDB records is needed")

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    names = []
    for folder, _, files in os.walk(root, onerror=refuse):
        for file in files:
            path = Path(folder, file)
            if file.endswith(".hea") and file != ".hea" and _stays_inside(path, root):
                names.append(path.relative_to(root).as_posix().removesuffix(".hea"))
    return sorted(names)


def _stays_inside(path: Path, root: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(root.resolve())


def _segments_of(root: Path, name: str) -> list[str]:
    """Names of the segments if the record has such, as far as they are plain records."""
    path = root / f"{name}.hea"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        lines = file.read(_SEGMENT_PEEK_BYTES).splitlines()
    record_line = next((line for line in lines if line.strip() and not line.lstrip().startswith(b"#")), b"")
    if b"/" not in record_line.split(b" ", 1)[0]:
        return []
    try:
        segments = _Reader(root).header(path).segments
    except InputError:
        return []  # read() will say why
    folder = name.rpartition("/")[0]
    names = [f"{folder}/{segment}" if folder else segment for segment, _ in segments]
    return [segment for segment in names if segment != name]


# --- samples ---


@dataclass(frozen=True)
class _Signals:
    leads: tuple[str, ...]  # canonical names, in the order of the header
    counts_LT: npt.NDArray[np.int64]  # baseline subtracted
    valid_LT: npt.NDArray[np.bool_]
    mv_per_count_L: npt.NDArray[np.float64]
    rate_hz: float


@dataclass(frozen=True)
class _Reader:
    """Reads one record. Its methods raise InputErrors that do not name the record's header: the caller does."""

    root: Path | None = None
    ignored: tuple[str, ...] = ()  # casefolded names of signals
    verify_checksums: bool = True

    def header(self, path: Path) -> Header:
        self._check_place(path)
        if not path.is_file():
            raise InputError("no such header")
        try:
            content = path.read_bytes() if path.stat().st_size <= _MAX_HEADER_BYTES else None
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})") from error
        if content is None:
            raise InputError(f"{path.stat().st_size} bytes; a header has at most {_MAX_HEADER_BYTES}")
        try:
            return parse_header(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(f"not a text header: byte {content[error.start]:#04x} is not UTF-8") from error

    def signals(self, header: Header, path: Path) -> _Signals:
        if not header.segments:
            return self._plain_signals(header, path)
        lengths = [length for _, length in header.segments]
        if header.n_frames not in (None, sum(lengths)):
            raise InputError(
                f"the segments hold {sum(lengths)} samples, the first line says {header.n_frames}"
            )
        if sum(lengths) * len(LEADS) > _MAX_VALUES:
            raise InputError(
                f"{sum(lengths)} samples; a record has at most {_MAX_VALUES // len(LEADS)} per lead"
            )
        pieces = [
            (
                length,
                None if name == "~" else self._segment(path.with_name(f"{name}.hea"), length, header.rate_hz),
            )
            for name, length in header.segments
            if length  # 0: the layout header of a record with changing leads; its leads come with the segments
        ]
        return _join(pieces, header.rate_hz)

    def _segment(self, path: Path, length: int, rate_hz: float) -> _Signals:
        with _naming(Path(path.name)):
            header = self.header(path)
            if header.segments:
                raise InputError("a segment that has segments itself; segments must be plain records")
            if header.n_frames not in (None, length):
                raise InputError(f"the segment holds {header.n_frames} samples, the record says {length}")
            if header.rate_hz != rate_hz:
                raise InputError(f"the segment has {header.rate_hz:g} Hz, the record {rate_hz:g} Hz")
            return self._plain_signals(header, path)

    def _plain_signals(self, header: Header, path: Path) -> _Signals:
        kept = [i for i, line in enumerate(header.signals) if line.name.casefold() not in self.ignored]
        lines = [header.signals[i] for i in kept]
        if not lines:
            raise InputError(
                f"all {len(header.signals)} signals are among the ignored ones; a lead is needed"
            )
        leads = canonical_leads([line.name for line in lines])
        mv_per_count_L = np.array([line.mv_per_count() for line in lines])
        per_frame = {line.samples_per_frame: line.name for line in lines}
        if len(per_frame) > 1:
            rates = ", ".join(f"{name} {n * header.rate_hz:g} Hz" for n, name in per_frame.items())
            raise InputError(f"signals of unequal rates ({rates}); ignore all but those of one rate")
        rate_hz = header.rate_hz * lines[0].samples_per_frame
        if rate_hz > MAX_RATE_HZ:
            raise InputError(f"sampling rate {rate_hz:g} Hz; it must be at most {MAX_RATE_HZ:g} Hz")
        n_frames = self._check_data_files(header, path)
        samples = _decode(path, kept, n_frames * lines[0].samples_per_frame)
        if self.verify_checksums:
            _check_sums(lines, samples)
        valid_LT = np.stack([_valid(line, sample_T) for line, sample_T in zip(lines, samples, strict=True)])
        counts_LT = np.stack(
            [s.astype(np.int64) - line.baseline for line, s in zip(lines, samples, strict=True)]
        )
        for line, count_T, valid_T in zip(lines, counts_LT, valid_LT, strict=True):
            _undo_skew(line, count_T, valid_T)
        return _Signals(leads, counts_LT, valid_LT, mv_per_count_L, rate_hz)

    def _check_data_files(self, header: Header, path: Path) -> int:
        """The number of frames; raises InputError unless every data file is there and holds so many."""
        groups: dict[str, list[SignalLine]] = {}
        previous = None
        for line in header.signals:
            if line.file_name in groups and line.file_name != previous:
                # wfdb takes the signals of a file for neighbours and would mix them up.
                raise InputError(f"signals of {line.file_name} do not stand together; a file's signals must")
            groups.setdefault(line.file_name, []).append(line)
            previous = line.file_name
        n_frames = header.n_frames
        for file_name, lines in groups.items():
            if all(line.name.casefold() in self.ignored for line in lines):
                continue
            with _naming(Path(file_name)):
                available = self._frames_in(path.with_name(file_name), lines)
                n_frames = available if n_frames is None else n_frames
                if available < n_frames or n_frames == 0:
                    raise InputError(f"truncated: {available} samples per signal, the header says {n_frames}")
        assert n_frames is not None
        if n_frames * sum(line.samples_per_frame for line in header.signals) > _MAX_VALUES:
            raise InputError(
                f"{n_frames} samples of {len(header.signals)} signals; at most {_MAX_VALUES} in all"
            )
        return n_frames

    def _frames_in(self, path: Path, lines: Sequence[SignalLine]) -> int:
        """The most frames that a data file can hold, judged by its size."""
        first = lines[0]
        if any((line.format, line.byte_offset) != (first.format, first.byte_offset) for line in lines):
            raise InputError("signals of one file with unequal formats or offsets; they must be equal")
        if first.format not in _FORMAT_BITS.keys() | _PACKED_BYTES.keys():
            raise InputError(f"format {first.format!r} is unknown; known are {_KNOWN_FORMATS}")
        self._check_place(path)
        if not path.is_file():
            raise InputError("no such data file")
        if first.format in _FLAC_FORMATS:
            return _flac_samples(path, len(lines), first.byte_offset) // first.samples_per_frame
        n_bytes = path.stat().st_size - first.byte_offset
        bytes_per_sample = _PACKED_BYTES.get(first.format) or _FORMAT_BITS[first.format] / 8
        return max(0, int(n_bytes / (bytes_per_sample * sum(line.samples_per_frame for line in lines))))

    def _check_place(self, path: Path) -> None:
        if self.root is not None and not path.resolve().is_relative_to(self.root.resolve()):
            raise InputError(f"lies outside of {self.root}; links may not lead out")


def _flac_samples(path: Path, n_channels: int, offset: int) -> int:
    """Samples per channel after ``offset``, as the FLAC file's own header (STREAMINFO) says; checked against its size."""
    with path.open("rb") as file:
        head = file.read(42)
    if len(head) < 42 or head[:4] != b"fLaC":
        raise InputError("not a FLAC file, or one that ends in its header")
    n_samples = int.from_bytes(head[21:26], "big") & ((1 << 36) - 1)
    if n_samples > path.stat().st_size * _FLAC_SAMPLES_PER_BYTE:
        raise InputError(f"{n_samples} samples in {path.stat().st_size} bytes; FLAC cannot pack so many")
    return max(0, n_samples - offset)


def _decode(path: Path, channels: list[int], n_samples: int) -> list[npt.NDArray[np.int32]]:
    """The raw samples of some signals as wfdb decodes them."""
    try:
        decoded = wfdb.rdrecord(
            str(path.with_suffix("").absolute()),
            channels=channels,
            physical=False,
            smooth_frames=False,  # smoothing would average the samples of a frame and round them
            ignore_skew=True,  # the checksum is one of the samples in the file's own order
            return_res=32,
        ).e_d_signal
    except _WFDB_ERRORS as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise InputError(f"wfdb cannot read the samples: {type(error).__name__}: {reason}") from error
    samples: list[npt.NDArray[np.int32]] = decoded
    assert [len(sample_T) for sample_T in samples] == [n_samples] * len(channels)
    return samples


def _check_sums(lines: Sequence[SignalLine], samples: Sequence[npt.NDArray[np.int32]]) -> None:
    for line, sample_T in zip(lines, samples, strict=True):
        found = int(sample_T.sum(dtype=np.int64)) % 65_536
        if line.checksum is not None and line.checksum % 65_536 != found:
            raise InputError(
                f"checksum of signal {line.name!r}: the header says {line.checksum % 65_536}, the data give {found}; "
                "the data are damaged"
            )


def _valid(line: SignalLine, sample_T: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    bits = _FORMAT_BITS.get(line.format)
    return sample_T != -(1 << (bits - 1)) if bits else np.ones(sample_T.shape, bool)


def _undo_skew(line: SignalLine, count_T: npt.NDArray[np.int64], valid_T: npt.NDArray[np.bool_]) -> None:
    """Bring a signal forward in place; what would come after the end of the file is invalid."""
    lag = min(line.skew * line.samples_per_frame, len(count_T))
    if lag:
        for array in (count_T, valid_T):
            array[:-lag] = array[lag:].copy()
        valid_T[-lag:] = False


def _join(pieces: Sequence[tuple[int, _Signals | None]], frame_rate_hz: float) -> _Signals:
    """Segments one after the other. Where a lead is missing in one, its samples are invalid."""
    present = [signals for _, signals in pieces if signals is not None]
    if not present:
        raise InputError("no segment with samples")
    rates_hz = sorted({signals.rate_hz for signals in present})
    if len(rates_hz) > 1:
        raise InputError(f"segments of {rates_hz[0]:g} Hz and {rates_hz[1]:g} Hz; one rate is needed")
    scales: dict[str, float] = {}
    for signals in present:
        for lead, scale in zip(signals.leads, signals.mv_per_count_L.tolist(), strict=True):
            if scales.setdefault(lead, scale) != scale:
                raise InputError(
                    f"lead {lead} has {scales[lead]:g} and {scale:g} mV per count; one gain is needed"
                )
    leads = tuple(scales)
    per_frame = round(rates_hz[0] / frame_rate_hz)
    counts_LT = np.zeros((len(leads), per_frame * sum(length for length, _ in pieces)), np.int64)
    valid_LT = np.zeros(counts_LT.shape, bool)
    start = 0
    for length, piece in pieces:
        stop = start + per_frame * length
        if piece is not None:
            rows = [leads.index(lead) for lead in piece.leads]
            counts_LT[rows, start:stop] = piece.counts_LT
            valid_LT[rows, start:stop] = piece.valid_LT
        start = stop
    return _Signals(leads, counts_LT, valid_LT, np.array(list(scales.values())), rates_hz[0])


def _fill_invalid(signals: _Signals, max_fraction: float) -> tuple[npt.NDArray[np.int64], int]:
    """-> (counts with invalid samples interpolated along the lead, how many they are)."""
    n_samples = signals.valid_LT.shape[1]
    n_invalid_L = n_samples - signals.valid_LT.sum(axis=1)
    filled_LT = signals.counts_LT.copy()
    for i in np.flatnonzero(n_invalid_L):
        fraction = n_invalid_L[i] / n_samples
        if fraction > max_fraction or n_invalid_L[i] == n_samples:
            raise InputError(
                f"lead {signals.leads[i]}: {n_invalid_L[i]} of {n_samples} samples are marked invalid; "
                f"at most {max_fraction:.1%} may be"
            )
        valid_T = signals.valid_LT[i]
        at = np.flatnonzero(~valid_T)
        filled_LT[i, at] = np.rint(np.interp(at, np.flatnonzero(valid_T), signals.counts_LT[i, valid_T]))
    return filled_LT, int(n_invalid_L.sum())
