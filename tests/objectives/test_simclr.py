"""NT-Xent against its definition, written out as loops, and against the reference implementation; and the two views."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ecgscale.objectives.simclr import nt_xent_loss, two_views


def plain_loss(embedding_BD, group_B, temperature: float) -> float:
    """Over all (row, positive): −log of the positive's share among it and the rows of other groups."""
    unit_BD = embedding_BD.double() / embedding_BD.double().norm(dim=1, keepdim=True)
    rows = range(len(group_B))

    def likeness(a: int, b: int) -> float:
        return math.exp(float(unit_BD[a] @ unit_BD[b]) / temperature)

    terms = []
    for a in rows:
        negatives = sum(likeness(a, b) for b in rows if group_B[b] != group_B[a])
        for b in rows:
            if a != b and group_B[a] == group_B[b]:
                terms.append(-math.log(likeness(a, b) / (likeness(a, b) + negatives)))
    return sum(terms) / len(terms)


@settings(max_examples=40)
@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    temperature=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_equals_its_definition_for_any_order_and_size_of_groups(groups, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    shuffled_B = torch.randperm(2 * len(groups), generator=generator)
    group_B = torch.tensor(groups * 2)[shuffled_B]
    embedding_BD = torch.randn(2 * len(groups), 5, generator=generator, requires_grad=True)
    ours = nt_xent_loss(embedding_BD, group_B, temperature)
    expected = plain_loss(embedding_BD.detach(), group_B, temperature)
    assert ours.item() == pytest.approx(expected, rel=1e-5, abs=2e-6)
    ours.backward()
    assert torch.isfinite(embedding_BD.grad).all(), "a single group has no others to be set against"


@pytest.mark.parametrize(
    ("name", "group"), [("simclr_sum", [0, 0, 1, 1, 2, 2, 3, 3]), ("3kg_sum", [3, 5, 7, 9, 3, 5, 7, 9])]
)
def test_equals_the_reference_implementation(shared_reference, name, group):
    embedding_BD = load_file(shared_reference / "losses.safetensors")["contrastive.embedding"]
    expected = json.loads((shared_reference / "losses.json").read_text())["scalars"][name]
    ours = nt_xent_loss(embedding_BD, torch.tensor(group), 0.1)
    assert len(group) * ours.item() == pytest.approx(expected, rel=1e-4)


def test_pairs_are_set_against_all_other_rows():
    """With two rows in each group: the softmax over everything but the row itself."""
    embedding_BD = torch.nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    logit_BB = (embedding_BD @ embedding_BD.T / 0.1).fill_diagonal_(float("-inf"))
    expected = -logit_BB.log_softmax(dim=1)[torch.arange(8), torch.arange(8) ^ 1].mean()
    torch.testing.assert_close(nt_xent_loss(embedding_BD, torch.arange(8) // 2, 0.1), expected)


def test_zero_is_finite_and_half_precision_is_computed_in_float32():
    embedding_BD = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    embedding_BD[2] = 0
    embedding_BD.requires_grad_(True)
    loss = nt_xent_loss(embedding_BD, torch.arange(3).repeat(2), 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(embedding_BD.grad).all()
    torch.testing.assert_close(loss, nt_xent_loss(embedding_BD.float(), torch.arange(3).repeat(2), 0.1), rtol=0, atol=0)


def test_both_views_are_of_the_first_segment(make_batch):
    rows_B = torch.arange(6)
    batch = make_batch(
        rows_B[:, None, None].expand(6, 12, 20).short(),
        gain_BL=rows_B[:, None].expand(6, 12).float(),
        offset_BL=rows_B[:, None].expand(6, 12) / 2,
        length_B=14 + rows_B,
        segment_B=rows_B // 3,
        position_B=rows_B % 3 + 40,
        patient_B=rows_B % 3 + 7,
    )
    views = two_views(batch)
    assert views.signal_BLT[:, 5, 9].tolist() == [0, 1, 2, 0, 1, 2]
    assert views.signal_BLT.dtype == torch.int16
    assert views.gain_BL[:, 3].tolist() == [0, 1, 2, 0, 1, 2]
    assert views.offset_BL[:, 3].tolist() == [0, 0.5, 1, 0, 0.5, 1]
    assert views.length_B.tolist() == [14, 15, 16, 14, 15, 16]
    for kept in ("segment_B", "position_B", "patient_B"):
        assert torch.equal(getattr(views, kept), getattr(batch, kept)), kept
