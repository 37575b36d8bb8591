"""The kernels mask the leads that ``LeadDraw`` says, and numpy draws the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecgscale.rng import Purpose, random_words
from ecgscale_kernels import LeadDraw, forced, lead_masked_conv_stem, lead_masked_patch_embed

pytest.importorskip("triton")

SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**62)


@pytest.fixture(scope="session")
def kept_by_kernels(device):
    """(draw, leads) -> (B, L) bool from the forward and from the backward.

    All samples are 1, and a token is as wide as there are leads or rows. In the forward number l of a row's one token
    is lead l. In the backward only number b of row b's token has a gradient, so row b of the weight's is its leads.
    """

    def kept(draw: LeadDraw, leads: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(draw.position_B)
        one_BL = torch.ones(rows, leads, device=device)
        width = max(rows, leads)
        weight_DL1 = torch.eye(width, device=device)[:, :leads, None].requires_grad_()
        with forced("triton"):
            token_B1D = lead_masked_patch_embed(one_BL[..., None], one_BL, 0 * one_BL, weight_DL1, lead_draw=draw)
        token_B1D.backward(torch.eye(width, device=device)[:rows, None])
        found = token_B1D[:, 0, :leads].detach(), weight_DL1.grad[:rows, :, 0]
        assert all(set(one.unique().tolist()) <= {0, 1} for one in found)
        return found[0] == 1, found[1] == 1

    return kept


def some_rows(device, seed, purpose, probability, segments, positions) -> LeadDraw:
    segment_B, position_B = (torch.tensor(row, device=device) for row in (segments, positions))
    return LeadDraw(seed, purpose, probability, segment_B, position_B)


@settings(max_examples=10)
@given(
    SEEDS,
    st.lists(st.tuples(st.integers(0, 1), POSITIONS), min_size=1, max_size=3),
    st.sampled_from(Purpose),
    st.integers(1, 17),
    st.floats(0, 1),
)
@example(2**64 - 1, [(1, 2**62), (0, 2**32), (1, 2**32 - 1), (0, 0)], Purpose.LEAD_MASK, 12, 0.5)
@example(2**63, [(0, 2**31)], Purpose.LEAD_MASK, 12, 0.5)
@example(2**31, [(0, 1)], Purpose.SHARD_ORDER, 12, 0.5)
@example(1, [(0, 16)], Purpose.ROTATION, 12, 1e-40)
def test_kernels_torch_and_numpy_draw_the_same(device, kept_by_kernels, seed, rows, purpose, leads, probability):
    segments, positions = zip(*rows, strict=True)
    draw = some_rows(device, seed, int(purpose), probability, segments, positions)
    words_BL = np.concatenate([random_words(seed, purpose, [at], leads, segment) for segment, at in rows])
    uniform_BL = (np.float32(words_BL >> 9) + np.float32(0.5)) * np.float32(2**-23)
    expected = (uniform_BL >= np.float32(probability)).tolist()
    assert draw.keep_BL(leads).tolist() == expected
    assert [kept.tolist() for kept in kept_by_kernels(draw, leads)] == [expected, expected]


def test_a_draw_as_large_as_the_probability_is_kept(device, kept_by_kernels) -> None:
    """In float32, whichever float64 is asked for: the next larger one masks the lead."""
    uniform = float((np.float32(random_words(5, 4, [9], 1)[0, 0] >> 9) + np.float32(0.5)) * np.float32(2**-23))
    larger = float(np.nextafter(np.float32(uniform), np.float32(1)))
    for probability, kept in ((uniform, True), (np.nextafter(uniform, 1), True), (larger, False)):
        draw = some_rows(device, 5, 4, float(probability), [0], [9])
        assert draw.keep_BL(1).item() == kept
        assert [found.item() for found in kept_by_kernels(draw, 1)] == [kept, kept]


@pytest.mark.parametrize("op", [lead_masked_patch_embed, lead_masked_conv_stem])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain_draws(run, patch_arguments, stem_arguments, op, probability) -> None:
    """Probability 0 is no draw, and 1 is a gain of zero everywhere, bit for bit."""
    arguments = patch_arguments(2, 3, 50, 7, 9) if op is lead_masked_patch_embed else stem_arguments(2, 3, 53)
    drawn = arguments | {"lead_draw": arguments["lead_draw"]._replace(probability=probability)}
    plain = arguments | {"lead_draw": None, "gain_BL": arguments["gain_BL"] * (1 - probability)}
    found, expected = (run(op, given, "triton") for given in (drawn, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
