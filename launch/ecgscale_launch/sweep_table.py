"""One table of what the runs of a sweep came to; every run that ends writes it anew."""

from __future__ import annotations

import csv
import io
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecgscale import tables
from ecgscale.errors import InputError, MachineError, one_line
from ecgscale.files import read_json_if_there, standing, write_whole
from ecgscale.json_lines import read_json_lines
from ecgscale.run_folder import EVENTS, EXPORT, TEST_REPORT
from ecgscale.settings import option
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.subcommand import Subcommand

_FIGURES = {"auroc": "AUROC", "auprc": "AUPRC", "f_measure": "F1"}
_OF_PERSONS = {"top1": "top-1", "top5": "top-5", "eer": "equal error rate"}
_LOSSES = ("validation/loss", "train/loss")


@dataclass(frozen=True, kw_only=True)
class Results(Subcommand):
    """The results of a sweep's runs in one table, also written to RUN/results.md and RUN/results.csv.

    Test figures of fine-tuning, losses of pretraining; seeds are averaged (mean ± standard deviation).
    """

    sweep: Path = option(positional=True, name="run")
    """Run folder that --sweep was given."""

    def run(self) -> int:
        print(collect(self.sweep))
        return 0


def collect(run: Path) -> str:
    """Write RUN/results.csv, a row per run, and RUN/results.md, seeds averaged; the latter's text."""
    sweep = read_json_if_there(JobFolder.of(run).sweep)
    if sweep is None:
        raise InputError(f"{run}: no sweep of ecgscale-launch; give the run folder that --sweep was given")
    runs = sweep["runs"]
    keys = list(runs[0]["swept"])
    found = [(one["swept"], figures(run / one["run"])) for one in runs]
    names = list(dict.fromkeys(name for _, values in found for name in values))
    rows = [
        [one["run"], *swept.values(), *(values.get(name, "") for name in names)]
        for one, (swept, values) in zip(runs, found, strict=True)
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["run", *keys, *names], *rows])
    write_whole(run / "results.csv", text.getvalue().encode())
    missing = [one["run"] for one, (_, values) in zip(runs, found, strict=True) if not values]
    table = _markdown(keys, names, found)
    if missing:
        table += f"\n\n{len(missing)} of {len(runs)} runs have no result yet: {', '.join(missing[:3])}" + (
            " …" if len(missing) > 3 else ""
        )
    write_whole(run / "results.md", f"{table}\n".encode())
    return table


def collect_above(run: Path) -> None:
    """Write the table of the sweep that a run belongs to, if to any. The run is done, whatever comes of this."""
    if JobFolder.of(run.parent).sweep.exists():
        try:
            collect(run.parent)
        except (InputError, MachineError, OSError) as error:
            print(f"ecgscale-launch: no table of the sweep: {error}", file=sys.stderr)


def figures(run: Path) -> dict[str, float]:
    """What a finished run came to: its test figures, else its last losses; nothing where it is not finished."""
    report = read_json_if_there(run / TEST_REPORT)
    if report is not None and "headline" in report:
        return {name: value for name, value in report["headline"].items() if value is not None}
    if report is not None:  # of an earlier version
        of, names = (report["macro"], _FIGURES) if "macro" in report else (report, _OF_PERSONS)
        found = {shown: of[name]["value"] for name, shown in names.items()}
        if report.get("challenge_score"):
            found["challenge score"] = report["challenge_score"]["value"]
        return {name: value for name, value in found.items() if value is not None}
    if not standing(run / EXPORT).is_dir():
        return {}
    last: dict[str, Any] = {}
    for event in read_json_lines(run / EVENTS):
        last |= {name: value for name, value in event.items() if name in _LOSSES and value is not None}
    return {name: last[name] for name in _LOSSES if name in last}


def _markdown(keys: list[str], names: list[str], found: list[tuple[dict[str, str], dict[str, float]]]) -> str:
    """A row for each combination of what was swept but for seeds."""
    shown = [key for key in keys if key.rpartition(".")[2] != "seed"]
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for swept, values in found:
        groups.setdefault(tuple(swept[key] for key in shown), []).append(values)
    rows = []
    for group, runs in groups.items():
        done = [values for values in runs if values]
        cells = [_estimate([values[name] for values in done if name in values]) for name in names]
        rows.append([*(one_line(value).replace("|", "\\|") for value in group), f"{len(done)}/{len(runs)}", *cells])
    return "\n".join(tables.markdown([*shown, "runs", *names], rows))


def _estimate(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
