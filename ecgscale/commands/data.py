"""`ecgscale ingest`, `simulate`, `index`, `verify` and `inspect`: recordings become data sets, and are looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ecgscale.commands.command import Command, part_of_n
from ecgscale.data.label_columns import parse_label_columns
from ecgscale.data.source_options import LAYOUTS, SourceOptions
from ecgscale.errors import InputError
from ecgscale.lead_names import parse_renames
from ecgscale.registry import is_code
from ecgscale.settings import option

if TYPE_CHECKING:
    from ecgscale.data.ingest import Ingested, IngestOptions
    from ecgscale.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How patients are split."""

    validation_fraction: float | None = None
    """Share of patients for validation, by hash; where it is not given 0.1, or 0 with --test-fraction 1."""
    test_fraction: float = 0.0
    """Share of patients for test, by hash; 1: a set from elsewhere, all of it for testing."""
    split_by: str = option("", metavar="KEY")
    """Label or metadata key that names the split, such as strat_fold."""
    validation_values: tuple[str, ...] = ()
    """Values of --split-by for validation."""
    test_values: tuple[str, ...] = ()
    """Values of --split-by for test."""

    def splits(self) -> dict[str, Any]:
        """For IngestOptions."""
        given = {one.name: getattr(self, one.name) for one in fields(Splits)}
        if self.validation_fraction is None:
            given["validation_fraction"] = 0.0 if self.test_fraction == 1 else 0.1
        return given


@dataclass(frozen=True, kw_only=True)
class Writing(Splits):
    """How records become shards, and how the work is shared out."""

    rate_hz: float = 500.0
    """Sample rate of the shards."""
    records_per_shard: int = 512
    """Source records per tar."""
    payload: Literal["pco", "npy"] = "pco"
    """Samples losslessly compressed, or plain."""
    workers: int = option(default_factory=lambda: os.cpu_count() or 1)
    """Processes, by default one for each core; bytes do not depend on it."""
    part: str = option("", metavar="I/N")
    """Write only the shards of part I of N (1/N to N/N) and do not finish."""
    merge: bool = False
    """Finish the data set, when all its parts have been written."""
    restart: bool = False
    """Throw away what an interrupted ingest has done instead of going on."""
    append: bool = False
    """Add to the data set in OUT, which stays usable until this is done."""

    def __post_init__(self) -> None:
        if sum([bool(self.part), self.merge, self.restart]) > 1:
            raise InputError("--part, --merge and --restart: give one of them")
        if self.part:
            part_of_n(self.part)

    def options(self) -> IngestOptions:
        from ecgscale.data.ingest import IngestOptions

        return IngestOptions(self.rate_hz, self.records_per_shard, self.payload, **self.splits())

    def write(self, source: Source, out: Path, arguments: dict[str, str]) -> None:
        """Ingest a source, or a part of it, and print what came of it."""
        from ecgscale.data.ingest import ingest, ingest_part, merge_parts

        chosen = self.options()
        about: dict[str, Any] = {"append": self.append, "arguments": arguments}
        if self.part:
            missing = ingest_part(source, out, chosen, part_of_n(self.part), self.workers, **about)
            what = (
                f"{missing} shards of other parts are missing" if missing else "all shards are there, --merge finishes"
            )
            print(f"{out}: part {self.part} is done; {what}")
            return
        if self.merge:
            done = merge_parts(source, out, chosen, **about)
        else:
            done = ingest(source, out, chosen, self.workers, restart=self.restart, **about)
        for line in _came_of(done, out):
            print(f"{out}: {line}")


def _came_of(done: Ingested, out: Path) -> Iterator[str]:
    from ecgscale.data import remarked
    from ecgscale.data.cells import told
    from ecgscale.data.copies import COPIES

    if done.held:
        yield f"{done.held} records left out: the set has them already, by the same names and with equal samples"
    for dataset, n in done.shared_ids.items():
        yield (
            f"{n} patient ids occur in {dataset} too, where they count as other people, since patients are "
            f"(data set, id); if they are the same people give --dataset {dataset}"
        )
    yield from done.copies
    if done.copies:
        yield f"all copies stand in {out / COPIES}"
    yield from done.odd_names
    if not done.patients_known:
        yield "no patient ids found, so each record counts as a person of its own; see --patient-key"
    yield from told(done.notes, done.patients_known)
    yield from remarked.lines(done.remarked, done.records, f" (see {out / 'remarks.csv'})")
    rejected = f" (see {out / 'rejected.csv'})" if done.rejected else ""
    yield f"{done.records} records in {done.shards} shards, {done.rejected} rejected{rejected}"


