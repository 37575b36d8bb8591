"""What the runs of a ladder have found, the best learning rate of each cell, and all that the law says about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ecgscale.errors import InputError
from ecgscale.scaling.ladder import DIVERGED, Cell, ScalingConfig, epochs, next_sizes
from ecgscale.scaling.law import Cells, Floats, Law, Optimum, doubts, explained, fit, interval, noise, optimum, predict
from ecgscale.scaling.law import resample as bootstrap

MANY_EPOCHS = 4.0
SWEEP = 3  # learning rates, of which one can lie between the others


@dataclass(frozen=True)
class Run:
    """A cell that is done."""

    size: str
    parameters: int
    width: int
    tokens: int
    steps: int
    epochs: float
    flops: int
    learning_rate: float
    seed: int
    loss: float  # NaN: it diverged, or its validation loss is not finite
    parts: dict[str, float | None]  # of the validation loss


def runs_of(found: Sequence[Cell], part: str) -> list[Run]:
    """What the cells have found. Raises InputError for one that is not done, or has no such part of the loss."""
    runs = []
    for cell in found:
        parts, config = cell.result(), cell.pretraining
        if not parts:
            raise InputError(f"{cell.folder}: is not finished; run its part first")
        if part not in parts and parts != DIVERGED:
            raise InputError(f"{cell.folder}/result.json: has no {part}, only {', '.join(parts)}; remove the folder")
        value = parts.get(part)
        if not isinstance(value, int | float | None):
            raise InputError(f"{cell.folder}/result.json: {part} is {value!r} and no number; remove the folder")
        runs.append(
            Run(
                size=cell.size,
                parameters=cell.parameters,
                width=config.model.width,
                tokens=cell.tokens,
                steps=config.train.steps,
                epochs=epochs(cell),
                flops=cell.flops,
                learning_rate=config.engine.learning_rate,
                seed=cell.seed,
                loss=math.nan if value is None else value,
                parts=parts,
            )
        )
    return runs


class Point(NamedTuple):
    """One size after so many tokens."""

    size: str
    tokens: int


class Ladder:
    """Runs by size and tokens, of each the best learning rate: of those at which the fewest seeds diverge, the one with
    the lowest mean."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.sizes = list(dict.fromkeys(run.size for run in sorted(runs, key=lambda run: run.parameters)))
        self.tokens = sorted({run.tokens for run in runs})
        self.by_rate: dict[Point, dict[float, list[Run]]] = {}
        for run in sorted(runs, key=lambda run: (run.tokens, run.learning_rate)):
            rates = self.by_rate.setdefault(Point(run.size, run.tokens), {})
            rates.setdefault(run.learning_rate, []).append(run)
        self.best = {
            point: min(rates.values(), key=lambda same: (diverged_seeds(same), mean_loss(same)))
            for point, rates in self.by_rate.items()
        }

    def mean(self, size: str, tokens: int) -> float:
        """``mean_loss`` at the best learning rate."""
        return mean_loss(self.best[Point(size, tokens)])

    def first(self, size: str) -> Run:
        """Any run of a size, for what all of them have in common."""
        return next(run for run in self.runs if run.size == size)

    def cells(self, without: str = "") -> Cells:
        """What the law is fitted to: the runs of the best learning rates that did not diverge."""
        kept = [run for same in self.best.values() for run in same if run.size != without and math.isfinite(run.loss)]
        size, tokens, loss = (
            np.array([getattr(run, name) for run in kept], np.float64) for name in ("parameters", "tokens", "loss")
        )
        return Cells(size, tokens, loss)

    @property
    def swept(self) -> bool:
        """Whether enough learning rates were tried to say where the best one is."""
        return any(len(rates) >= SWEEP for rates in self.by_rate.values())

    def remarks(self) -> list[str]:
        """What is to be known of the runs before anything is read out of them, a sentence each."""
        said = []
        if diverged := [run for run in self.runs if not math.isfinite(run.loss)]:
            said.append(f"{len(diverged)} of {len(self.runs)} runs have no finite loss and are left out.")
        if repeated := [run for run in self.runs if run.epochs > MANY_EPOCHS]:
            said.append(
                f"{len(repeated)} runs read the training recordings more than {MANY_EPOCHS:g} times (up to "
                f"{max(run.epochs for run in repeated):.1f}): repeated tokens count for less than new ones."
            )
        edges = []
        for point, best in self.best.items():
            rates = self.by_rate[point]
            tried = [rate for rate, same in rates.items() if diverged_seeds(same) == diverged_seeds(best)]
            if len(rates) >= SWEEP and finite(best) and best[0].learning_rate in (min(tried), max(tried)):
                edges.append(point)
        if not self.swept and any(len(rates) > 1 for rates in self.by_rate.values()):
            said.append("Two learning rates were tried and the better one counts: where the best one is, is not known.")
        if edges:
            named = ", ".join(f"{size} at {tokens:,} tokens" for size, tokens in edges[:3])
            more = f" and {len(edges) - 3} more" if len(edges) > 3 else ""
            said.append(f"The best learning rate is at the edge of those that did not diverge for {named}{more}.")
        return said


