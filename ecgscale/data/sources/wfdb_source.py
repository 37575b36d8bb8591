"""WFDB records, and folders of them -> Records. The sole importer of wfdb.

Everything that can be wrong before samples are read (header, file names, sizes) is checked here first, so that
nothing is allocated, followed or defaulted on the word of a broken header. What is refused, is refused with one
InputError that names the file. wfdb decodes FLAC; the plain formats are read by ``wfdb_formats``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ecgscale.data.description import describe
from ecgscale.data.label_columns import LabelColumns
from ecgscale.data.label_table import LabelTable, load_label_table, paths_of
from ecgscale.data.matching import NameMatcher
from ecgscale.data.plausibility import absent_remark, check_codes, plausible
from ecgscale.data.sources.listing import contents_below, left_out
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.wfdb_listing import (
    check_place,
    fingerprint_of,
    headers_below,
    read_header,
    stamp_of,
    without_segments,
)
from ecgscale.data.wfdb_formats import (
    FLAC_FORMATS,
    PADDING,
    Integers,
    empty_samples,
    frame_blocks,
    frames_in,
    read_file,
)
from ecgscale.data.wfdb_header import Header, SignalLine
from ecgscale.data.wfdb_signals import (
    LONGER,
    UNSUMMED,
    Signals,
    by_file,
    check_sums,
    fill_invalid,
    join,
    to_signals,
    without_blank,
)
from ecgscale.errors import InputError, MachineError, disk_failed, file_error
from ecgscale.lead_names import LEADS, in_canonical_order
from ecgscale.record import MAX_VALUES, Record, Remark, check_rate, fit_counts

with warnings.catch_warnings():
    # wfdb 4.3.1 does so while it is imported; pandas 3 warns.
    warnings.filterwarnings("ignore", "The inplace keyword in DataFrame.set_index", DeprecationWarning)
    import wfdb as wfdb

# What wfdb and the libraries below it raise for damaged files. Its own HeaderSyntaxError is a ValueError,
# soundfile's LibsndfileError a RuntimeError, as is RecursionError.
_DECODING_ERRORS: tuple[type[Exception], ...] = (ArithmeticError, AttributeError, EOFError, LookupError)
_DECODING_ERRORS += (MemoryError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class WfdbFolder:
    """All WFDB records below a folder.

    A record's name is its path below ``root``, without suffix, with ``/``.
    """

    root: Path
    dataset: str
    labels_csv: Path | tuple[Path, ...] | None = None
    """UTF-8 with column names, one row per record: see load_label_table."""
    record_column: str | None = None
    """Column that names the record; None: the first of the usual ones that does."""
    patient_key: str | None = None
    """Column or comment with the patient; "@folder": the name of the record's folder is the patient."""
    ignore_leads: tuple[str, ...] = ()
    """Signals to leave out, by their name in the header, upper or lower case alike."""
    rename_leads: tuple[tuple[str, str], ...] = ()
    """(name in the header, lead) of signals whose names are none of a lead's."""
    max_invalid_fraction: float = 0.01
    """Of a lead, that may be interpolated. 1 % of 10 s is 100 ms, too short to swallow a heartbeat."""
    verify_checksums: bool = True
    """Refuse data that miss the header's checksums; of 2,843 real records 9 do, all truly damaged."""
    hints: tuple[str, ...] = ()
    """What was thought of the folder when it was opened, one line each."""
    label_columns: LabelColumns = ()
    """Columns of flags that are classes of one label."""

    @property
    def description(self) -> str:
        """One line for people."""
        names = " and ".join(map(str, paths_of(self.labels_csv)))
        labels = f", labels from {names}" if names else ""
        return f"{self.root}: a folder of WFDB records{labels}"

    def items(self) -> list[str]:
        """Sorted names of the records; segments of multi-segment records are no records of their own.

        Links to folders are not followed, nor are links to files outside of ``root``. Raises InputError if
        there is no record or if ``labels_csv`` does not fit.
        """
        names = headers_below(self.root)
        if not names:
            others = "".join(f"; {line}" for line in self.left_out())
            raise InputError(f"{self.root}: no WFDB header (*.hea) in or below it; links are not followed{others}")
        _ = self.labels  # read before the source is handed to workers, which share it
        return without_segments(self.root, names)

    def read(self, item: str) -> Record:
        """The record of that name; raises InputError that names the file and the reason (see read_wfdb, plausible)."""
        path = self.root / f"{item}.hea"
        record = read_wfdb(
            path,
            name=item,
            root=self.root,
            labels=self.labels,
            patient_key=self.patient_key,
            ignore_leads=self.ignore_leads,
            rename_leads=self.rename_leads,
            max_invalid_fraction=self.max_invalid_fraction,
            verify_checksums=self.verify_checksums,
        )
        return plausible(record, path)

    def fingerprint(self, item: str) -> bytes:
        """Its headers and samples; the user's tables are known by their content."""
        return fingerprint_of(self.root, item)

    def stamp(self, item: str) -> bytes:
        """The same without reading samples."""
        return stamp_of(self.root, item)

    def unlabelled(self) -> list[str]:
        """Names of the records without a row in ``labels_csv``; all of them where there is no such file."""
        labels = self.labels
        return [item for item in self.items() if labels is None or item not in labels]

    def left_out(self) -> list[str]:
        """Lines on what below the folder is not read, and why."""
        return [*self.hints, *left_out(contents_below(self.root), ".hea")]

    @functools.cached_property
    def labels(self) -> LabelTable | None:
        """The table of the user's; None where there is none."""
        if not (csv_paths := paths_of(self.labels_csv)):
            return None
        matcher = NameMatcher(self.root, headers_below(self.root))
        return load_label_table(csv_paths, matcher, Scratch.make(), self.record_column, self.label_columns)


