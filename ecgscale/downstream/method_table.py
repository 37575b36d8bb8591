"""What methods reach beside each other: means over seeds, bootstrap intervals, paired differences, as table and plot.

Shape suffixes: S seeds, R bootstrap resamples.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.evaluate import title
from ecgscale.downstream.metrics import interval
from ecgscale.downstream.report import Estimate
from ecgscale.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
_SHOWN = ("challenge_score", "auroc", "top1")  # the first one that a task has stands in table and plot, else its first
_PROTOCOLS = {"probe": "linear probe", "neighbours": "nearest neighbours", "finetune": "fine-tuned"}


class Case(NamedTuple):
    """What is measured alike for all methods."""

    task: str
    protocol: str
    fraction: float
    leads: str
    figure: str


@dataclass(frozen=True)
class Measured:
    """One figure of one run, with its bootstrap samples over the test patients (R,)."""

    case: Case
    method: str
    seed: int
    value: float | None
    sample_R: Floats
    coverage: Coverage | None = None  # recordings that were scored; None: an earlier version did not count them


@dataclass(frozen=True)
class Summary:
    """One figure over the seeds."""

    mean: Estimate
    deviation: float  # over seeds; NaN for one
    seeds: int
    sample_R: Floats  # mean over the seeds of each resample
    coverage: Coverage | None

    def __str__(self) -> str:
        spread = f" ± {self.deviation:.3f}" if self.seeds > 1 else ""
        value, low, high = self.mean.value, self.mean.low, self.mean.high
        return "–" if np.isnan(value) else f"{value:.3f}{spread} [{low:.3f}, {high:.3f}]"


class Difference(NamedTuple):
    """What one method is better by than another."""

    estimate: Estimate
    seeds: int  # of the method that has fewer

    def __str__(self) -> str:
        """In bold where the interval leaves out 0, unless a single seed may be the cause."""
        value, low, high = self.estimate.value, self.estimate.low, self.estimate.high
        if np.isnan(value):
            return "–"
        text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        if self.seeds == 1:
            return f"{text} one seed"
        return f"**{text}**" if low > 0 or high < 0 else text


class Results:
    """Summaries by case and method, in the order in which they were measured."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        runs: dict[tuple[Case, str], list[Measured]] = {}
        for run in measured:
            runs.setdefault((run.case, run.method), []).append(run)
        self.by = {key: _summary(of) for key, of in runs.items()}
        self.cases = list(dict.fromkeys(case for case, _ in self.by))
        self.methods = list(dict.fromkeys(method for _, method in self.by))

    def shown(self, task: str) -> str:
        """The figure by which a task is shown."""
        figures = [case.figure for case in self.cases if case.task == task]
        return next((name for name in _SHOWN if name in figures), figures[0])

    def of_task(self, task: str) -> tuple[list[tuple[str, float]], list[str]]:
        """Protocols with their label fractions, and lead sets."""
        of_task = [case for case in self.cases if case.task == task]
        protocols = list(dict.fromkeys((case.protocol, case.fraction) for case in of_task))
        return protocols, list(dict.fromkeys(case.leads for case in of_task))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(case.task for case in self.cases))

    def difference(self, case: Case, method: str, other: str) -> Difference | None:
        """method − other on the same resamples; None where one was not measured."""
        first, second = self.by.get((case, method)), self.by.get((case, other))
        if first is None or second is None:
            return None
        low_K, high_K = interval((first.sample_R - second.sample_R)[None])
        estimate = Estimate(first.mean.value - second.mean.value, float(low_K[0]), float(high_K[0]))
        return Difference(estimate, min(first.seeds, second.seeds))

    def recordings(self, task: str) -> list[str]:
        """For people: which recordings of a task were scored, in a line for all that scored the same ones."""
        scored: dict[str, dict[tuple[str, str], None]] = {}  # line -> (lead set, method)
        for (case, method), result in self.by.items():
            if case.task == task:
                line = "not counted, by an earlier version" if result.coverage is None else result.coverage.text()
                scored.setdefault(line, {})[case.leads, method] = None
        if len(scored) == 1:
            return list(scored)
        lines = []
        for line, of in scored.items():
            leads, methods = (", ".join(dict.fromkeys(names)) for names in zip(*of, strict=True))
            lines.append(f"leads {leads} by {methods}: {line}")
        return lines


def _summary(runs: list[Measured]) -> Summary:
    value_S = np.array([np.nan if run.value is None else run.value for run in runs])
    sample_R = np.mean([run.sample_R for run in runs], axis=0)
    low_K, high_K = interval(sample_R[None])
    deviation = float(np.std(value_S, ddof=1)) if len(runs) > 1 else float("nan")
    mean = Estimate(float(value_S.mean()), float(low_K[0]), float(high_K[0]))
    return Summary(mean, deviation, len(runs), sample_R, runs[0].coverage)


def write_results(folder: Path, measured: Sequence[Measured], reference: str) -> str:
    """Write table.md, table.csv and plot.png; returns the table. ``reference`` is held against all other methods."""
    results = Results(measured)
    text = markdown(results, reference)
    write_whole(folder / "table.md", (text + "\n").encode())
    write_whole(folder / "table.csv", as_csv(results, reference).encode())
    buffer = io.BytesIO()
    plot(results).savefig(buffer, dpi=150)
    write_whole(folder / "plot.png", buffer.getvalue())
    return text