def finite(same: Sequence[Run]) -> list[float]:
    """Losses of the seeds that did not diverge: what the law is fitted to, and every mean is taken of."""
    return [run.loss for run in same if math.isfinite(run.loss)]


def diverged_seeds(same: Sequence[Run]) -> int:
    """How many."""
    return len(same) - len(finite(same))


def mean_loss(same: Sequence[Run]) -> float:
    """Over the seeds that did not diverge; NaN where all did."""
    losses = finite(same)
    return float(np.mean(losses)) if losses else math.nan


def mean_text(same: Sequence[Run]) -> str:
    """For tables: 1.234 ± 0.005 (2 of 3 seeds), where one of three diverged."""
    losses = finite(same)
    if not losses:
        return "diverged"
    deviation = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
    of = f" ({len(losses)} of {len(same)} seeds)" if len(losses) < len(same) else ""
    return f"{mean_loss(same):.3f}{deviation}{of}"


@dataclass(frozen=True)
class HeldOut:
    """How well the law of all but the largest size predicts that one."""

    size: str
    rows: list[tuple[int, float, float, float, float, float]]  # tokens, predicted, low, high, measured, size before's

    @property
    def error(self) -> float:
        """Mean relative error of the prediction."""
        return float(np.mean([abs(predicted / measured - 1) for _, predicted, _, _, measured, _ in self.rows]))

    @property
    def naive_error(self) -> float:
        """That of the guess that a larger size gains nothing: the loss of the size before."""
        return float(np.mean([abs(before / measured - 1) for *_, measured, before in self.rows]))


@dataclass(frozen=True)
class Prediction:
    """A size that was not run, after so many tokens."""

    size: str
    parameters: int
    tokens: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Spending:
    """What a budget is best spent on, by exact FLOPs and by 6·N·D."""

    flops: float
    exact: Optimum
    size_interval: tuple[float, float]
    looked_at: tuple[float, float]
    """Smallest and largest size among which the best was looked for."""
    by_6nd: Optimum


@dataclass(frozen=True)
class Findings:
    """The law of a ladder, or why there is none."""

    law: Law | None
    laws: list[Law]
    doubts: list[str]
    noise: float = math.nan
    explained: float = math.nan
    held_out: HeldOut | None = None
    predictions: tuple[Prediction, ...] = ()
    spending: tuple[Spending, ...] = ()


def find(config: ScalingConfig, ladder: Ladder) -> Findings:
    """Fit, intervals, hold-out, predictions and best spending."""
    cells = ladder.cells()
    if reason := cells.too_few():
        return Findings(None, [], [f"No law: {reason}."])
    law = fit(cells)
    laws = bootstrap(cells, law, config.resamples)
    return Findings(
        law,
        laws,
        doubts(cells, law, laws),
        noise(cells, law),
        explained(cells, law),
        _hold_out(config, ladder),
        _predictions(config, ladder, cells, law, laws),
        _spending(config, ladder, law, laws),
    )


