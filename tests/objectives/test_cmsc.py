"""The global loss against its definition, written out as loops, and against the reference implementation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ecgscale.objectives.cmsc import cmsc_loss


def plain_loss(embedding_BD, patient_B, segment_B, temperature: float, nt_xent: bool) -> float:
    """Over all pairs of segments of one patient: −log of the pair's share among all, in both directions.

    All are the segments of the other kind or, with ``nt_xent``, everything but the segment itself.
    """
    unit_BD = embedding_BD.double() / embedding_BD.double().norm(dim=1, keepdim=True)
    first = [b for b in range(len(segment_B)) if segment_B[b] == 0]
    second = [b for b in range(len(segment_B)) if segment_B[b] == 1]

    def likeness(a: int, b: int) -> float:
        return math.exp(float(unit_BD[a] @ unit_BD[b]) / temperature)

    def share(a: int, b: int, others: list[int]) -> float:
        return likeness(a, b) / sum(likeness(a, other) for other in others if other != a)

    terms = []
    for a in first:
        for b in second:
            if patient_B[a] == patient_B[b]:
                terms.append(-math.log(share(a, b, first + second if nt_xent else second)))
                terms.append(-math.log(share(b, a, first + second if nt_xent else first)))
    return sum(terms) / len(terms)


@settings(max_examples=40)
@given(
    patients=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    temperature=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 1000),
    nt_xent=st.booleans(),
)
def test_equals_its_definition_for_any_order_and_number_of_pairs_per_patient(patients, temperature, seed, nt_xent):
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * len(patients)
    shuffled_B = torch.randperm(rows, generator=generator)
    patient_B, segment_B = torch.tensor(patients * 2)[shuffled_B], (torch.arange(rows) // len(patients))[shuffled_B]
    embedding_BD = torch.randn(rows, 5, generator=generator)
    embedding_BD.requires_grad_(True)
    ours = cmsc_loss(embedding_BD, patient_B, segment_B, temperature, nt_xent)
    expected = plain_loss(embedding_BD.detach(), patient_B, segment_B, temperature, nt_xent)
    assert ours.item() == pytest.approx(expected, rel=1e-5, abs=2e-6)
    ours.backward()
    assert torch.isfinite(embedding_BD.grad).all(), "a single pair has no others to be set against"


def test_equals_the_reference_implementation(shared_reference):
    tensors = load_file(shared_reference / "losses.safetensors")
    expected = json.loads((shared_reference / "losses.json").read_text())["scalars"]["cmsc"]
    rows = (tensors["contrastive.embedding"], tensors["contrastive.patient_id"], tensors["contrastive.segment"])
    assert cmsc_loss(*rows, 0.1).item() == pytest.approx(expected, rel=1e-4)


def test_alike_segments_of_different_patients_score_best():
    embedding_BD = torch.eye(4).repeat(2, 1)
    patient_B, segment_B = torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4)
    right = cmsc_loss(embedding_BD, patient_B, segment_B, 0.1)
    assert right.item() == pytest.approx(math.log1p(3 * math.exp(-10)), rel=1e-3)
    wrong = cmsc_loss(embedding_BD, torch.tensor([0, 1, 2, 3, 1, 2, 3, 0]), segment_B, 0.1)
    assert wrong.item() == pytest.approx(10 + right.item(), rel=1e-3)


def test_length_of_embeddings_does_not_matter_and_zero_is_finite():
    embedding_BD = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(3).repeat(2), torch.arange(2).repeat_interleave(3)
    expected = cmsc_loss(embedding_BD, *rows, 0.1)
    torch.testing.assert_close(cmsc_loss(embedding_BD * torch.arange(1, 7)[:, None], *rows, 0.1), expected)
    embedding_BD[2] = 0
    embedding_BD.requires_grad_(True)
    loss = cmsc_loss(embedding_BD, *rows, 0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embedding_BD.grad).all()


@pytest.mark.parametrize("length", [1.0, 4.0])
@pytest.mark.parametrize(("nt_xent", "pull"), [(False, 0.5 / (1 + math.e)), (True, 1 / (2 + math.e))])
def test_the_norm_is_a_constant_in_the_gradient(nt_xent, pull, length):
    """Two patients at a right angle, segment A equal to segment B, temperature 1.

    Each segment is pushed towards the other patient and away from its own, by the same amount. If the norm carried
    gradient, the push along the segment itself would be gone.
    """
    embedding_BD = (length * torch.eye(2)).repeat(2, 1).requires_grad_(True)
    patient_B, segment_B = torch.arange(2).repeat(2), torch.arange(2).repeat_interleave(2)
    cmsc_loss(embedding_BD, patient_B, segment_B, 1.0, nt_xent).backward()
    expected_BD = pull / length * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat(2, 1)
    torch.testing.assert_close(embedding_BD.grad, expected_BD)


def test_half_precision_is_computed_in_float32():
    embedding_BD = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4)
    loss = cmsc_loss(embedding_BD, *rows, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cmsc_loss(embedding_BD.float(), *rows, 0.1), rtol=0, atol=0)
