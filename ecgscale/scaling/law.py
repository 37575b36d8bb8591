"""The law L(N, D) = E + A / N^α + B / D^β: its fit, its uncertainty, and what follows from it. No file is read here.

After Hoffmann et al. 2022 ("Chinchilla", approach 3): a Huber loss on the logarithm, minimised by L-BFGS from a grid of
starts. Besiroglu et al. 2024 show why intervals belong beside it.

Shape suffixes: K cells, R bootstrap resamples, P parameters of the fit, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, nnls

Floats = npt.NDArray[np.float64]

HUBER = 1e-3  # of the logarithm of the loss, as Hoffmann et al.
LARGEST_EXPONENT = 3.0
FEWEST_SIZES = FEWEST_TOKENS = 3  # a power law with a floor has three unknowns along each
FEWEST_CELLS = 7  # five unknowns, and something to tell how well they fit
_STARTS = (0.1, 0.25, 0.5, 1.0, 2.0)  # exponents; the three linear unknowns follow from them


class Law(NamedTuple):
    """Constants of the law, N in parameters and D in tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, size: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
        """Predicted loss of models of ``size`` parameters after ``tokens``."""
        n, d = np.asarray(size, np.float64), np.asarray(tokens, np.float64)
        predicted: Floats = self.E + self.A * n**-self.alpha + self.B * d**-self.beta
        return predicted