@dataclass(frozen=True, kw_only=True)
class Ingest(Writing, Command):
    """Recordings (WFDB, known data sets, HDF5, .npy) become tar shards with a manifest and an index."""

    source: Path = option(positional=True)
    """Folder or archive (.zip, .tar, .tar.gz ...) of WFDB records, or another --layout."""
    out: Path = option(positional=True)
    """Folder to make; where it was interrupted, the same command goes on."""
    layout: str = "auto"
    """How the source is laid out: ptbxl, mimic-iv-ecg, cinc2021, code15, npy, wfdb, or package.module:Class for one of
    your own. auto: by its files, one of ours."""
    dataset: str | None = None
    """Name of the data set, by default that of the source folder; patients are (data set, id)."""
    labels: tuple[Path, ...] = option((), repeated=True, metavar="CSV")
    """Labels by record name, several in a cell as A|B or as a list; given more than once: one table."""
    label_columns: tuple[str, ...] = option((), repeated=True, whole=True, metavar="NAME=A,B,C")
    """Columns of 1 and 0 (true and false) that are the classes of one label NAME (without NAME=: labels)."""
    record_column: str | None = option(None, metavar="NAME")
    """Column of the CSV that names the record."""
    patient_key: str | None = option(None, metavar="KEY")
    """CSV column or header comment that names the patient; @folder: the record's folder."""
    ignore_leads: tuple[str, ...] = ()
    """Signals to leave out, such as vx,vy,vz; other unknown leads reject a record."""
    rename_leads: tuple[str, ...] = option((), metavar="DI=I,DII=II")
    """Leads that the files call otherwise: their names."""
    source_rate_hz: float | None = None
    """Sample rate of .npy arrays."""
    source_leads: tuple[str, ...] = option((), metavar="I,II,...")
    """Leads of .npy arrays, in their order; by default all 12."""
    unit: str | None = None
    """Of floats in .npy and HDF5: V, mV (default) or uV, or a multiple such as 0.5mV."""
    mv_per_count: float | None = None
    """Millivolts per count of integers in .npy."""

    def run(self) -> None:
        from ecgscale.data.sources import implausible_unit, open_source
        from ecgscale.data.sources.listing import shared_names

        source = open_source(self.source, self._source_options())
        about = [f"{LAYOUTS.key} {LAYOUTS.place(self.layout)}"] if is_code(self.layout) else []
        about.append(source.description)
        if not self.part:  # --merge says it once for all
            about += [f"{self.source}: {line}" for line in source.left_out()]
            if self.patient_key == "@folder" and (line := shared_names(source.items())):
                about.append(f"{self.source}: {line}")
            if source.labels is not None:
                about += source.labels.remarks
        if warning := implausible_unit(source):
            about.append(f"{self.source}: {warning}")
        print("\n".join(about).encode(errors="backslashreplace").decode())  # paths may be in an old encoding
        self.write(source, self.out, self._arguments())
        if source.labels is None:
            return
        names = " and ".join(map(str, self.labels))
        if without := source.unlabelled():
            print(f"{len(without)} records have no row in {names}, such as {without[0]}")
        for line in source.labels.coverage(source.items()):
            print(line)
        if source.labels.rows_of_none:
            print(f"{source.labels.rows_of_none} rows of {names} name no record, such as {source.labels.row_of_none}")

    def _source_options(self) -> SourceOptions:
        return SourceOptions(
            dataset=self.dataset,
            layout=self.layout,
            labels_csv=self.labels,
            label_columns=parse_label_columns(self.label_columns),
            record_column=self.record_column,
            patient_key=self.patient_key,
            ignore_leads=self.ignore_leads,
            rename_leads=parse_renames(self.rename_leads),
            source_rate_hz=self.source_rate_hz,
            source_leads=self.source_leads,
            unit=self.unit,
            mv_per_count=self.mv_per_count,
        )

    def _arguments(self) -> dict[str, str]:
        """What else the bytes of a record depend on; of a file, such as a table of labels, its content."""
        from ecgscale.files import file_sha256

        # The source itself counts by the names of its records: it may be mounted elsewhere on another machine.
        own = {one.name for one in fields(self)} - {one.name for one in fields(Writing)} - {"source", "out"}

        def content(value: object) -> str:
            if isinstance(value, tuple) and value and isinstance(value[0], Path):
                return " and ".join(map(content, value))
            if isinstance(value, tuple):
                return ",".join(value)
            return f"of sha256 {file_sha256(value)}" if isinstance(value, Path) and value.is_file() else str(value)

        given = {name: getattr(self, name) for name in sorted(own)}
        return {
            f"--{name.replace('_', '-')}": content(value)
            for name, value in given.items()
            if value not in (None, "", ())
        }


