"""What is hidden from the encoder, drawn per (seed, position, segment) and so the same on any number of ranks.

Shape suffixes: B rows, L leads, N tokens, M masked places, K negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.objectives.gather import lowest_of_ranks
from ecgscale.rng import Purpose
from ecgscale_kernels import LeadDraw, philox

_REFERENCE_SHARE = 0.65  # of the tokens that the spans would cover if they did not overlap


class TimeMask(NamedTuple):
    """The places of each row at which the encoder sees the mask token."""

    masked_BN: Tensor  # bool
    place_BM: Tensor  # token numbers of the masked places, in no order
    count_B: Tensor  # how many of the M are real; fewer than M only in padded rows


def draw_leads(batch: ECGBatch, seed: int, probability: float) -> LeadDraw:
    """Random lead masking drops each lead with ``probability``, independently (Oh et al. 2022)."""
    return LeadDraw(seed, Purpose.LEAD_MASK, probability, batch.segment_B, batch.position_B)


def time_mask(batch: ECGBatch, seed: int, tokens: int, valid_B: Tensor, share: float, span: int) -> TimeMask:
    """Exactly M = round(share · valid tokens) masked tokens per row, in spans.

    Distinct starts are drawn until at least M tokens are covered; then random ones are uncovered. A fixed M keeps
    shapes static, where wav2vec 2.0 trims each batch to its shortest row.
    """
    covered_at_BN = _covered_at(batch, seed, tokens, valid_B, span)
    count_B = torch.round(share * valid_B.double()).long().clamp(min=1)
    last_turn_B1 = covered_at_BN.sort(dim=1).values.gather(1, count_B[:, None] - 1)
    covered_BN = (covered_at_BN <= last_turn_B1) & (covered_at_BN < tokens)
    return _trim(batch, seed, covered_BN, count_B, masked_tokens(tokens, share))


def masked_tokens(tokens: int, share: float) -> int:
    """M: how many tokens of an unpadded row are masked."""
    return max(1, round(share * tokens))


def reference_time_mask(batch: ECGBatch, seed: int, tokens: int, valid_B: Tensor, span: int, shared: bool) -> TimeMask:
    """The rule of the reference implementation: 0.65 · tokens / span spans, then all rows trimmed to the least covered.

    The number of masked tokens depends on the whole contrast batch (``shared``: spread over the ranks), so shapes
    change from step to step.
    """
    covered_at_BN = _covered_at(batch, seed, tokens, valid_B, span)
    u_B = philox.uniform(philox.random_words(seed, Purpose.TIME_MASK_SPANS, batch.segment_B, batch.position_B, 1))[:, 0]
    spans_B = torch.floor(_REFERENCE_SHARE * valid_B / span + u_B).clamp(min=1)
    covered_BN = covered_at_BN < spans_B[:, None]
    least = lowest_of_ranks(covered_BN.sum(dim=1).min(), shared)
    return _trim(batch, seed, covered_BN, least.expand(len(valid_B)), int(least))


def _covered_at(batch: ECGBatch, seed: int, tokens: int, valid_B: Tensor, span: int) -> Tensor:
    """(B, N) float: the turn at which each token is first covered, when distinct starts take turns in random order.

    ``tokens`` for a token that never is, such as one behind the end of a padded row.
    """
    words_BN = philox.random_words(seed, Purpose.TIME_MASK_START, batch.segment_B, batch.position_B, tokens)
    token_N = torch.arange(tokens, device=valid_B.device)
    may_start_BN = token_N <= (valid_B - span).clamp(min=0)[:, None]
    key_BN = philox.uniform(words_BN).masked_fill(~may_start_BN, 2.0)
    turn_BN = key_BN.argsort(dim=1, stable=True).argsort(dim=1).float().masked_fill(~may_start_BN, tokens)
    # A token is covered once the earliest of the spans over it has had its turn.
    covered_at_BN = -F.max_pool1d(-F.pad(turn_BN, (span - 1, 0), value=float(tokens)), span, stride=1)
    return covered_at_BN.masked_fill(token_N >= valid_B[:, None], tokens)


def _trim(batch: ECGBatch, seed: int, covered_BN: Tensor, count_B: Tensor, most: int) -> TimeMask:
    """``count_B`` random ones of each row's covered tokens; places (B, most)."""
    tokens = covered_BN.shape[1]
    words_BN = philox.random_words(seed, Purpose.TIME_MASK_TRIM, batch.segment_B, batch.position_B, tokens)
    key_BN = philox.uniform(words_BN).masked_fill(~covered_BN, 2.0)
    place_BM = key_BN.argsort(dim=1, stable=True)[:, :most]  # stable: equal keys would differ between devices
    real_BM = torch.arange(most, device=count_B.device) < count_B[:, None]
    masked_BN = torch.zeros_like(covered_BN).scatter(1, place_BM, real_BM)
    return TimeMask(masked_BN, place_BM, count_B)


def negatives(batch: ECGBatch, seed: int, mask: TimeMask, count: int) -> Tensor:
    """(B, M, K) numbers in [0, M): K other masked places of the same row for each place, uniform, with repetition."""
    rows, places = mask.place_BM.shape
    words = philox.random_words(seed, Purpose.NEGATIVES, batch.segment_B, batch.position_B, places * count)
    others_B11 = (mask.count_B - 1).clamp(min=1)[:, None, None]
    drawn_BMK = philox.below(words.view(rows, places, count), others_B11)
    own_M1 = torch.arange(places, device=words.device)[:, None]
    return (drawn_BMK + (drawn_BMK >= own_M1)).clamp(max=places - 1)


def gumbel_noise(batch: ECGBatch, seed: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard Gumbel noise, float32."""
    draws = torch.Size(shape).numel()
    words = philox.random_words(seed, Purpose.GUMBEL, batch.segment_B, batch.position_B, draws)
    return -torch.log(-torch.log(philox.uniform(words))).view(-1, *shape)
