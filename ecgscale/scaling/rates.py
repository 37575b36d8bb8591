"""Does the best learning rate move with the width of the model? What a sweep of both says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ecgscale import tables
from ecgscale.scaling.results import Ladder, Point, diverged_seeds, mean_loss, mean_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class BestRate(NamedTuple):
    """The learning rate with the lowest loss, from the parabola through the three best neighbours in log rate."""

    rate: float
    loss: float  # the lowest that was measured
    at_edge: bool  # the lowest was measured at the edge of the sweep, so that no parabola says where the best is


def curve(ladder: Ladder, point: Point) -> tuple[list[float], list[float]]:
    """Learning rates and mean losses over the seeds that did not diverge; NaN where all did."""
    by_rate = ladder.by_rate[point]
    return list(by_rate), [mean_loss(same) for same in by_rate.values()]


def best_of(ladder: Ladder, point: Point) -> BestRate | None:
    """Of the rates at which the fewest seeds diverged, as in ``Ladder.best``; None where all did at each."""
    by_rate = ladder.by_rate[point]
    fewest = min(map(diverged_seeds, by_rate.values()))
    losses = [mean_loss(same) if diverged_seeds(same) == fewest else math.nan for same in by_rate.values()]
    return best_rate(list(by_rate), losses) if any(map(math.isfinite, losses)) else None


def best_rate(rates: list[float], losses: list[float]) -> BestRate:
    """Of a sweep with one finite loss at least."""
    finite = [(math.log(rate), loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    best = min(range(len(finite)), key=lambda i: finite[i][1])
    rate, loss = finite[best]
    if best in (0, len(finite) - 1):
        return BestRate(math.exp(rate), loss, True)
    x, y = zip(*finite[best - 1 : best + 2], strict=True)
    curvature, slope, _ = np.polyfit(np.array(x) - rate, y, 2)
    return BestRate(math.exp(rate - slope / (2 * curvature)), loss, False)


def exponent(widths: list[int], rates: list[float]) -> float:
    """p of best rate ~ width^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log(widths), np.log(rates), 1)[0])


def markdown(ladder: Ladder) -> list[str]:
    """The sweep of each token count, and how the best learning rate moves with the width."""
    lines = []
    for tokens in ladder.tokens:
        sizes = [size for size in ladder.sizes if Point(size, tokens) in ladder.by_rate]
        tried = sorted({rate for size in sizes for rate in ladder.by_rate[Point(size, tokens)]})
        rows = []
        found: list[tuple[int, BestRate]] = []
        for size in sizes:
            shown = {rate: mean_text(same) for rate, same in ladder.by_rate[Point(size, tokens)].items()}
            where = "–"
            if best := best_of(ladder, Point(size, tokens)):
                found.append((ladder.first(size).width, best))
                where = f"{best.rate:.2g}" + (" (edge)" if best.at_edge else "")
            losses = [shown.get(rate, "") for rate in tried]
            rows.append((f"{size}, width {ladder.first(size).width}", *losses, where))
        head = (f"{tokens:,} tokens, rate:", *(f"{rate:.3g}" for rate in tried), "best rate")
        lines += [*tables.markdown(head, rows), "", *_moves(found), ""]
    return lines[:-1]


def _moves(found: list[tuple[int, BestRate]]) -> list[str]:
    inside = [(width, best.rate) for width, best in found if not best.at_edge]
    widths = [width for width, _ in inside]
    if len(set(widths)) < 3:
        return ["Fewer than three widths have their best rate within the sweep: how it moves is not determined."]
    moves = exponent(widths, [rate for _, rate in inside])
    return [f"The best rate moves as width^{moves:+.2f} over widths {min(widths)} to {max(widths)}."]


def draw(axes: Axes, ladder: Ladder, colour: dict[str, object]) -> None:
    """Loss over learning rate at the largest token count, a line per size, its best one marked."""
    tokens = ladder.tokens[-1]
    for size in ladder.sizes:
        if Point(size, tokens) not in ladder.by_rate:
            continue
        rates, losses = curve(ladder, Point(size, tokens))
        axes.plot(rates, losses, "o-", markersize=3, color=colour[size], label=f"width {ladder.first(size).width}")
        if best := best_of(ladder, Point(size, tokens)):
            axes.plot(best.rate, best.loss, "v", color=colour[size], markersize=7)
    axes.set_xscale("log")
    axes.set_xlabel(f"learning rate, {tokens:,} tokens")
    axes.legend(fontsize="small")