@dataclass(frozen=True, kw_only=True)
class Simulate(Writing, Command):
    """Simulated, labelled 12-lead ECGs become tar shards."""

    out: Path = option(positional=True)
    """Folder to make."""
    patients: int = 400
    """Patients."""
    records_per_patient: int = 2
    """Recordings of each."""
    duration_s: float = 10.0
    """Length of a recording in seconds."""
    noise: float = 1.0
    """Factor on all noise."""
    seed: int = 0
    """Equal seeds give equal bytes."""
    test_fraction: float = 0.2
    """Share of patients for test, by hash."""

    def run(self) -> None:
        from ecgscale.simulate import Simulation

        source = Simulation(
            patients=self.patients,
            records_per_patient=self.records_per_patient,
            seed=self.seed,
            duration_s=self.duration_s,
            rate_hz=self.rate_hz,
            noise=self.noise,
        )
        named = ("patients", "records_per_patient", "duration_s", "noise", "seed")
        self.write(source, self.out, {f"--{name.replace('_', '-')}": str(getattr(self, name)) for name in named})


@dataclass(frozen=True, kw_only=True)
class Index(Splits, Command):
    """Tars that others wrote with the webdataset library become a data set, by an index beside them.

    A sample is KEY.npy, int16 counts (leads, samples), and KEY.json with the rate (rate_hz, fs, sampling_rate ...), the
    leads (leads, sig_name ...), the scale (mv_per_count, or gain in counts per mV or units), patient and labels.
    """

    folder: Path = option(positional=True)
    """Folder of the *.tar files, which are not changed."""
    dataset: str = ""
    """Name of the data set, by default that of the folder."""
    rate_hz: float | None = None
    """Sample rate, where the JSON does not say it."""
    leads: tuple[str, ...] = option((), metavar="I,II,...")
    """Rows of the arrays, where the JSON does not say them; by default the 12."""
    rename_leads: tuple[str, ...] = option((), metavar="DI=I,DII=II")
    """Leads that the JSON calls otherwise."""
    mv_per_count: float | None = None
    """Millivolts per count, where the JSON does not say it."""
    patient_key: str = option("", metavar="KEY")
    """JSON key that names the patient."""
    label_keys: tuple[str, ...] = ()
    """JSON keys that are labels, beside `labels`."""
    label_columns: tuple[str, ...] = option((), repeated=True, whole=True, metavar="NAME=A,B,C")
    """JSON keys of flags that are the classes of one label NAME (without NAME=: labels)."""
    signal_ext: str = "npy"
    """Extension of the arrays, such as ecg.npy."""
    meta_ext: str = "json"
    """Extension of the JSON."""
    workers: int = option(default_factory=lambda: os.cpu_count() or 1)
    """Processes, by default one for each core."""

    def run(self) -> None:
        from ecgscale.data import remarked
        from ecgscale.data.cells import told
        from ecgscale.data.copies import about_copies
        from ecgscale.data.foreign import Rules
        from ecgscale.data.indexing import index_folder
        from ecgscale.data.ingest.options import IngestOptions
        from ecgscale.data.persons import odd_names
        from ecgscale.data.shard_set import ShardSet

        rules = Rules(
            rate_hz=self.rate_hz,
            leads=self.leads,
            mv_per_count=self.mv_per_count,
            patient_key=self.patient_key,
            label_keys=self.label_keys,
            label_columns=self.label_columns,
            signal_ext=self.signal_ext.lstrip(".").lower(),
            meta_ext=self.meta_ext.lstrip(".").lower(),
            rename_leads=self.rename_leads,
        )
        done = index_folder(self.folder, rules, IngestOptions(**self.splits()), self.dataset, self.workers)
        shards = ShardSet.open(self.folder)
        lines = [*about_copies(shards), *odd_names(shards)]
        if not done.patients_known:
            lines.append("no patient ids found, so each record is a person of its own; see --patient-key")
        lines += [*told(done.notes, done.patients_known), *remarked.lines(done.remarked, done.records)]
        lines.append(f"{done.records} records at {done.rate_hz:g} Hz in {done.shards} tars")
        print("\n".join(f"{self.folder}: {line}" for line in lines))


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check all counts and checksums of a data set."""

    shards: str = option(positional=True)
    """Folder or URL that ingest has written."""

    def run(self) -> None:
        from ecgscale.inspection import verify_dataset

        print(verify_dataset(self.shards))


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Summarise a data set or a model, or plot one recording of a data set as on paper."""

    folder: str = option(positional=True)
    """Folder or URL that ingest has written, run folder or export folder."""
    plot: list[str] = option(default_factory=list, several=True, metavar="N OUT.png")
    """Draw recording number N: 12 leads, 25 mm/s, 10 mm/mV."""

    encoder: str = option("", metavar="PACKAGE.MODULE:CLASS")
    """Class of the model's encoder, where that is not one of ours; a model's own word imports nothing."""

    def __post_init__(self) -> None:
        if self.plot and len(self.plot) != 2:
            raise InputError(f"--plot {' '.join(self.plot)}: give a number and a file, N OUT.png")

    def run(self) -> None:
        from ecgscale import inspection

        if self.plot:
            print(inspection.plot_recording(self.folder, *self.plot))
        else:
            print(inspection.summarise(self.folder, self.encoder))