@dataclass(frozen=True)
class Cells:
    """What was measured, one entry per run."""

    size_K: Floats
    tokens_K: Floats
    loss_K: Floats

    def __len__(self) -> int:
        return len(self.loss_K)

    def at(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Cells:
        """Some of them, or some several times."""
        return Cells(self.size_K[index], self.tokens_K[index], self.loss_K[index])

    def too_few(self, fewest: int = FEWEST_CELLS) -> str:
        """Why no law can be fitted; empty where one can: with so many different (N, D) at least."""
        sizes, tokens = len(np.unique(self.size_K)), len(np.unique(self.tokens_K))
        points = len(np.unique(np.stack([self.size_K, self.tokens_K]), axis=1).T) if len(self) else 0
        if sizes >= FEWEST_SIZES and tokens >= FEWEST_TOKENS and points >= fewest:
            return ""
        return (
            f"{sizes} sizes, {tokens} token counts and {points} cells do not determine the law's five constants; "
            f"it takes {FEWEST_SIZES}, {FEWEST_TOKENS} and {fewest}"
        )


def fit(cells: Cells, starts: Sequence[Law] = ()) -> Law:
    """The law that is nearest to the cells; from ``starts`` only, where they are given, which is faster."""
    size_K, tokens_K = np.log(cells.size_K), np.log(cells.tokens_K)
    size_at, tokens_at = float(size_K.mean()), float(tokens_K.mean())
    size_K, tokens_K, loss_K = size_K - size_at, tokens_K - tokens_at, np.log(cells.loss_K)
    if starts:
        begun = [_inner(law, size_at, tokens_at, float(loss_K.min())) for law in starts]
    else:
        begun = _grid(size_K, tokens_K, cells.loss_K)
    terms = (float(loss_K.min()) - 14.0, float(loss_K.max()) + 2.0)  # of a term's logarithm: a millionth is nothing
    bounds = [terms] * 3 + [(0.0, LARGEST_EXPONENT)] * 2
    done = [
        minimize(_distance, start_P, (size_K, tokens_K, loss_K), "L-BFGS-B", jac=True, bounds=bounds)
        for start_P in (np.clip(start_P, *np.array(bounds).T) for start_P in begun)
    ]
    e, a, b, alpha, beta = min(done, key=lambda one: float(one.fun)).x
    found = np.exp(e), np.exp(a + alpha * size_at), alpha, np.exp(b + beta * tokens_at), beta
    return Law(*map(float, found))


def _inner(law: Law, size_at: float, tokens_at: float, least: float) -> Floats:
    """A law as the fit sees it: logarithms of its three terms in the middle of the cells, and the exponents."""
    with np.errstate(divide="ignore"):
        e, a, b = np.log([law.E, law.A, law.B])
    terms = np.maximum([e, a - law.alpha * size_at, b - law.beta * tokens_at], least - 14.0)
    return np.array([*terms, law.alpha, law.beta])


def _grid(size_K: Floats, tokens_K: Floats, loss_K: Floats, keep: int = 6) -> list[Floats]:
    """The best starts of a grid of exponents. For given exponents the law is linear: non-negative least squares."""
    found = []
    for alpha in _STARTS:
        for beta in _STARTS:
            term_K3 = np.stack([np.ones_like(size_K), np.exp(-alpha * size_K), np.exp(-beta * tokens_K)], axis=1)
            factor_3, error = nnls(term_K3 / loss_K[:, None], np.ones_like(loss_K))
            found.append((error, [*np.log(np.maximum(factor_3, 1e-3 * loss_K.min())), alpha, beta]))
    return [np.array(start) for _, start in sorted(found)[:keep]]


def _distance(inner_P: Floats, size_K: Floats, tokens_K: Floats, loss_K: Floats) -> tuple[float, Floats]:
    """Mean Huber loss of log prediction − log loss, in units of its width, and its gradient."""
    e, a, b, alpha, beta = inner_P
    term_3K = np.stack([np.full_like(size_K, e), a - alpha * size_K, b - beta * tokens_K])
    log_K = np.logaddexp.reduce(term_3K, axis=0)
    share_3K = np.exp(term_3K - log_K)
    far_K = (log_K - loss_K) / HUBER
    near_K = np.abs(far_K) <= 1
    huber_K = np.where(near_K, 0.5 * far_K**2, np.abs(far_K) - 0.5)
    slope_K = np.clip(far_K, -1, 1) / HUBER / len(loss_K)
    by_3 = (share_3K * slope_K).sum(axis=1)
    by_alpha, by_beta = -(share_3K[1] * slope_K * size_K).sum(), -(share_3K[2] * slope_K * tokens_K).sum()
    return float(huber_K.mean()), np.array([*by_3, by_alpha, by_beta])


def resample(cells: Cells, law: Law, resamples: int, seed: int = 0) -> list[Law]:
    """Laws of bootstrap resamples: points (N, D) are drawn with replacement, and at each of them its runs (seeds).

    A draw with too few sizes, token counts or different points for the five constants is drawn again. Raises ValueError
    where the cells do not determine a law.
    """
    if reason := cells.too_few():
        raise ValueError(reason)
    point_K = np.unique(np.stack([cells.size_K, cells.tokens_K]), axis=1, return_inverse=True)[1].ravel()
    runs = [np.flatnonzero(point_K == point) for point in range(point_K.max() + 1)]
    rng, laws = np.random.default_rng(seed), list[Law]()
    while len(laws) < resamples:
        drawn = [runs[point] for point in rng.integers(len(runs), size=len(runs))]
        some = cells.at(np.concatenate([rng.choice(of, len(of)) for of in drawn]))
        if not some.too_few(len(law)):
            laws.append(fit(some, [law, *(laws[-1:])]))
    return laws


def interval(value_R: npt.ArrayLike) -> tuple[float, float]:
    """The middle 95 % of resamples."""
    low, high = np.quantile(np.asarray(value_R, np.float64), [0.025, 0.975])
    return float(low), float(high)


def noise(cells: Cells, law: Law) -> float:
    """Standard deviation of log loss − log prediction, for five constants fitted."""
    far_K = np.log(cells.loss_K) - np.log(law.loss(cells.size_K, cells.tokens_K))
    return float(np.sqrt((far_K**2).sum() / max(1, len(cells) - len(law))))


def predict(
    cells: Cells, law: Law, laws: Sequence[Law], size: float, tokens: float, seed: int = 0
) -> tuple[float, float, float]:
    """Loss of one run that was not done, with the 95 % interval of what it would give: constants and noise."""
    far_K = np.log(cells.loss_K) - np.log(law.loss(cells.size_K, cells.tokens_K))
    wider = np.sqrt(len(cells) / max(1, len(cells) - len(law)))  # the fit has drawn the residuals towards 0
    drawn_R = wider * np.random.default_rng(seed).choice(far_K, len(laws))
    value_R = np.array([float(one.loss(size, tokens)) for one in laws]) * np.exp(drawn_R)
    return float(law.loss(size, tokens)), *interval(value_R)


def explained(cells: Cells, law: Law) -> float:
    """Share of the variance of the log losses that the law explains; 0 or below: no more than their mean."""
    log_K = np.log(cells.loss_K)
    rest_K = log_K - np.log(law.loss(cells.size_K, cells.tokens_K))
    spread = float(((log_K - log_K.mean()) ** 2).sum())
    return 1.0 - float((rest_K**2).sum()) / spread if spread else 0.0


@dataclass(frozen=True)
class Optimum:
    """What a budget of training FLOPs is best spent on."""

    size: float
    tokens: float
    loss: float
    at_edge: bool  # of the sizes that were looked at: no optimum between them


def optimum(law: Law, flops: float, size_G: Floats, flops_per_token_G: Floats) -> Optimum:
    """The size with the lowest loss when all of ``flops`` is spent, of sizes with known training FLOPs per token."""
    tokens_G = flops / flops_per_token_G
    loss_G = law.loss(size_G, tokens_G)
    best = int(loss_G.argmin())
    at_edge = best in (0, len(size_G) - 1)
    return Optimum(float(size_G[best]), float(tokens_G[best]), float(loss_G[best]), at_edge)


def doubts(cells: Cells, law: Law, laws: Sequence[Law]) -> list[str]:
    """What speaks against taking the constants for certain, a sentence each; none where nothing does."""
    said = []
    if (share := explained(cells, law)) < 0.9:
        said.append(f"The law explains only {max(0.0, share):.0%} of the variance of the losses.")
    for axis, name, exponent, other in (
        ("size", "α", law.alpha, [one.alpha for one in laws]),
        ("tokens", "β", law.beta, [one.beta for one in laws]),
    ):
        low, high = interval(other)
        if (gain := _gain(cells, law, axis)) < 2 * noise(cells, law):
            said.append(
                f"Losses are flat along {axis}: from the smallest to the largest the law gains {gain:.2%}, "
                f"runs scatter by {noise(cells, law):.2%}; {name} means nothing."
            )
        elif high > 0.99 * LARGEST_EXPONENT or low < 0.01 or high > 3 * max(low, 1e-9):
            said.append(f"{name} = {exponent:.2f} is not determined: its interval is [{low:.2f}, {high:.2f}].")
    low, high = interval([one.E for one in laws])
    if law.E / float(cells.loss_K.min()) < 1e-3:
        said.append(f"E = {law.E:.2g} is as good as 0: these losses show no floor.")
    elif low < 0.1 * law.E or high > 2 * max(low, 1e-9):
        said.append(f"E = {law.E:.3g} is not determined: its interval is [{low:.3g}, {high:.3g}].")
    return said


def _gain(cells: Cells, law: Law, axis: str) -> float:
    """By how much the law lowers the loss along one axis, the other at its largest value."""
    size, tokens = cells.size_K.max(), cells.tokens_K.max()
    worse = law.loss(cells.size_K.min(), tokens) if axis == "size" else law.loss(size, cells.tokens_K.min())
    return 1.0 - float(law.loss(size, tokens)) / float(worse)
