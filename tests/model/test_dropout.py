"""Dropout: how much it drops, that it keeps the mean, and that it is the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from ecgscale.model.dropout import add_dropout, dropout, kept_elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_that_is_dropped(probability, dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400_001, dtype=dtype)
    y = dropout(x, probability, training=True)
    assert y.dtype == dtype
    assert float((y == 0).double().mean()) == pytest.approx(probability, abs=0.004)  # five standard deviations
    kept = y[y != 0]
    assert bool((kept == kept[0]).all())
    assert float(kept[0]) == pytest.approx(1 / (1 - probability), rel=1e-4 if dtype == torch.float32 else 2**-8)


def test_neighbours_are_dropped_independently() -> None:
    """Four elements share one random word."""
    torch.manual_seed(0)
    dropped = 1 - kept_elements(torch.empty(400_000), 0.5)[0].view(-1, 4)
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.016  # five standard deviations


@pytest.mark.parametrize("probability", [1e-9, 1 - 1e-9])
def test_extreme_probabilities_stay_finite(probability) -> None:
    assert bool(torch.isfinite(dropout(torch.ones(1000), probability, training=True)).all())


def test_the_gradient_is_dropped_where_the_value_is() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, 5), torch.randn(3, 7, 5, requires_grad=True)
    added = add_dropout(x, y, 0.3, training=True)
    (gradient,) = torch.autograd.grad(added.sum(), y)
    assert gradient.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-4)
    torch.testing.assert_close(added, x + y * gradient)


def test_nothing_is_dropped_without_training_or_probability() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    state = torch.get_rng_state()
    for probability, training in ((0.0, True), (0.5, False)):
        assert torch.equal(dropout(y, probability, training), y)
        assert torch.equal(add_dropout(x, y, probability, training), x + y)
    assert torch.equal(torch.get_rng_state(), state), "and nothing is drawn"


def test_the_seed_decides_whatever_the_threads() -> None:
    found, threads = [], torch.get_num_threads()
    try:
        for seed, number in ((3, 1), (3, 2), (4, 2)):
            torch.set_num_threads(number)
            torch.manual_seed(seed)
            found.append(dropout(torch.ones(300_003), 0.1, training=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
