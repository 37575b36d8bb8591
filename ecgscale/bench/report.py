"""`ecgscale bench report`: results as tables, plots and TensorBoard's hparams, and two commits compared."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecgscale import tables
from ecgscale.bench.measure import QUICK, make_folder
from ecgscale.bench.results import Change, Run, Value, by_machine, changes, read_runs, sides
from ecgscale.files import whole_file, write_whole
from ecgscale.training.monitor import board_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What each bench is plotted by: the last part of the scalars' names.
_PLOTTED = {"step": "ecg_per_s", "scaling": "efficiency", "stream": "records_per_s", "kernel": "both_ms"}
_MOST_BARS = 60
_LONGEST_LABEL = 90  # characters


def report(places: Sequence[Path], out: Path, against: str = "", threshold: float = 0.05) -> tuple[str, list[Change]]:
    """The report as markdown, and what has become worse by more than ``threshold`` since ``against``.

    Writes report.md, plots and tensorboard/ to ``out``. Raises InputError where there is nothing to report or compare.
    """
    runs = read_runs(places)
    machines = by_machine(runs)
    text = ["# Results of benches", ""]
    if len(machines) > 1:
        warning = f"These are results of {len(machines)} machines. They stand apart and are not compared."
        print(f"ecgscale: bench report: {warning}", file=sys.stderr)
        text += [f"**{warning}**", ""]
    if any(run.quick for run in runs):
        text += [f"(quick): {QUICK} They are not compared.", ""]
    make_folder(out)
    for number, (where, each) in enumerate(machines.items()):
        text += [f"## {where}", "", *_runs_table(each), ""]
        for name in dict.fromkeys(run.name for run in each):
            of_bench = [run for run in each if run.name == name]
            text += [f"### bench {name}", "", *_tables(of_bench), *_checks(of_bench)]
            picture = out / (f"{name}.png" if len(machines) == 1 else f"{name}-{number + 1}.png")
            text += _plot(of_bench, name, where, picture)
    worse: list[Change] = []
    if against:
        found = changes(*sides(runs, against))
        worse = [change for change in found if change.worse_by > threshold]
        text += _comparison(found, worse, against, threshold)
    _write_hparams(runs, out / "tensorboard")
    markdown = "\n".join(text)
    write_whole(out / "report.md", f"{markdown}\n".encode())
    return markdown, worse


# -- tables ----------------------------------------------------------------------------------------------------------


def _runs_table(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs:
        load = run.machine.get("load", ["?"])
        about = (f"{run.date:%Y-%m-%d %H:%M}", run.label, run.versions, str(load[0]))
        rows.append((run.name, *about, f"`{run.machine.get('command', '')}`"))
    return tables.markdown(("bench", "date", "commit (+: changed)", "versions", "load", "command"), rows)


def _tables(runs: Sequence[Run]) -> list[str]:
    """A table for each kind of thing that was measured: those whose scalars have the same last parts."""
    rows: dict[tuple[str, str], dict[str, Value]] = {}
    for run in runs:  # the oldest first: a later run of the same commit replaces an earlier one
        for name, value in run.values.items():
            label, _, last = name.rpartition("/")
            rows.setdefault((label, run.label), {})[last] = value
    by_columns: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for (label, commit), values in sorted(rows.items(), key=lambda row: row[0][0]):
        by_columns.setdefault(tuple(values), []).append((label, commit, *(value.text() for value in values.values())))
    lines = []
    for columns, table in by_columns.items():
        lines += [*tables.markdown(("what", "commit", *columns), table), ""]
    return lines


def _checks(runs: Sequence[Run]) -> list[str]:
    """What the project must reach, as every run found it."""
    lines = [f"- {title}, {run.label}: {check.text()}" for run in runs for title, check in run.checks]
    return [*lines, ""] if lines else []


def _comparison(found: Sequence[Change], worse: Sequence[Change], against: str, threshold: float) -> list[str]:
    lines = [f"## Compared with {against}", ""]
    if not worse:
        return [*lines, f"{len(found)} numbers compared, none worse by more than {threshold:.1%}.", ""]
    gone = sum(change.after is None for change in worse)
    missing = f", {gone} are no longer measured" if gone else ""
    lines += [f"Of {len(found)} numbers {len(worse) - gone} are worse by more than {threshold:.1%}{missing}:", ""]
    return [*lines, *(f"- **{change.text()}**" for change in sorted(worse, key=lambda c: -c.worse_by)), ""]


# -- plots -----------------------------------------------------------------------------------------------------------


def _plot(runs: Sequence[Run], name: str, where: str, picture: Path) -> list[str]:
    """The picture in the report; nothing where there is nothing to plot."""
    from matplotlib.figure import Figure  # imports slowly

    metric = _PLOTTED.get(name)
    rows = {
        (scalar.rpartition("/")[0], run.label): (run, value)
        for run in runs
        for scalar, value in run.values.items()
        if metric and scalar.endswith(f"/{metric}")
    }
    if not rows:
        return []
    bars = dict(sorted(rows.items())[:_MOST_BARS])
    size = (9.0, 1.6 + 0.3 * len(bars)) if name != "scaling" else (7.0, 5.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    (_efficiency if name == "scaling" else _bars)(axes, bars)
    axes.set_title(f"bench {name}: {metric}\n{where}", fontsize=9)
    with whole_file(picture) as partial:
        figure.savefig(partial, dpi=100, format="png")
    cut = [f"The plot shows the first {len(bars)} of {len(rows)} rows.", ""] if len(bars) < len(rows) else []
    return [f"![{name} on {where}]({picture.name})", "", *cut]


Rows = dict[tuple[str, str], tuple[Run, Value]]  # by label and commit


def _bars(axes: Axes, rows: Rows) -> None:
    commits = list(dict.fromkeys(commit for _, commit in rows))
    for place, ((_, commit), (_, value)) in enumerate(rows.items()):
        low, high = value.quartiles or (value.median, value.median)
        color = f"C{commits.index(commit) % 10}"
        axes.barh(place, value.median, color=color, xerr=[[value.median - low], [high - value.median]], capsize=2)
    named = [f"{label}  {commit}" if len(commits) > 1 else label for label, commit in rows]
    axes.set_yticks(range(len(rows)), [name[-_LONGEST_LABEL:] for name in named], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _efficiency(axes: Axes, rows: Rows) -> None:
    """Over the number of ranks, a line for each commit and kind of scaling."""
    lines: dict[str, list[tuple[int, Value]]] = {}
    for (label, commit), (run, value) in rows.items():
        settings = run.settings[label]
        same = "/".join(part for part in label.split("/") if not re.fullmatch(r"[br]\d+", part))
        lines.setdefault(f"{same} {commit}", []).append((int(settings["ranks"]), value))
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        ranks, values = [point[0] for point in points], [point[1] for point in points]
        quartiles = [value.quartiles or (value.median, value.median) for value in values]
        below = [value.median - low for value, (low, _) in zip(values, quartiles, strict=True)]
        above = [high - value.median for value, (_, high) in zip(values, quartiles, strict=True)]
        axes.errorbar(ranks, [v.median for v in values], yerr=[below, above], marker="o", capsize=3, label=name)
    axes.axhline(1.0, color="grey", linewidth=0.7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({rank for points in lines.values() for rank, _ in points}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("ranks")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def _write_hparams(runs: Sequence[Run], folder: Path) -> None:
    """One line of the hparams page for everything that has settings, in every run; once for each folder."""
    if not any(run.settings for run in runs):
        return
    with board_of(folder) as board:
        for run in runs:
            for label, settings in run.settings.items():
                run_name = f"{run.path.stem}/{label}"
                if (folder / run_name).exists():
                    continue
                metrics = {
                    name.removeprefix(f"{label}/"): value.median
                    for name, value in run.values.items()
                    if name.startswith(f"{label}/")
                }
                about = {"bench": run.name, "commit": run.label, "machine": run.where}
                board.add_hparams(settings | about, metrics, run_name=run_name)