def _hold_out(config: ScalingConfig, ladder: Ladder) -> HeldOut | None:
    """None where the smaller sizes do not determine a law, or every run of the one before diverged."""
    *_, before, largest = ladder.sizes
    cells = ladder.cells(without=largest)
    losses = {tokens: ladder.mean(size, tokens) for size, tokens in ladder.best if size == before}
    known = {tokens: loss for tokens, loss in losses.items() if math.isfinite(loss)}
    if cells.too_few() or not known:
        return None
    law = fit(cells)
    laws = bootstrap(cells, law, config.resamples)
    rows = []
    for size, tokens in ladder.best:
        measured = ladder.mean(size, tokens)
        if size == largest and math.isfinite(measured):
            predicted = predict(cells, law, laws, ladder.first(size).parameters, tokens)
            nearest = min(known, key=lambda one: abs(one - tokens))
            rows.append((tokens, *predicted, measured, known[nearest]))
    return HeldOut(largest, rows) if rows else None


def _predictions(
    config: ScalingConfig, ladder: Ladder, cells: Cells, law: Law, laws: list[Law]
) -> tuple[Prediction, ...]:
    """The next sizes after as many tokens as were tried, and after as many more times as they are larger."""
    *_, before, largest = (ladder.first(size).parameters for size in ladder.sizes)
    asked = [(name, size) for name, size, _ in next_sizes(config)]
    found = []
    for name, size in asked or [("next", round(largest * largest / before))]:
        for tokens in (ladder.tokens[-1], ladder.tokens[-1] * max(1.0, size / largest)):
            found.append(Prediction(name, size, tokens, *predict(cells, law, laws, size, tokens)))
    return tuple(dict.fromkeys(found))


def _spending(config: ScalingConfig, ladder: Ladder, law: Law, laws: list[Law]) -> tuple[Spending, ...]:
    """Exact FLOPs per token lie between those of the sizes that are known, and go on beyond them as a power law."""
    known = {ladder.first(size).parameters: _flops_per_token(ladder.first(size)) for size in ladder.sizes}
    known |= {size: flops for _, size, flops in next_sizes(config)}
    size_G, exact_G = _between(known)
    dearest = max(run.flops for run in ladder.runs)
    found = []
    for flops in config.budgets or [dearest, 10 * dearest, 100 * dearest]:
        best = optimum(law, flops, size_G, exact_G)
        sizes = [optimum(one, flops, size_G, exact_G).size for one in laws]
        ends = float(size_G[0]), float(size_G[-1])
        found.append(Spending(flops, best, interval(sizes), ends, optimum(law, flops, size_G, 6 * size_G)))
    return tuple(found)


def _flops_per_token(run: Run) -> float:
    return run.flops / run.tokens


def _between(known: dict[int, float], factor: float = 100.0) -> tuple[Floats, Floats]:
    """A grid of sizes, to ``factor`` beyond what is known on both sides, and their training FLOPs per token."""
    size_K, flops_K = (np.log(np.array(one, np.float64)) for one in zip(*sorted(known.items()), strict=True))
    ends = np.log(factor)
    slopes = np.diff(flops_K)[[0, -1]] / np.diff(size_K)[[0, -1]]
    far_K = np.concatenate([[size_K[0] - ends], size_K, [size_K[-1] + ends]])
    more_K = np.concatenate([[flops_K[0] - ends * slopes[0]], flops_K, [flops_K[-1] + ends * slopes[1]]])
    size_G = np.linspace(far_K[0], far_K[-1], 1000)
    return np.exp(size_G), np.exp(np.interp(size_G, far_K, more_K))
