"""`ecgscale bench stream`: the stream beside a bare loop and beside the webdataset library, on the same tars.

Units: a record is one recording of twelve leads, what webdataset calls a sample; MB are 10^6 bytes of int16 samples
that were delivered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from ecgscale.bench import formats, order_scale
from ecgscale.bench.measure import (
    Check,
    Report,
    Round,
    Section,
    interleaved,
    make_folder,
    one_core,
    ratios,
    reporting,
    spread,
    timed,
)
from ecgscale.bench.readers import Cut, Processes, Steady, bare, first_epoch, hashing
from ecgscale.bench.sets import Sets, make_sets
from ecgscale.bench.webdataset_readers import BY_HAND, DOCUMENTED, SHUFFLED, webdataset_readers
from ecgscale.data.order import Order, default_lanes
from ecgscale.data.payload import PAYLOADS, Payload

_NAMES: dict[Payload, str] = {"npy": "plain", "pco": "compressed"}
_FASTER_THAN_WEBDATASET: dict[Payload, float] = {"npy": 8.0, "pco": 2.0}
_FAR = 10**9  # position of a long run

STREAM, HALVES, FIRST = "ecgscale, whole records", "ecgscale, two halves (pretraining)", "ecgscale, first epoch"
BARE, BARE_HALVES = "bare loop", "bare loop, two halves"


@dataclass(frozen=True)
class Effort:
    """How much is measured. ``seconds`` are those of one candidate in one round."""

    seconds: float = 0.5
    rounds: int = 9
    records: int = 2000
    batch: int = 256  # records
    codec_records: int = 200
    large_shards: int = 20_000  # of 500 records
    large_index: bool = True  # whether a data set of that size is written, 1 GB
    quality_shards: int = 200  # of 512 records
    quick: bool = False  # only to show that everything runs

    @staticmethod
    def least() -> Effort:
        """Shows that everything runs; the numbers are worth nothing."""
        return Effort(0.01, 2, 128, 32, 8, large_shards=200, large_index=False, quality_shards=20, quick=True)


def bench_stream(places: list[str], out: Path, effort: Effort) -> Report:
    """Measure everything and write it to ``out``. Raises InputError for unusable data sets or folders."""
    make_folder(out)
    sets = make_sets(places, out / "sets", effort.records)
    with reporting("stream", f"Stream: {sets.described}", out, effort.quick) as report:
        with one_core() as core:
            for payload in PAYLOADS[::-1]:
                report.sections.append(_reading(sets, payload, effort, core))
            for of_sets in (_checksums, _start, _formats):
                report.sections.append(of_sets(sets, effort))
        report.sections.append(_workers(sets, effort))
        report.sections.append(_scale(effort, out))
        report.sections.append(_shuffling(effort))
    return report


# -- reading ---------------------------------------------------------------------------------------------------------


def _reading(sets: Sets, payload: Payload, effort: Effort, core: int) -> Section:
    name, batch = _NAMES[payload], effort.batch
    shards, folder = sets.open(payload), sets.folders[payload]
    tars = [Path(shard.place) for shard in shards.shards]
    whole, halves = Cut(sets.duration_s, batch), Cut(sets.duration_s, batch, segments=2)
    steady = {STREAM: Steady(shards, whole), HALVES: Steady(shards, halves)}
    works: dict[str, Callable[[], int]] = {
        BARE: bare(shards, batch),
        BARE_HALVES: bare(shards, batch, 2),
        **{title: one.read for title, one in steady.items()},
        **webdataset_readers(tars, payload, batch, sets.samples),
    }
    candidates = {title: partial(timed, work, effort.seconds) for title, work in works.items()}
    candidates[FIRST] = partial(first_epoch, folder, whole, effort.seconds)
    done = interleaved(candidates, effort.rounds, f"reading, {name}")
    for one in steady.values():
        one.close()

    def cheapest(prefix: str) -> str:
        titles = [title for title in done if title.startswith(prefix)]
        return min(titles, key=lambda title: spread([one.cpu_us for one in done[title]]).median)

    tuned, by_hand = cheapest("webdataset: "), cheapest(BY_HAND)
    section = Section(f"Reading, {name} (.{payload})", ("reader", "records/s", "MB/s", "CPU µs per record"))
    first = [BARE, STREAM, FIRST, BARE_HALVES, HALVES, tuned]
    order = [*first, *(title for title in done if title not in first)]
    section.rows = [_reading_row(title, done[title], sets.record_bytes) for title in order]
    section.keep(done)
    pairs = {
        "stream/webdataset": (STREAM, tuned),
        "halves/webdataset": (HALVES, tuned),
        "first_epoch/webdataset": (FIRST, tuned),
        "stream/webdataset_documented": (STREAM, DOCUMENTED),
        "stream/webdataset_by_hand": (STREAM, by_hand),
        "bare/webdataset": (BARE, tuned),
        "stream/webdataset_shuffled": (STREAM, SHUFFLED),
        "stream/bare": (STREAM, BARE),
        "halves/bare_halves": (HALVES, BARE_HALVES),
    }
    ratio = {title: ratios(done[one], done[other], cpu=True) for title, (one, other) in pairs.items()}
    by_wall = {title: ratios(done[one], done[other]) for title, (one, other) in pairs.items()}
    section.checks = [
        Check(f"{name}: ecgscale / webdataset", ratio["stream/webdataset"].median, _FASTER_THAN_WEBDATASET[payload]),
        Check(f"{name}: ecgscale / bare loop", ratio["stream/bare"].median, 0.6),
    ]
    section.notes = [
        f"One core: the process is pinned to CPU {core}, torch has one thread, data.workers is 0, batches of {batch}.",
        f"“webdataset” is the cheapest pipeline of this run, “{tuned.removeprefix('webdataset: ')}”; the others are "
        "below it. No DataLoader, only the payload is read, no np.load, nothing is verified. “by hand” is its tar "
        "iterator alone; “bare / webdataset” is what no reader of this codec can exceed. “documented” is "
        f"“{DOCUMENTED.removeprefix('webdataset: ')}”.",
        "The bounds are held against CPU time; all files are in the system's cache.",
        "Ratios by CPU time: " + "; ".join(f"{title} {value.text(2)}" for title, value in ratio.items()) + ".",
        "Ratios by the clock: " + "; ".join(f"{title} {value.text(2)}" for title, value in by_wall.items()) + ".",
    ]
    labels = {BARE: "bare", STREAM: "ecgscale", HALVES: "ecgscale_halves", FIRST: "ecgscale_first_epoch"}
    for title, label in (labels | {tuned: "webdataset", SHUFFLED: "webdataset_shuffled"}).items():
        section.scalars[f"{name}/{label}/records_per_s"] = spread([one.per_s for one in done[title]]).median
        section.scalars[f"{name}/{label}/cpu_us_per_record"] = spread([one.cpu_us for one in done[title]]).median
    section.scalars |= {f"{name}/ratio/{title.replace('/', '_over_')}": value.median for title, value in ratio.items()}
    return section


def _reading_row(title: str, rounds: list[Round], record_bytes: int) -> tuple[str, ...]:
    per_s = spread([one.per_s for one in rounds])
    cpu_us = spread([one.cpu_us for one in rounds])
    return title, per_s.text(), f"{per_s.median * record_bytes / 1e6:,.0f}", cpu_us.text(1)


def _checksums(sets: Sets, effort: Effort) -> Section:
    """The reader always verifies, so hashing is measured beside it."""
    section = Section("Checksums", ("payload", "hashing, CPU µs per record", "reading, CPU µs per record", "share"))
    cut = Cut(sets.duration_s, effort.batch)
    for payload in PAYLOADS:
        shards, name = sets.open(payload), _NAMES[payload]
        steady = Steady(shards, cut)
        first = partial(first_epoch, sets.folders[payload], cut, effort.seconds)
        done = interleaved(
            {
                "hashing": partial(timed, hashing(shards), effort.seconds),
                # A plain record is verified when it is first touched, a compressed one whenever it is read.
                "reading": first if payload == "npy" else partial(steady.round, effort.seconds),
            },
            effort.rounds,
            f"checksums, {name}",
        )
        steady.close()
        share = spread([one.cpu_us / two.cpu_us for one, two in zip(done["hashing"], done["reading"], strict=True)])
        row = [spread([one.cpu_us for one in done[part]]).text(1) for part in ("hashing", "reading")]
        when = "first epoch only" if payload == "npy" else "every read"
        section.rows.append((f"{name}, {when}", *row, f"{100 * share.median:.1f} %"))
        section.keep(done, f"{name}, ")
        section.scalars[f"{name}/checksum_share"] = share.median
        if payload == "pco":
            section.checks.append(Check(f"{name}: share of checksums", share.median, 0.15, at_least=False))
    return section


# -- start -----------------------------------------------------------------------------------------------------------


def _start(sets: Sets, effort: Effort) -> Section:
    """From the opening of a data set to its first batch, at the begin and far into a run."""
    section = Section("Start and resume", ("what", "ms, at position 0", f"ms, at position {_FAR:.0e}"))
    cut = Cut(sets.duration_s, effort.batch, segments=2)
    steps = {0: 0, _FAR: _FAR // effort.batch}
    for payload in PAYLOADS:

        def first_batch(batch: int, payload: Payload = payload) -> int:
            batches = cut.stream(sets.open(payload)).from_batch(batch)
            next(batches)
            batches.close()
            return 1

        _start_row(section, f"first batch, {_NAMES[payload]}", first_batch, steps, effort)

    counts = cut.stream(sets.open("pco")).selection.counts

    def positions(batch: int) -> int:
        order = Order(counts, effort.batch, effort.batch, default_lanes(effort.batch), seed=0)
        order.places(np.arange(4096) + batch * effort.batch)
        return 1

    _start_row(section, "of that, the order of 4,096 positions", positions, steps, effort)
    section.notes = ["Everything is opened anew each time; the files are in the system's cache."]
    return section


def _start_row(
    section: Section, title: str, work: Callable[[int], int], steps: Mapping[int, int], effort: Effort
) -> None:
    candidates = {str(position): partial(timed, partial(work, step), 0.0) for position, step in steps.items()}
    done = interleaved(candidates, 3 * effort.rounds, title)
    took_ms = {position: spread([1e3 * one.wall_s for one in each]) for position, each in done.items()}
    section.rows.append((title, *(one.text(1) for one in took_ms.values())))
    section.keep(done, f"{title}, position ")
    for position, one in took_ms.items():
        section.scalars[f"start/{title.replace(', ', '_').replace(' ', '_')}/{position}/ms"] = one.median


# -- formats ---------------------------------------------------------------------------------------------------------


def _formats(sets: Sets, effort: Effort) -> Section:
    shards = sets.open("npy")
    acceptable = [n for n in range(len(shards)) if shards.metadata(n)["metadata"].get("Quality") == "acceptable"]
    usable = acceptable or list(range(len(shards)))
    numbers = [usable[i] for i in np.unique(np.linspace(0, len(usable) - 1, effort.codec_records).astype(int))]
    found = formats.measure([shards.signal(number) for number in numbers], effort.rounds, effort.seconds)
    section = Section("Codecs", ("codec", "bytes / int16 bytes", "encoding, records/s", "decoding, records/s", "MB/s"))
    for name, one in found.items():
        encoding, decoding = (spread([each.per_s for each in rounds]) for rounds in (one.encoding, one.decoding))
        speed = f"{decoding.median * sets.record_bytes / 1e6:,.0f}"
        section.rows.append((name, f"{one.ratio:.3f}", encoding.text(), decoding.text(), speed))
        section.keep({"encoding": one.encoding, "decoding": one.decoding}, f"{name}, ")
        label = f"codec/{name.split(',')[0].replace(' ', '_').lower()}"
        section.scalars |= {f"{label}/ratio": one.ratio, f"{label}/decode_records_per_s": decoding.median}
    if acceptable:
        section.checks.append(Check("pco: bytes / int16 bytes", found[formats.PCO].ratio, 0.27, at_least=False))
    if formats.FLAC in found:
        faster = ratios(found[formats.PCO].decoding, found[formats.FLAC].decoding, cpu=True).median
        section.checks.append(Check("pco / FLAC, decoding", faster, 4.5))
    quality = "those marked as acceptable" if acceptable else "no mark of quality, so the bound on bytes is not applied"
    section.notes = [f"One core; {len(numbers)} records ({quality}), whole, in memory, bit by bit what they were."]
    return section


# -- threads and processes -------------------------------------------------------------------------------------------


def _workers(sets: Sets, effort: Effort) -> Section:
    title = ("batches made by", "records/s", "CPU µs per record")
    section = Section("Threads and processes, two halves, all cores", ("payload", *title))
    threads, processes = (0, 1, 2, 4), 2
    for payload in PAYLOADS[::-1]:
        shards, name = sets.open(payload), _NAMES[payload]
        readers: dict[str, Steady | Processes] = {
            f"{count} threads": Steady(shards, Cut(sets.duration_s, effort.batch, 2, workers=count))
            for count in threads
        }
        readers[f"{processes} processes"] = Processes(
            sets.folders[payload], Cut(sets.duration_s, effort.batch, 2), processes
        )
        candidates = {label: partial(one.round, effort.seconds) for label, one in readers.items()}
        done = interleaved(candidates, effort.rounds, f"workers, {name}")
        for one in readers.values():
            one.close()
        for label, rounds in done.items():
            per_s, cpu_us = (spread([getattr(one, part) for one in rounds]) for part in ("per_s", "cpu_us"))
            section.rows.append((name, label, per_s.text(), cpu_us.text(1)))
            section.scalars[f"{name}/{label.replace(' ', '_')}/records_per_s"] = per_s.median
        section.keep(done, f"{name}, ")
        better = ratios(done["2 threads"], done["2 processes"])
        section.notes.append(f"{name}: 2 threads / 2 processes {better.text(2)}.")
    section.notes.append(
        "Threads are data.workers (0: the caller itself); processes are torch's DataLoader over the same stream, "
        "one micro-batch in turn each, batches through shared memory. CPU counts all threads and processes."
    )
    return section


# -- order -----------------------------------------------------------------------------------------------------------


def _scale(effort: Effort, out: Path) -> Section:
    records = effort.large_shards * 500
    section = Section(
        f"Order of {records:,} records in {effort.large_shards:,} shards",
        ("from", "memory, MB", "epoch planned, ms", "4,096 positions, ms", "data set opened, s"),
    )
    measured = {"shard sizes in memory": order_scale.plan(effort.large_shards, 500)}
    room = disk_usage(out).free > 3e9 and psutil.virtual_memory().available > 6e9
    if effort.large_index and room:
        print(f"writing and opening a data set of {records:,} records", file=sys.stderr, flush=True)
        with TemporaryDirectory(dir=out) as folder:
            large = order_scale.plan_from_index(Path(folder) / "large", effort.large_shards, 500)
        measured["a data set folder"] = large
    else:
        section.notes.append("No data set of that size was written" + ("" if room else ": no room") + ".")
    for name, one in measured.items():
        row = (f"{one.memory_mb:.0f}", f"{1e3 * one.plan_s:.1f}", f"{1e3 * one.places_s:.1f}", f"{one.open_s:.2f}")
        section.rows.append((name, *row))
        label = f"scale/{'index' if one.open_s else 'counts'}"
        section.scalars |= {f"{label}/memory_mb": one.memory_mb, f"{label}/plan_s": one.plan_s + one.places_s}
        section.checks.append(Check(f"{name}: memory, MB", one.memory_mb, 200, at_least=False))
        section.checks.append(Check(f"{name}: plan, s", one.plan_s + one.places_s, 2, at_least=False))
    section.notes.append("Memory is the most at any time without mapped files: with the numbers of all records.")
    return section


def _shuffling(effort: Effort) -> Section:
    shard, patient, batch = 512, 3, 256
    section = Section(
        f"Shuffling: {effort.quality_shards} shards of {shard} records, {patient} in a row of each patient",
        ("order", "rank correlation with the source", "shards per batch", "pairs of one patient per batch"),
    )
    lane_records = effort.quality_shards * shard // 64
    found: dict[str, order_scale.Shuffled] = {}
    for window in (64, 256, 1024, 16384):
        order = Order((shard,) * effort.quality_shards, batch, batch, 64, seed=0, window=window)
        title = f"window of {window:,} records" + (" (default)" if window == 16384 else "")
        found[title] = order_scale.shuffle_quality(order, shard, patient)
        section.scalars[f"shuffling/{window}/pairs_per_batch"] = found[title].pairs_per_batch
        section.scalars[f"shuffling/{window}/correlation"] = found[title].correlation
    found["full permutation"] = order_scale.permutation_quality(order, shard, patient)
    for title, one in found.items():
        row = (f"{one.correlation:.4f}", f"{one.shards_per_batch:.1f}", f"{one.pairs_per_batch:.3f}")
        section.rows.append((title, *row))
    expected = batch * (batch - 1) / 2 * (patient - 1) / (effort.quality_shards * shard - 1)
    section.notes = [
        f"Global batches of {batch} in 64 lanes of {lane_records:,} records; a window is never longer than a lane.",
        f"Expected of a full permutation: {expected:.3f} pairs per batch, "
        f"correlation about {(2 / np.pi / (effort.quality_shards * shard)) ** 0.5:.4f}.",
    ]
    return section
