"""What a ladder has found, for people: table.md, plot.png; and cells.csv and fit.json beside them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ecgscale import tables
from ecgscale.files import finite, write_json, write_whole
from ecgscale.scaling import rates
from ecgscale.scaling.ladder import ScalingConfig, cells
from ecgscale.scaling.law import Law, interval
from ecgscale.scaling.results import Findings, HeldOut, Ladder, Point, find, mean_text, runs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def merge(config: ScalingConfig) -> str:
    """Write fit.json, table.md, cells.csv and plot.png; returns the table.

    Raises InputError that names a cell which is not finished.
    """
    ladder = Ladder(runs_of(cells(config), config.loss))
    findings = find(config, ladder)
    folder, text = Path(config.run.dir), markdown(config, ladder, findings)
    write_whole(folder / "cells.csv", as_csv(ladder).encode())
    write_json(folder / "fit.json", finite(as_json(config, findings)))
    write_whole(folder / "table.md", (text + "\n").encode())
    buffer = io.BytesIO()
    plot(config, ladder, findings).savefig(buffer, dpi=100)
    write_whole(folder / "plot.png", buffer.getvalue())
    return f"{text}\n\ntable.md, cells.csv, fit.json and plot.png are in {folder}"


def as_csv(ladder: Ladder) -> str:
    """A line per run, with every part of its validation loss; used: whether the law was fitted to it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = list(dict.fromkeys(part for run in ladder.runs for part in run.parts))
    about = ("size", "parameters", "width", "tokens", "steps", "epochs", "flops", "learning_rate", "seed")
    writer.writerow([*about, "six_n_d", "used", *(f"validation/{part}" for part in parts)])
    for run in ladder.runs:
        used = run in ladder.best[Point(run.size, run.tokens)] and math.isfinite(run.loss)
        numbers = [f"{one:.6g}" if isinstance(one, float) else one for one in (getattr(run, name) for name in about)]
        losses = ["" if (value := run.parts.get(part)) is None else f"{value:.6f}" for part in parts]
        writer.writerow([*numbers, 6 * run.parameters * run.tokens, int(used), *losses])
    return out.getvalue()


def as_json(config: ScalingConfig, findings: Findings) -> dict[str, Any]:
    """Everything that was found, for programs."""
    tree: dict[str, Any] = {
        "loss": f"validation/{config.loss}",
        "law": None,
        "parameters_count": "encoder, without the objective's heads",
        "doubts": findings.doubts,
    }
    if findings.law is None:
        return tree
    tree["law"] = findings.law._asdict()
    tree["interval_95"] = {
        name: interval([getattr(one, name) for one in findings.laws]) for name in findings.law._fields
    }
    tree |= {"noise_of_log_loss": findings.noise, "explained_variance": findings.explained}
    tree["predictions"] = [vars(one) for one in findings.predictions]
    tree["spending"] = [
        {
            "flops": one.flops,
            "exact": vars(one.exact),
            "exact_size_interval_95": one.size_interval,
            "by_6nd": vars(one.by_6nd),
        }
        for one in findings.spending
    ]
    if findings.held_out:
        keys = ("tokens", "predicted", "low", "high", "measured", "size_before_measured")
        tree["held_out"] = {
            "size": findings.held_out.size,
            "mean_relative_error": findings.held_out.error,
            "mean_relative_error_of_the_size_before": findings.held_out.naive_error,
            "rows": [dict(zip(keys, row, strict=True)) for row in findings.held_out.rows],
        }
    return tree


def markdown(config: ScalingConfig, ladder: Ladder, findings: Findings) -> str:
    """Losses, learning rates, the law with what speaks against it, hold-out, predictions and best spending."""
    lines = [f"Validation loss `{config.loss}` by size and tokens, mean ± deviation over seeds", ""]
    lines += _losses(ladder)
    lines += [f"- {said}" for said in ladder.remarks()]
    if ladder.swept:
        lines += ["", *rates.markdown(ladder)]
    lines += [""] + [f"- **{said}**" for said in findings.doubts]
    if findings.law is None:
        return "\n".join(lines)
    lines += ["", *_constants(findings, findings.law)]
    if findings.held_out:
        lines += ["", *_held_out(findings.held_out)]
    else:
        lines += [
            "",
            "Hold-out: not done, the smaller sizes alone determine no law, or one of the two largest has no loss.",
        ]
    predicted = [
        (one.size, f"{one.parameters:,}", f"{one.tokens:,.0f}", _with_interval(one.loss, one.low, one.high))
        for one in findings.predictions
    ]
    lines += ["", *tables.markdown(("prediction", "parameters", "tokens", "loss"), predicted)]
    return "\n".join([*lines, "", *_spending(findings), "", _LEGEND])


_LEGEND = (
    "N: parameters of the encoder, without the objective's heads. D: tokens that it reads. In brackets 95 % bootstrap "
    "intervals over cells and seeds; those of predicted losses hold the scatter of one run too. FLOPs are those of "
    "training with the heads, two per multiply-add; between and beyond the sizes that were run, a power law. (edge): "
    "the best size lies outside all that was looked at."
)