def markdown(results: Results, reference: str) -> str:
    """For each task a row per method, protocol and label fraction, a column per lead set; then the differences."""
    lines = []
    for task in results.tasks:
        protocols, lead_sets = results.of_task(task)
        figure = results.shown(task)
        head = " | ".join(f"{leads} lead{'s' * (leads != '1')}" if leads.isdecimal() else leads for leads in lead_sets)
        rule = "|---" * (len(lead_sets) + 1) + "|"
        lines += [f"{task}: {title(figure)}", "", f"| {title(figure)} | {head} |", rule]
        differences = [f"| {reference} minus | {head} |", rule]
        for protocol, fraction in protocols:
            cases = [Case(task, protocol, fraction, leads, figure) for leads in lead_sets]
            how = _named(protocol, fraction, figure)
            for method in results.methods:
                figures_of_method = [results.by.get((case, method)) for case in cases]
                if any(figures_of_method):
                    lines.append(
                        f"| {method}, {how} | {' | '.join(str(figure or '–') for figure in figures_of_method)} |"
                    )
                apart = [results.difference(case, reference, method) for case in cases]
                if method != reference and any(apart):
                    differences.append(f"| {method}, {how} | {' | '.join(str(figure or '–') for figure in apart)} |")
        lines += ["", *differences, "", *(f"- {line}" for line in results.recordings(task)), ""]
    return "\n".join([*lines, _LEGEND])


_LEGEND = (
    "Mean ± deviation over seeds [95 % bootstrap interval over test patients, of the mean over seeds]. Differences are "
    "paired: the same resampled patients for both; those whose interval leaves out 0 are bold. None of one seed is: "
    "another seed may turn it round."
)


def _named(protocol: str, fraction: float, figure: str) -> str:
    how = "frozen" if figure == "top1" and protocol == "probe" else _PROTOCOLS[protocol]
    return how + (f", {100 * fraction:g} % of the labels" if fraction < 1 else "")


def as_csv(results: Results, reference: str) -> str:
    """A line per case and method with every figure, and its difference from the reference method."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*Case._fields, "method", "seeds", "mean", "deviation", "low", "high",
                     f"{reference} minus it", "difference low", "difference high",
                     "asked for", "scored", "left out"])  # fmt: skip
    for (case, method), result in results.by.items():
        apart = results.difference(case, reference, method)
        numbers = [result.mean.value, result.deviation, result.mean.low, result.mean.high]
        estimate = Estimate(*[float("nan")] * 3) if apart is None else apart.estimate
        numbers += [estimate.value, estimate.low, estimate.high]
        cells = ["" if np.isnan(n) else f"{n:.6f}" for n in numbers]
        writer.writerow([*case, method, result.seeds, *cells, *_counts(result.coverage)])
    return out.getvalue()


def _counts(coverage: Coverage | None) -> list[str]:
    """Recordings that were asked for and scored, and reason=recordings of those left out."""
    if coverage is None:
        return [""] * 3
    left_out = ";".join(f"{reason}={count}" for reason, count in coverage.left_out.items())
    return [str(coverage.asked_for), str(coverage.used), left_out]


def plot(results: Results) -> Figure:
    """A row of panels per task, one per protocol and label fraction: each method over the lead sets, with intervals."""
    from matplotlib.figure import Figure

    shapes = [results.of_task(task) for task in results.tasks]
    columns = max(len(protocols) for protocols, _ in shapes)
    figure = Figure(figsize=(4.2 * columns, 3.4 * len(shapes) + 0.8), layout="constrained")
    grid = figure.subplots(len(shapes), columns, squeeze=False, sharey="row")
    for row, task, (protocols, lead_sets) in zip(grid, results.tasks, shapes, strict=True):
        for axes in row[len(protocols) :]:
            axes.axis("off")
        for axes, (protocol, fraction) in zip(row, protocols, strict=False):
            for m, method in enumerate(results.methods):
                cases = [Case(task, protocol, fraction, leads, results.shown(task)) for leads in lead_sets]
                figures_of_method = [
                    (x, result) for x, case in enumerate(cases) if (result := results.by.get((case, method)))
                ]
                if not figures_of_method:
                    continue
                at = [x + 0.08 * (m - (len(results.methods) - 1) / 2) for x, _ in figures_of_method]
                value = np.array([result.mean.value for _, result in figures_of_method])
                ends = np.array([(result.mean.low, result.mean.high) for _, result in figures_of_method]).T
                error = np.maximum([value - ends[0], ends[1] - value], 0)
                axes.errorbar(at, value, error, marker="o", markersize=4, linewidth=1, capsize=2, label=method)
            axes.set_title(_named(protocol, fraction, results.shown(task)))
            axes.set_xticks(range(len(lead_sets)), lead_sets)
            axes.set_xlim(-0.5, len(lead_sets) - 0.5)
            axes.set_xlabel("leads")
        row[0].set_ylabel(f"{task}: {title(results.shown(task))}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize="small")
    return figure
