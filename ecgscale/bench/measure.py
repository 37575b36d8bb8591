"""What all benches share: interleaved rounds, medians with quartiles, the machine, and the report.

Other programs use the machine too, so candidates take turns round by round, and a ratio is the median of the ratios
within rounds: what slows a whole round down cancels. Where readers run on one core and their files are in the system's
cache, CPU time is what a quiet machine would take, so their ratios are given by both clocks.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ecgscale import tables
from ecgscale.errors import InputError, naming_file
from ecgscale.files import write_json, write_whole
from ecgscale.provenance import commit_of, package_version
from ecgscale.training.monitor import board_of

_QUIET = 0.3  # load per core
_PACKAGES = ("ecgscale", "numpy", "torch", "triton", "webdataset", "pcodec", "soundfile", "xxhash", "deepspeed")


class Round(NamedTuple):
    """What one candidate did in one round."""

    units: int  # records, samples, calls: what the bench counts
    wall_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.units / self.wall_s

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU per unit."""
        return 1e6 * self.cpu_s / self.units


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} – {self.high:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def ratios(rounds: Sequence[Round], others: Sequence[Round], cpu: bool = False) -> Spread:
    """How many times as fast, by the wall's clock or by CPU time, round by round."""
    pairs = zip(rounds, others, strict=True)
    return spread([other.cpu_us / one.cpu_us if cpu else one.per_s / other.per_s for one, other in pairs])


def timed(work: Callable[[], int], at_least_s: float, cpu_s: Callable[[], float] = time.process_time) -> Round:
    """Repeat ``work``, which says how many units it did, for at least so long."""
    units, wall, cpu = 0, time.perf_counter(), cpu_s()
    while True:
        units += work()
        elapsed_s = time.perf_counter() - wall
        if elapsed_s >= at_least_s:
            return Round(units, elapsed_s, cpu_s() - cpu)


def interleaved(candidates: Mapping[str, Callable[[], Round]], rounds: int, what: str) -> dict[str, list[Round]]:
    """``rounds`` rounds of each candidate, after one that is thrown away; every second one in reverse order."""
    done: dict[str, list[Round]] = {name: [] for name in candidates}
    if not sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr, flush=True)  # where no bar is drawn
    with tqdm(total=(rounds + 1) * len(candidates), desc=what, unit="run", disable=None, leave=False) as bar:
        for number in range(rounds + 1):
            for name in list(candidates)[:: -1 if number % 2 else 1]:
                result = candidates[name]()
                if number:
                    done[name].append(result)
                bar.update()
    return done


@contextmanager
def one_core() -> Iterator[int]:
    """This process on one CPU, and torch with one thread, while it lasts; yields the CPU's number."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(allowed)})
    torch.set_num_threads(1)
    try:
        yield max(allowed)
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


# -- machine ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where, when and with what a measurement was made."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()}",
        "load": [round(load, 2) for load in os.getloadavg()],
        "threads": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))},
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in _PACKAGES},
        "commit": commit_of(Path(__file__).parents[1]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["ecgscale", *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# -- report ----------------------------------------------------------------------------------------------------------

QUICK = "Measured with --quick, which only shows that a bench runs: these numbers are worth nothing."


@dataclass(frozen=True)
class Check:
    """A number that the project must reach."""

    what: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def text(self) -> str:
        sign, word = "≥" if self.at_least else "≤", "reached" if self.passed else "MISSED"
        return f"{self.what}: {self.value:.3g}, must be {sign} {self.bound:g}: **{word}**"


class Meaning(NamedTuple):
    """What a scalar is, for whoever compares two results."""

    unit: str
    better: Literal["higher", "lower", ""] = ""  # empty: neither, or nobody knows
    ours: bool = True  # it says something of ecgscale, and not of a baseline or the device alone
    case: str = ""  # what was measured in several ways, of which this is one


@dataclass
class Section:
    """A table with what it says. ``scalars`` go to TensorBoard, under stable names; ``meanings`` says what they are.

    ``spreads`` holds the quartiles of some scalars. ``settings`` tells what was measured: of ``a/b`` for scalars
    ``a/b/...``; they become TensorBoard's hparams.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, str | int | float | bool]] = field(default_factory=dict)
    spreads: dict[str, tuple[float, float]] = field(default_factory=dict)
    meanings: dict[str, Meaning] = field(default_factory=dict)

    def scalar(self, name: str, value: float | Spread, meaning: Meaning) -> None:
        """A number, with its quartiles where there are several."""
        self.scalars[name], self.meanings[name] = value if isinstance(value, float | int) else value.median, meaning
        if isinstance(value, Spread):
            self.spreads[name] = (value.low, value.high)

    def keep(self, rounds: Mapping[str, list[Round]], prefix: str = "") -> None:
        """Keep every raw round."""
        for name, each in rounds.items():
            self.raw[prefix + name] = [one._asdict() for one in each]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", *tables.markdown(self.header, self.rows, numbers=True), ""]
        lines += [f"- {line}" for line in [*(check.text() for check in self.checks), *self.notes]]
        return "\n".join(lines) + "\n"