def read_wfdb(
    path: Path,
    *,
    name: str | None = None,
    root: Path | None = None,
    labels: LabelTable | None = None,
    patient_key: str | None = None,
    ignore_leads: Sequence[str] = (),
    rename_leads: Sequence[tuple[str, str]] = (),
    max_invalid_fraction: float = 0.01,
    verify_checksums: bool = True,
    shown: Path | None = None,
) -> Record:
    """Read one WFDB record, single- or multi-segment, by the path of its header (with or without ``.hea``).

    ``signal_LT`` holds counts minus the baseline, exact where they fit into int16; ``scale_L`` mV per count. A lead
    that does not fit loses its median first, an electrode offset, which ``offset_mv`` keeps (see fit_counts).
    Where the header leaves the gain out it is 200 counts per mV, as header(5) defines; gain 0 is refused.
    Samples that are marked as invalid are interpolated along the lead and counted in ``invalid_samples``; a lead
    without any valid one is left out as absent, and remarked. If ``root`` is given, files outside of it are refused.
    ``name`` (default: the file's) finds the record's row in ``labels``. ``shown`` is what errors call the header; None:
    its path.

    Raises InputError that names the header and the reason: unreadable or implausible header, missing or
    truncated data, leads that are unknown, repeated or sampled at unequal rates, unknown units, a checksum
    that does not match, a code for missing samples (see check_codes), or more than ``max_invalid_fraction`` invalid
    samples in a lead that has valid ones.
    """
    if not path.name:
        raise InputError(f"{path}: not the path of a record")
    header_path = path if path.suffix == ".hea" else path.with_name(f"{path.name}.hea")
    record_name = header_path.stem if name is None else name
    ignored = tuple(lead.strip().casefold() for lead in ignore_leads)
    reader = _Reader(root, ignored, verify_checksums, tuple(rename_leads))
    with _naming(shown or header_path):
        header = read_header(header_path, root)
        signals = reader.signals(header, header_path)
        signals, blank = without_blank(signals)
        n_invalid = fill_invalid(signals, max_invalid_fraction)
        for lead, count_T, baseline in zip(signals.leads, signals.counts_L, signals.baseline_L, strict=True):
            check_codes(count_T, baseline, lead)
        order = in_canonical_order(signals.leads)
        fitted = fit_counts([signals.counts_L[i] for i in order], signals.mv_per_count_L[order])
        known = describe(header.comments, labels, record_name, patient_key, _folder_name(header_path, root))
        return Record.of(
            record_name,
            fitted,
            signals.rate_hz,
            tuple(signals.leads[i] for i in order),
            patient=known.patient,
            labels=known.labels,
            metadata=known.metadata,
            invalid_samples=n_invalid,
            notes=known.notes,
            patient_key=known.patient_key,
            remarks=tuple(_remarks(signals, blank)),
        )