def _losses(ladder: Ladder) -> list[str]:
    rows = []
    for size in ladder.sizes:
        first = ladder.first(size)
        ratio = first.flops / first.tokens / (6 * first.parameters)
        best = [ladder.best.get(Point(size, tokens)) for tokens in ladder.tokens]
        shown = [mean_text(same) if same else "–" for same in best]
        rows.append((size, f"{first.parameters:,}", f"{ratio:.2f}", *shown))
    head = ("size", "N", "FLOPs per token / 6N", *(f"{tokens:,}" for tokens in ladder.tokens))
    return tables.markdown(head, rows)


def _spending(findings: Findings) -> list[str]:
    rows = []
    for one in findings.spending:
        low, high = one.size_interval
        below = "below " if low <= one.looked_at[0] else ""
        above = "above " if high >= one.looked_at[1] else ""
        edge = " (edge)" if one.exact.at_edge else ""
        size = f"{one.exact.size:.2g} [{below}{low:.2g}, {above}{high:.2g}]{edge}"
        numbers = (f"{one.exact.tokens:.2g}", f"{one.exact.loss:.3f}", f"{one.by_6nd.size:.2g}")
        rows.append((f"{one.flops:.2g}", size, *numbers, f"{one.by_6nd.tokens:.2g}"))
    head = ("best spending of FLOPs", "parameters", "tokens", "loss", "parameters by 6ND", "tokens by 6ND")
    return tables.markdown(head, rows)


def _constants(findings: Findings, law: Law) -> list[str]:
    intervals = [interval([getattr(one, name) for one in findings.laws]) for name in law._fields]
    names = ("E", "A", "α", "B", "β")
    rows = [
        (name, f"{value:.4g}", f"{low:.4g} to {high:.4g}")
        for name, value, (low, high) in zip(names, law, intervals, strict=True)
    ]
    return [
        *tables.markdown(("L = E + A / N^α + B / D^β", "fitted", "95 % interval"), rows),
        "",
        f"It explains {findings.explained:.1%} of the variance of the log losses; runs scatter about it by "
        f"{findings.noise:.2%}.",
    ]


def _held_out(held_out: HeldOut) -> list[str]:
    rows = []
    for tokens, predicted, low, high, measured, _ in held_out.rows:
        missed = "" if low <= measured <= high else ", outside"
        shown = _with_interval(predicted, low, high)
        rows.append((f"{tokens:,} tokens", shown, f"{measured:.3f}{missed}", f"{predicted / measured - 1:+.2%}"))
    better = "better" if held_out.error < held_out.naive_error else "not better"
    head = (f"hold-out: {held_out.size} from the smaller sizes", "predicted", "measured", "error")
    return [
        *tables.markdown(head, rows),
        "",
        f"Mean error {held_out.error:.2%}: {better} than to take the loss of the size before "
        f"({held_out.naive_error:.2%}).",
    ]


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def plot(config: ScalingConfig, ladder: Ladder, findings: Findings) -> Figure:
    """Loss over tokens for each size, loss over size for equal FLOPs, and over learning rates where there are some."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    colour = dict(zip(ladder.sizes, colormaps["viridis"](np.linspace(0, 0.9, len(ladder.sizes))), strict=True))
    swept = ladder.swept
    figure = Figure(figsize=(10.5 + 4.5 * swept, 4.2), layout="constrained")
    by_tokens, by_flops, *by_rate = figure.subplots(1, 2 + swept)
    for size in ladder.sizes:
        for axes, against in ((by_tokens, "tokens"), (by_flops, "flops")):
            used = [run for point, same in ladder.best.items() if point.size == size for run in same]
            label = f"{size}: {ladder.first(size).parameters:,}"
            x, y = [getattr(run, against) for run in used], [run.loss for run in used]
            axes.plot(x, y, "o", markersize=4, color=colour[size], label=label)
    if findings.law:
        _draw_law(by_tokens, by_flops, ladder, findings, findings.law, colour)
    for axes, title in ((by_tokens, "tokens"), (by_flops, "training FLOPs")):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(99, 99)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(title)
    by_tokens.set_ylabel(f"validation loss: {config.loss}")
    by_tokens.legend(title="encoder parameters", fontsize="small")
    if swept:
        rates.draw(by_rate[0], ladder, colour)
    if findings.doubts:
        title = "See table.md for what speaks against this fit" if findings.law else findings.doubts[0]
        figure.suptitle(title, fontsize="small")
    return figure


def _draw_law(
    by_tokens: Axes, by_flops: Axes, ladder: Ladder, findings: Findings, law: Law, colour: dict[str, object]
) -> None:
    """Each size's curve over tokens and over FLOPs; beside the latter, where a budget is best spent."""
    tokens_G = np.geomspace(ladder.tokens[0] / 1.3, ladder.tokens[-1] * 4, 200)
    for size in ladder.sizes:
        first = ladder.first(size)
        loss_RG = np.array([one.loss(first.parameters, tokens_G) for one in findings.laws])
        low_G, high_G = np.quantile(loss_RG, [0.025, 0.975], axis=0)
        by_tokens.fill_between(tokens_G, low_G, high_G, color=colour[size], alpha=0.12, linewidth=0)
        for axes, x_G in ((by_tokens, tokens_G), (by_flops, tokens_G * first.flops / first.tokens)):
            axes.plot(x_G, law.loss(first.parameters, tokens_G), color=colour[size], linewidth=1)
    best = [(one.flops, one.exact.loss) for one in findings.spending if not one.exact.at_edge]
    if best:
        by_flops.plot(*zip(*best, strict=True), "k--x", linewidth=1, label="best spending")
        by_flops.legend(fontsize="small")
