"""`ecgscale bench stream`: the stream beside a bare loop and beside the webdataset library, on the same tars.

Units: a record is one recording of twelve leads, what webdataset calls a sample; MB are 10^6 bytes of int16 samples
that were delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ecgscale.bench.measure import (
    Check,
    Meaning,
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
from ecgscale.bench.readers import Cut, Steady, bare, first_epoch
from ecgscale.bench.sets import Sets, make_sets
from ecgscale.bench.webdataset_readers import DOCUMENTED, LEANEST, SHUFFLED, webdataset_readers
from ecgscale.data.payload import PAYLOADS, Payload

_NAMES: dict[Payload, str] = {"npy": "plain", "pco": "compressed"}
_FASTER_THAN_WEBDATASET: dict[Payload, float] = {"npy": 8.0, "pco": 2.0}

STREAM, HALVES, FIRST = "ecgscale, whole records", "ecgscale, two halves (pretraining)", "ecgscale, first epoch"
BARE, BARE_HALVES = "bare loop", "bare loop, two halves"


@dataclass(frozen=True)
class Effort:
    """How much is measured. ``seconds`` are those of one candidate in one round."""

    seconds: float = 0.5
    rounds: int = 9
    records: int = 2000
    batch: int = 256  # records
    quick: bool = False  # only to show that everything runs

    @staticmethod
    def least() -> Effort:
        """Shows that everything runs; the numbers are worth nothing."""
        return Effort(0.01, 2, 128, 32, quick=True)


def bench_stream(places: list[str], out: Path, effort: Effort) -> Report:
    """Measure everything and write it to ``out``. Raises InputError for unusable data sets or folders."""
    make_folder(out)
    sets = make_sets(places, out / "sets", effort.records)
    with reporting("stream", f"Stream: {sets.described}", out, effort.quick) as report:
        with one_core() as core:
            for payload in PAYLOADS[::-1]:
                report.sections.append(_reading(sets, payload, effort, core))
        report.sections.append(_workers(sets, effort))
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

    pipelines = (DOCUMENTED, LEANEST)
    tuned = min(pipelines, key=lambda title: spread([one.cpu_us for one in done[title]]).median)
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
        "below it. No DataLoader, only the payload is read, no np.load, nothing is verified. “bare / webdataset” is "
        f"what no reader of this codec can exceed; “documented” is “{DOCUMENTED.removeprefix('webdataset: ')}”.",
        "The bounds are held against CPU time; all files are in the system's cache.",
        "Ratios by CPU time: " + "; ".join(f"{title} {value.text(2)}" for title, value in ratio.items()) + ".",
        "Ratios by the clock: " + "; ".join(f"{title} {value.text(2)}" for title, value in by_wall.items()) + ".",
    ]
    labels = {BARE: "bare", STREAM: "ecgscale", HALVES: "ecgscale_halves", FIRST: "ecgscale_first_epoch"}
    for title, label in (labels | {tuned: "webdataset", SHUFFLED: "webdataset_shuffled"}).items():
        ours = label.startswith("ecgscale")
        per_s, cpu_us = (spread([getattr(one, part) for one in done[title]]) for part in ("per_s", "cpu_us"))
        section.scalar(f"{name}/{label}/records_per_s", per_s.median, Meaning("recordings/s", "higher", ours))
        section.scalar(f"{name}/{label}/cpu_us_per_record", cpu_us.median, Meaning("CPU µs", "lower", ours))
    for title, value in ratio.items():
        meaning = Meaning("times as fast, by CPU time", "higher", ours=not title.startswith("bare"))
        section.scalar(f"{name}/ratio/{title.replace('/', '_over_')}", value.median, meaning)
    return section


def _reading_row(title: str, rounds: list[Round], record_bytes: int) -> tuple[str, ...]:
    per_s = spread([one.per_s for one in rounds])
    cpu_us = spread([one.cpu_us for one in rounds])
    return title, per_s.text(), f"{per_s.median * record_bytes / 1e6:,.0f}", cpu_us.text(1)


# -- threads ---------------------------------------------------------------------------------------------------------


def _workers(sets: Sets, effort: Effort) -> Section:
    """What data.workers does; 0: the caller makes the batches itself."""
    section = Section("Threads, two halves, all cores", ("payload", "data.workers", "records/s", "CPU µs per record"))
    for payload in PAYLOADS[::-1]:
        shards, name = sets.open(payload), _NAMES[payload]
        cuts = {str(count): Cut(sets.duration_s, effort.batch, 2, workers=count) for count in (0, 1, 2, 4)}
        readers = {count: Steady(shards, cut) for count, cut in cuts.items()}
        candidates = {count: partial(one.round, effort.seconds) for count, one in readers.items()}
        done = interleaved(candidates, effort.rounds, f"threads, {name}")
        for one in readers.values():
            one.close()
        for count, rounds in done.items():
            per_s, cpu_us = (spread([getattr(one, part) for one in rounds]) for part in ("per_s", "cpu_us"))
            section.rows.append((name, count, per_s.text(), cpu_us.text(1)))
            meaning = Meaning("recordings/s", "higher")
            section.scalar(f"{name}/{count}_threads/records_per_s", per_s.median, meaning)
        section.keep(done, f"{name}, ")
    return section