def _remarks(signals: Signals, blank: Sequence[str]) -> Iterator[Remark]:
    if blank:
        yield absent_remark(blank)
    if signals.unsummed:
        yield Remark(UNSUMMED)
    if signals.longer:
        yield Remark(LONGER, signals.longer)


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
    except MachineError as error:
        raise MachineError(f"{path}: {error}") from error
    except OSError as error:
        raise file_error(path, "cannot be read", error) from error


# --- samples ---


@dataclass(frozen=True)
class _Reader:
    """Reads one record. Its InputErrors do not name the record's header; the caller does."""

    root: Path | None = None
    ignored: tuple[str, ...] = ()  # casefolded names of signals
    verify_checksums: bool = True
    renames: tuple[tuple[str, str], ...] = ()

    def signals(self, header: Header, path: Path) -> Signals:
        if not header.segments:
            return self._plain_signals(header, path)
        lengths = [length for _, length in header.segments]
        if header.n_frames not in (None, sum(lengths)):
            raise InputError(f"the segments hold {sum(lengths)} samples, the first line says {header.n_frames}")
        if sum(lengths) * len(LEADS) > MAX_VALUES:
            raise InputError(f"{sum(lengths)} samples; a record has at most {MAX_VALUES // len(LEADS)} per lead")
        segments: list[tuple[int, Signals | None]] = []
        for name, length in header.segments:
            if name == "~":
                segments.append((length, None))
            elif length:  # 0: the layout header of a record whose leads change; they come with the segments
                segments.append((length, self._segment(path.with_name(f"{name}.hea"), length, header.rate_hz)))
        return join(segments, header.rate_hz)

    def _segment(self, path: Path, length: int, rate_hz: float) -> Signals:
        with _naming(Path(path.name)):
            header = read_header(path, self.root)
            if header.segments:
                raise InputError("a segment that has segments itself; segments must be plain records")
            if header.n_frames not in (None, length):
                raise InputError(f"the segment holds {header.n_frames} samples, the record says {length}")
            if header.rate_hz != rate_hz:
                raise InputError(f"the segment has {header.rate_hz:g} Hz, the record {rate_hz:g} Hz")
            return self._plain_signals(replace(header, n_frames=length), path)

    def _plain_signals(self, header: Header, path: Path) -> Signals:
        kept = [i for i, line in enumerate(header.signals) if not self._ignores(line)]
        lines = [header.signals[i] for i in kept]
        if not lines:
            raise InputError(f"all {len(header.signals)} signals are among the ignored ones; a lead is needed")
        per_frame = {line.samples_per_frame: line.name for line in lines}
        if len(per_frame) > 1:
            rates = ", ".join(f"{name!r} {n * header.rate_hz:g} Hz" for n, name in per_frame.items())
            raise InputError(f"signals of unequal rates ({rates}); ignore all but those of one rate")
        rate_hz = header.rate_hz * lines[0].samples_per_frame
        check_rate(rate_hz)
        n_frames, longer = self._check_data_files(header, path)
        samples = _decode(header, path, kept, n_frames)
        try:
            unsummed = self.verify_checksums and not check_sums(lines, samples)
        except InputError as error:
            raise InputError(f"{error}, or the header is not theirs: {longer}") if longer else error from error
        return replace(to_signals(lines, samples, rate_hz, dict(self.renames)), unsummed=unsummed, longer=longer)

    def _ignores(self, line: SignalLine) -> bool:
        return line.name.casefold() in self.ignored

    def _check_data_files(self, header: Header, path: Path) -> tuple[int, str]:
        """The number of frames, and which file holds more.

        Raises InputError unless every data file is there and holds so many.
        """
        n_frames, given_by, longer = header.n_frames, "the header says", ""
        for file_name, lines in by_file(header.signals).items():
            if all(map(self._ignores, lines)):
                continue
            with _naming(Path(file_name)):
                check_place(path.with_name(file_name), self.root)
                available = frames_in(path.with_name(file_name), lines)
                if n_frames is None:
                    n_frames, given_by = available, f"the header says no number and {file_name} holds"
                elif header.n_frames is None and available > n_frames:
                    raise InputError(f"{available} samples per signal; {given_by} {n_frames}; write it into the header")
                if (available - n_frames) * sum(line.samples_per_frame for line in lines) > PADDING:
                    longer = f"{file_name} holds {available} samples per signal, {given_by} {n_frames}"
                if available < n_frames or n_frames == 0:
                    raise InputError(f"truncated: {available} samples per signal, {given_by} {n_frames}")
        assert n_frames is not None
        if n_frames * sum(line.samples_per_frame for line in header.signals) > MAX_VALUES:
            raise InputError(f"{n_frames} samples of {len(header.signals)} signals; at most {MAX_VALUES} in all")
        return n_frames, longer


