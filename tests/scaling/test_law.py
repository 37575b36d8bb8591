"""The fit of the scaling law: known constants come back within their intervals, and doubt is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ecgscale.scaling.law import Cells, Law, doubts, explained, fit, interval, noise, optimum, predict, resample
from ecgscale.scaling.rates import best_rate, exponent

TRUTH = Law(E=2.0, A=60.0, alpha=0.4, B=300.0, beta=0.45)


def ladder(law: Law = TRUTH, scatter: float = 0.005, seed: int = 0, sizes: int = 5, tokens: int = 5) -> Cells:
    """Two seeds of each of ``sizes`` × ``tokens``, with so much scatter of the log loss."""
    size_K, tokens_K = np.meshgrid(np.geomspace(1e4, 3e6, sizes), np.geomspace(6e4, 1e6, tokens))
    size_K, tokens_K = np.repeat(size_K.ravel(), 2), np.repeat(tokens_K.ravel(), 2)
    noise_K = np.random.default_rng(seed).normal(0, scatter, len(size_K))
    return Cells(size_K, tokens_K, law.loss(size_K, tokens_K) * np.exp(noise_K))


@pytest.fixture(scope="module")
def fitted() -> tuple[Cells, Law, list[Law]]:
    cells = ladder(seed=1)
    law = fit(cells)
    return cells, law, resample(cells, law, resamples=100)


def test_exact_losses_give_back_the_constants() -> None:
    assert fit(ladder(scatter=0.0)) == pytest.approx(TRUTH, rel=1e-2)


def test_known_constants_are_within_their_intervals_and_these_are_narrow_enough_to_tell(fitted) -> None:
    cells, law, laws = fitted
    for name in Law._fields:
        low, high = interval([getattr(one, name) for one in laws])
        assert low <= getattr(TRUTH, name) <= high, name
    low, high = interval([one.alpha for one in laws])
    assert high - low < 0.1
    assert noise(cells, law) == pytest.approx(0.005, rel=0.3)
    assert explained(cells, law) > 0.99
    assert doubts(cells, law, laws) == []


def test_a_larger_size_is_predicted(fitted) -> None:
    value, low, high = predict(*fitted, size=3e7, tokens=4e6)
    assert low <= TRUTH.loss(3e7, 4e6) <= high
    assert value == pytest.approx(TRUTH.loss(3e7, 4e6), rel=0.03)


def test_intervals_hold_what_they_promise() -> None:
    """Of 10 ladders with other noise, a 95 % interval misses the truth in more than 3 once in a thousand times."""
    missed = 0
    for seed in range(10):
        cells = ladder(seed=seed, sizes=4, tokens=4)
        law = fit(cells)
        low, high = interval([one.alpha for one in resample(cells, law, resamples=20, seed=seed)])
        missed += not low <= TRUTH.alpha <= high
    assert missed <= 3


def test_every_resample_has_as_many_different_points_as_the_law_has_constants(monkeypatch) -> None:
    """Of nine cells one draw in fifty has fewer, although it has three sizes and three token counts."""
    drawn: list[Cells] = []
    monkeypatch.setattr("ecgscale.scaling.law.fit", lambda cells, starts: drawn.append(cells) or TRUTH)
    resample(ladder(sizes=3, tokens=3), TRUTH, resamples=500)
    assert min(len({*zip(some.size_K, some.tokens_K, strict=True)}) for some in drawn) == 5
    assert all(len({*some.size_K}) == len({*some.tokens_K}) == 3 for some in drawn)


def test_an_outlier_does_not_move_the_law(fitted) -> None:
    cells, law, _ = fitted
    loss_K = cells.loss_K.copy()
    loss_K[7] *= 1.3  # a run that went wrong
    assert fit(Cells(cells.size_K, cells.tokens_K, loss_K)).alpha == pytest.approx(law.alpha, abs=0.03)


def test_the_best_spending_is_that_of_the_closed_form() -> None:
    """Hoffmann et al. 2022, equation 4, for FLOPs = 6 N D."""
    size_G, flops = np.geomspace(1e3, 1e9, 20001), 1e15
    a, b = TRUTH.beta / (TRUTH.alpha + TRUTH.beta), TRUTH.alpha / (TRUTH.alpha + TRUTH.beta)
    g = (TRUTH.alpha * TRUTH.A / (TRUTH.beta * TRUTH.B)) ** (1 / (TRUTH.alpha + TRUTH.beta))
    found = optimum(TRUTH, flops, size_G, 6 * size_G)
    assert found.size == pytest.approx(g * (flops / 6) ** a, rel=1e-3)
    assert found.tokens == pytest.approx((flops / 6) ** b / g, rel=1e-3)
    assert not found.at_edge
    assert optimum(TRUTH, flops, size_G[:5000], 6 * size_G[:5000]).at_edge


@pytest.mark.parametrize(
    ("law", "scatter", "said"),
    [
        (TRUTH._replace(A=0.0), 0.005, "flat along size"),
        (TRUTH._replace(B=0.0), 0.005, "flat along tokens"),
        (Law(3.0, 0.0, 0.4, 0.0, 0.4), 0.01, "explains only"),
        (Law(1.0, 3.0, 0.02, 20.0, 0.3), 0.01, "is not determined"),
        (TRUTH._replace(E=0.0), 0.0, "as good as 0"),
    ],
)
def test_what_is_not_determined_is_said(law: Law, scatter: float, said: str) -> None:
    cells = ladder(law, scatter)
    found = fit(cells)
    assert said in " ".join(doubts(cells, found, resample(cells, found, resamples=25)))


def test_too_few_cells_give_no_law() -> None:
    cells = ladder(sizes=2)
    assert "2 sizes, 5 token counts and 10 cells do not determine" in cells.too_few()
    with pytest.raises(ValueError, match="do not determine"):
        resample(cells, TRUTH, resamples=1)
    assert Cells(*(np.empty(0) for _ in range(3))).too_few()
    assert not ladder(sizes=3, tokens=3).too_few()


def test_the_best_rate_lies_between_those_that_were_tried() -> None:
    rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    losses = [2 + (math.log(rate) - math.log(6e-3)) ** 2 for rate in rates]
    best = best_rate(rates, losses)
    assert best.rate == pytest.approx(6e-3)
    assert not best.at_edge
    assert best_rate(rates, [*losses[:-1], math.nan]).rate == pytest.approx(6e-3)
    assert best_rate(rates, [1.0, 2, 3, 4, math.nan]) == (pytest.approx(1e-3), 1.0, True)
    assert exponent([16, 32, 64], [4e-2, 2e-2, 1e-2]) == pytest.approx(-1)