@dataclass
class Report:
    """Sections and the machine they were measured on."""

    name: str  # "stream": of its files and the prefix of its scalars
    title: str
    machine: dict[str, Any]
    sections: list[Section]

    def markdown(self) -> str:
        known = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
        head = [
            f"# {self.title}",
            "",
            *([f"**{QUICK}**", ""] if known.get("quick") else []),
            f"{known['cpu']}, {known['cores']} cores, {known['memory_gb']} GB{', '.join(['', *known['gpus']])}; "
            f"{known['system']}; load {' '.join(map(str, known['load']))} at the begin; {known['date']}; "
            f"commit {known['commit'] or 'unknown'}.",
            f"{versions}. Numbers are medians with quartiles.",
            "",
        ]
        return "\n".join([*head, *(section.markdown() for section in self.sections)])

    @property
    def empty(self) -> bool:
        """Whether nothing was measured: then there are no sections, or only some that say why."""
        return not any(section.scalars for section in self.sections)

    @property
    def file_name(self) -> str:
        """Without its ending: stream-20261123T074501-4711, by the time when the measurement began and the process."""
        return f"{self.name}-{datetime.fromisoformat(self.machine['date']):%Y%m%dT%H%M%S}-{os.getpid()}"

    def write(self, folder: Path) -> None:
        """``file_name`` as .md and .json, beside those of other runs, and TensorBoard scalars ``bench/NAME/...``.

        Raises InputError where it cannot.
        """
        make_folder(folder)
        write_whole(folder / f"{self.file_name}.md", self.markdown().encode())
        content: dict[str, Any] = {"name": self.name, "title": self.title, "machine": self.machine}
        content |= {"sections": [_plain(section) for section in self.sections]}
        write_json(folder / f"{self.file_name}.json", content)
        with board_of(folder / "tensorboard") as board:
            for section in self.sections:
                for name, value in section.scalars.items():
                    board.add_scalar(f"bench/{self.name}/{name}", value, 0)


@contextmanager
def reporting(name: str, title: str, out: Path, quick: bool = False) -> Iterator[Report]:
    """A report to be filled; what was measured is written to ``out`` in the end, after an error too. ``quick``: its
    numbers are worth nothing, and are marked.

    Where nothing was, nothing is written: `bench report --against` would take it for the newest commit's result. Raises
    InputError then, with what the first row's last cell says, and where ``out`` cannot be made or written.
    """
    make_folder(out)
    began_s = time.perf_counter()
    report = Report(name, title, machine() | {"quick": quick}, [])
    try:
        yield report
    finally:
        report.machine["load at the end"] = [round(load, 2) for load in os.getloadavg()]
        report.machine["minutes"] = (time.perf_counter() - began_s) / 60
        if not report.empty:
            report.write(out)
            _warn_of_load(report)
    if report.empty:
        raise InputError(f"bench {name}: {next(cell for cell in reversed(report.sections[0].rows[0]) if cell)}")


def _warn_of_load(report: Report) -> None:
    load, cores = report.machine["load"][0], report.machine["cores"]
    if load > _QUIET * cores:
        print(
            f"ecgscale: bench {report.name}: the load of this machine was {load:g} when this began ({cores} cores). If "
            "others were at work on it, threads that wait for each other were held up, and ratios are wrong: measure "
            "when it is quiet",
            file=sys.stderr,
        )


def _plain(section: Section) -> dict[str, Any]:
    return asdict(section) | {
        "meanings": {name: meaning._asdict() for name, meaning in section.meanings.items()},
        "checks": [asdict(check) | {"passed": check.passed} for check in section.checks],
    }


def make_folder(folder: Path) -> None:
    """Raises InputError or MachineError that names it where it cannot be made."""
    with naming_file(folder, "cannot make the folder"):
        folder.mkdir(parents=True, exist_ok=True)