def _decode(header: Header, path: Path, channels: Sequence[int], n_frames: int) -> list[Integers]:
    """The raw samples of some signals, in the order of their file."""
    samples = empty_samples([header.signals[i] for i in channels], n_frames)
    room = dict(zip(channels, samples, strict=True))
    end = 0
    for file_name, lines in by_file(header.signals).items():
        begin, end = end, end + len(lines)
        wanted = [i for i in range(begin, end) if i in room]
        if not wanted:
            continue
        columns = np.cumsum([0, *(line.samples_per_frame for line in lines)]).tolist()
        with _naming(Path(file_name)):
            data_path = path.with_name(file_name)
            read = _read_flac if lines[0].format in FLAC_FORMATS else read_file
            for first, stop, block_FW in read(data_path, lines, n_frames):
                for i in wanted:
                    left, right = columns[i - begin : i - begin + 2]
                    width = right - left
                    room[i][first * width : stop * width] = block_FW[:, left:right].reshape(-1)
    return samples


def _read_flac(path: Path, lines: Sequence[SignalLine], n_frames: int) -> Iterator[tuple[int, int, Integers]]:
    """As wfdb_formats.read_file."""
    # wfdb's public reader asks the header for the length, which it may leave out, and holds all signals several times.
    folder, n_signals = str(path.absolute().parent), len(lines)
    if "::" in folder:
        raise InputError("'::' in the path, which wfdb takes for a chain of protocols; rename the folder")
    of_file = (lines[0].format, n_signals, n_frames, lines[0].byte_offset)
    of_signals = ([line.samples_per_frame for line in lines], [0] * n_signals, [0] * n_signals)  # frame, skew, initial
    for first, stop in frame_blocks(n_frames, lines):
        try:
            signals = wfdb.io._signal._rd_dat_signals(path.name, folder, None, *of_file, *of_signals, first, stop)
        except _DECODING_ERRORS as error:
            if disk_failed(error):
                raise
            reason = " ".join(str(error).split()) or "no reason given"
            raise InputError(f"the samples cannot be read: {type(error).__name__}: {reason}") from error
        columns = [signal_T.reshape(-1, line.samples_per_frame) for line, signal_T in zip(lines, signals, strict=True)]
        yield first, stop, np.concatenate(columns, axis=1)
