"""Is exactly what should be hidden hidden, at random, and in the same way on any number of ranks?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgscale.data.batch import ECGBatch
from ecgscale.objectives.masking import (
    TimeMask,
    draw_leads,
    gumbel_noise,
    negatives,
    reference_time_mask,
    time_mask,
)

ROWS = 512
SHARE, SPAN = 0.35, 10


@pytest.fixture(scope="module")
def rows_of(make_batch):
    """A batch of given positions and segments; no signal is needed to draw."""

    def make(positions, segments=0) -> ECGBatch:
        position_B = torch.as_tensor(positions)
        segment_B = torch.as_tensor(segments).expand(len(position_B))
        return make_batch(torch.zeros(len(position_B), 12, 0), position_B=position_B, segment_B=segment_B)

    return make


def drawn_mask(batch: ECGBatch, tokens: int = 156, valid_B=None, share=SHARE, span=SPAN, seed=0) -> TimeMask:
    valid_B = torch.full((batch.rows,), tokens) if valid_B is None else torch.as_tensor(valid_B)
    return time_mask(batch, seed, tokens, valid_B, share, span)


def draw_everything(batch: ECGBatch) -> dict[str, torch.Tensor]:
    mask = drawn_mask(batch)
    return {
        "leads": draw_leads(batch, 3, 0.5).keep_BL(12),
        "masked": mask.masked_BN,
        "places": mask.place_BM,
        "negatives": negatives(batch, 3, mask, 20),
        "noise": gumbel_noise(batch, 3, (7, 2, 5)),
    }


# --- the same on any number of ranks ---


def test_draws_depend_on_position_and_segment_alone(rows_of):
    positions = [0, 5, 2**32 + 5, 2**40, 7, 5]
    segments = [0, 0, 0, 1, 1, 1]
    whole = draw_everything(rows_of(positions, segments))
    for chosen in ([4], [5, 1], [3, 0, 2]):
        part = draw_everything(rows_of([positions[i] for i in chosen], [segments[i] for i in chosen]))
        for name, drawn in part.items():
            torch.testing.assert_close(drawn, whole[name][chosen], rtol=0, atol=0, msg=name)
    for name, drawn in whole.items():
        assert len({tuple(row.flatten().tolist()) for row in drawn}) == 6, f"{name}: each row draws for itself"


def test_the_seed_changes_every_draw(rows_of):
    batch = rows_of(range(4))
    mask = drawn_mask(batch)
    for draw in (
        lambda seed: draw_leads(batch, seed, 0.5).keep_BL(12),
        lambda seed: drawn_mask(batch, seed=seed).masked_BN,
        lambda seed: negatives(batch, seed, mask, 20),
        lambda seed: gumbel_noise(batch, seed, (3, 2)),
        lambda seed: draw_leads(batch, seed << 32, 0.5).keep_BL(12),
    ):
        assert not torch.equal(draw(1), draw(2))


# --- leads ---


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_each_lead_is_kept_with_the_complementary_probability(rows_of, probability):
    keep_BL = draw_leads(rows_of(range(4 * ROWS)), 0, probability).keep_BL(12).float()
    assert keep_BL.shape == (4 * ROWS, 12)
    assert set(keep_BL.unique().tolist()) == {0.0, 1.0}
    error = (probability * (1 - probability) / len(keep_BL)) ** 0.5
    assert (keep_BL.mean(dim=0) - (1 - probability)).abs().max() < 4 * error


def test_leads_and_the_two_segments_are_independent(rows_of):
    first_BL, second_BL = (
        draw_leads(rows_of(range(4 * ROWS), segment), 0, 0.5).keep_BL(12).float() for segment in (0, 1)
    )
    correlation = torch.corrcoef(torch.cat([first_BL, second_BL], dim=1).T)
    assert (correlation - torch.eye(24)).abs().max() < 4.5 / (4 * ROWS) ** 0.5


def test_no_masking_keeps_all(rows_of):
    assert draw_leads(rows_of(range(ROWS)), 0, 0.0).keep_BL(12).all()


# --- time ---


def check(mask: TimeMask, tokens: int, valid_B: torch.Tensor, share: float) -> None:
    """What holds for every mask."""
    expected_B = (share * valid_B.double()).round().long().clamp(min=1)
    torch.testing.assert_close(mask.count_B, expected_B)
    torch.testing.assert_close(mask.masked_BN.sum(dim=1), expected_B)
    assert mask.place_BM.shape[1] == max(1, round(share * tokens))
    for masked_N, place_M, count, valid in zip(mask.masked_BN, mask.place_BM, mask.count_B, valid_B, strict=True):
        places = place_M[:count].tolist()
        assert sorted(places) == masked_N.nonzero().flatten().tolist(), "each place once"
        assert max(places) < valid, "only real tokens"


def test_exactly_the_share_is_masked(rows_of):
    mask = drawn_mask(rows_of(range(ROWS)))
    assert mask.place_BM.shape == (ROWS, 55)
    check(mask, 156, torch.full((ROWS,), 156), SHARE)


def test_of_padded_rows_only_real_tokens_are_masked_and_in_proportion(rows_of):
    valid_B = torch.tensor([156, 155, 100, 62, 20, 11, 10, 9, 3, 2, 1])
    mask = drawn_mask(rows_of(range(len(valid_B))), valid_B=valid_B)
    check(mask, 156, valid_B, SHARE)
    assert mask.count_B.tolist() == [55, 54, 35, 22, 7, 4, 4, 3, 1, 1, 1]


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 60),
    share=st.floats(0.01, 0.95),
    span=st.integers(1, 20),
    position=st.integers(0, 2**62),
    data=st.data(),
)
def test_any_shape(make_batch, tokens, share, span, position, data):
    valid_B = torch.tensor(data.draw(st.lists(st.integers(1, tokens), min_size=1, max_size=4)))
    position_B = position + torch.arange(len(valid_B))
    batch = make_batch(torch.zeros(len(valid_B), 12, 0), position_B=position_B)
    check(drawn_mask(batch, tokens, valid_B, share, span), tokens, valid_B, share)


@pytest.mark.parametrize(("share", "tokens", "places"), [(0.15, 190, 28), (0.07, 150, 11), (0.5, 5, 2), (0.5, 7, 4)])
def test_a_share_that_ends_in_a_half_is_rounded_alike_everywhere(rows_of, share, tokens, places):
    mask = drawn_mask(rows_of(range(16)), tokens, share=share)
    assert mask.place_BM.shape[1] == places
    assert mask.count_B.tolist() == [places] * 16
    assert mask.masked_BN.sum(dim=1).tolist() == [places] * 16
    assert not (negatives(rows_of(range(16)), 0, mask, 50) == torch.arange(places)[:, None]).any()


def run_lengths(masked_BN: torch.Tensor) -> float:
    """Mean number of masked tokens in a row without a gap."""
    begins_BN = masked_BN & ~torch.nn.functional.pad(masked_BN, (1, 0))[:, :-1]
    return float(masked_BN.sum() / begins_BN.sum())


def test_masks_come_in_spans(rows_of):
    batch = rows_of(range(ROWS))
    assert run_lengths(drawn_mask(batch).masked_BN) > 3
    assert run_lengths(drawn_mask(batch, span=1).masked_BN) < 2, "35 % at random: 1 / 0.65"
    whole_spans = drawn_mask(batch, tokens=150, share=10 / 150).masked_BN
    assert run_lengths(whole_spans) == 10, "a single span needs no trimming"


def test_every_token_is_masked_about_as_often(rows_of):
    share_N = drawn_mask(rows_of(range(8 * ROWS))).masked_BN.float().mean(dim=0)
    assert share_N.mean() == pytest.approx(55 / 156)
    inner_N = share_N[SPAN - 1 : -SPAN + 1]
    assert (inner_N / inner_N.mean() - 1).abs().max() < 0.12
    # Fewer spans lie over the edges: the first token is covered by one start out of ten.
    assert (share_N[0] < inner_N.min() / 2) & (share_N[-1] < inner_N.min() / 2)
    assert abs(share_N[0] - share_N[-1]) < 0.03


# --- time, by the reference's rule ---


def test_the_reference_rule_trims_every_row_to_the_least_covered(rows_of):
    valid_B = torch.full((128,), 156)
    counts = []
    for first in range(0, 1024, 128):
        batch = rows_of(range(first, first + 128))
        mask = reference_time_mask(batch, 0, 156, valid_B, SPAN, shared=False)
        assert len(set(mask.count_B.tolist())) == 1
        assert mask.place_BM.shape == (128, mask.count_B[0])
        torch.testing.assert_close(mask.masked_BN.sum(dim=1), mask.count_B)
        sorted_BM = mask.place_BM.sort(dim=1).values
        assert torch.equal(sorted_BM, mask.masked_BN.nonzero()[:, 1].view(128, -1)), "each place once"
        counts.append(int(mask.count_B[0]))
    assert 51 <= sum(counts) / len(counts) <= 58, "what the reference arrives at"
    assert len(set(counts)) > 1
    assert run_lengths(mask.masked_BN) > 3


def test_the_reference_rule_covers_about_half_before_it_trims(rows_of):
    masks = [reference_time_mask(rows_of([p]), 0, 156, torch.tensor([156]), SPAN, shared=False) for p in range(300)]
    covered = [int(mask.count_B) for mask in masks]
    assert sum(covered) / len(covered) == pytest.approx(77, abs=1.5)
    assert {count for count in covered if count > 10 * 11} == set(), "at most eleven spans"
    assert min(run_lengths(mask.masked_BN) for mask in masks) >= 10, "whole spans, where nothing is trimmed"


def test_the_reference_rule_rounds_the_number_of_spans_at_random(rows_of):
    """0.65 · 5 = 3.25 spans of one token: four in a quarter of the rows."""
    masks = [reference_time_mask(rows_of([p]), 0, 5, torch.tensor([5]), 1, shared=False) for p in range(400)]
    counts = [int(mask.count_B) for mask in masks]
    assert set(counts) == {3, 4}
    assert sum(counts) / len(counts) == pytest.approx(3.25, abs=0.09)


def test_the_reference_rule_masks_real_tokens_alone(rows_of):
    valid_B = torch.tensor([156, 100, 30, 12])
    mask = reference_time_mask(rows_of(range(4)), 0, 156, valid_B, SPAN, shared=False)
    assert 0 < mask.count_B[0] <= 12
    assert not (mask.masked_BN & (torch.arange(156) >= valid_B[:, None])).any()
    torch.testing.assert_close(mask.masked_BN.sum(dim=1), mask.count_B)


# --- negatives ---


def test_negatives_are_other_places_all_equally_likely(rows_of):
    batch = rows_of(range(64))
    mask = drawn_mask(batch)
    negative_BMK = negatives(batch, 0, mask, 100)
    assert negative_BMK.shape == (64, 55, 100)
    assert not (negative_BMK == torch.arange(55)[:, None]).any(), "never the own place"
    count_MM = torch.zeros(55, 55).scatter_add_(
        1, negative_BMK.transpose(0, 1).reshape(55, -1), torch.ones(55, 64 * 100)
    )
    others = count_MM[~torch.eye(55, dtype=torch.bool)]
    expected = 64 * 100 / 54
    assert (others - expected).abs().max() < 5 * expected**0.5
    assert ((others - expected) ** 2 / expected).mean() == pytest.approx(1, abs=0.1), "no more even than chance"


def test_negatives_of_padded_rows_are_real_places(rows_of):
    batch = rows_of(range(5))
    mask = drawn_mask(batch, valid_B=[156, 62, 10, 6, 3])
    negative_BMK = negatives(batch, 0, mask, 200)
    assert negative_BMK.min() >= 0
    assert negative_BMK.max() < 55
    for row, count in zip(negative_BMK, mask.count_B.tolist(), strict=True):
        real_MK = row[:count]
        if count > 1:
            assert real_MK.max() == count - 1
            assert not (real_MK == torch.arange(count)[:, None]).any()
    assert mask.count_B.tolist() == [55, 22, 4, 2, 1]


# --- noise ---


def test_gumbel_noise_has_gumbel_moments(rows_of):
    noise = gumbel_noise(rows_of(range(64)), 0, (55, 2, 40))
    assert noise.shape == (64, 55, 2, 40)
    assert noise.dtype == torch.float32
    assert torch.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.57722, abs=0.01)
    assert noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    assert (noise < 0.36651).float().mean() == pytest.approx(0.5, abs=0.01), "median −log(log 2)"
