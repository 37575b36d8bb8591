"""The turned heart against NumPy and SciPy in float64, and what may not change by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives import objective_config
from ecgscale.objectives.augmentation import EIGHT, twelve_leads
from ecgscale.objectives.three_kg import ThreeKG, another_heart, rotation
from ecgscale.rng import Purpose, random_words

# x, y, z from I, II, V1..V6
INVERSE_DOWER = np.array(
    [
        [0.156, -0.009, -0.172, -0.073, 0.122, 0.231, 0.239, 0.193],
        [-0.227, 0.886, 0.057, -0.019, -0.106, -0.022, 0.040, 0.048],
        [0.021, 0.102, -0.228, -0.310, -0.245, -0.063, 0.054, 0.108],
    ]
)
SAMPLES = 1003


@pytest.fixture(scope="module")
def beats(make_batch, smooth_ecg):
    """Rows of µV counts in which the limb leads follow from I and II."""

    def make(rows: int = 6, **fields):
        eight_BET = np.stack([smooth_ecg(250, SAMPLES / 250, seed)[EIGHT] for seed in range(rows)])
        signal_BLT = twelve_leads(torch.from_numpy(1000 * eight_BET)).round().short()
        return make_batch(signal_BLT, **{"gain_BL": torch.full((rows, 12), 1e-3)} | fields)

    return make


def expected_row(value_LT: np.ndarray, position: int, seed: int, length: int) -> np.ndarray:
    """The definition, step by step, for segment 0."""
    words = random_words(seed, Purpose.VECTORCARDIOGRAM, position, 18)[0]
    drawn = ((words >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23
    turn = Rotation.from_euler("zyx", 90 * drawn[:3] - 45, degrees=True).as_matrix()
    vector_3T = np.diag(1 + drawn[3:6] / 2) @ turn @ (INVERSE_DOWER @ value_LT[EIGHT])
    one, two, *chest = np.linalg.pinv(INVERSE_DOWER) @ vector_3T
    seen_LT = np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2, *chest])
    for lead_T, start in zip(seen_LT, (drawn[6:] * length).astype(int), strict=True):
        for sample in range(start, start + length // 2):
            lead_T[sample % length] = 0
    seen_LT[:, length:] = 0
    return seen_LT


@pytest.mark.parametrize("length", [SAMPLES, 700])
def test_equals_its_definition(beats, length):
    batch = beats(length_B=torch.full((6,), length), position_B=torch.arange(6) + (1 << 34))
    seen = another_heart(batch, 9)
    for row in range(6):
        value_LT = 1e-3 * batch.signal_BLT[row].double().numpy() * (np.arange(SAMPLES) < length)
        expected_LT = torch.from_numpy(expected_row(value_LT, row + (1 << 34), 9, length)).float()
        torch.testing.assert_close(seen.signal_BLT[row], expected_LT, rtol=1e-4, atol=1e-4)
    assert not seen.offset_BL.any()
    assert (seen.gain_BL == 1).all()


def test_turns_are_about_z_then_y_then_x():
    angle_B3 = torch.rand(20, 3, dtype=torch.float64) * 6 - 3
    expected_B33 = torch.from_numpy(Rotation.from_euler("zyx", angle_B3.numpy()).as_matrix())
    torch.testing.assert_close(rotation(angle_B3), expected_B33, rtol=0, atol=1e-12)


def test_each_row_lead_and_segment_draws_for_itself_and_for_its_position_alone(beats):
    same = beats(1).signal_BLT.expand(5, -1, -1).contiguous()
    position_B, segment_B = torch.tensor([3, 2**33 + 3, 3, 900, 17]), torch.tensor([0, 0, 1, 1, 0])

    def drawn(chosen, seed=1):
        rows = beats(len(chosen), position_B=position_B[chosen], segment_B=segment_B[chosen])
        return another_heart(replace(rows, signal_BLT=same[chosen]), seed).signal_BLT

    whole = drawn([0, 1, 2, 3, 4])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 5
    for chosen in ([3], [4, 0, 2]):
        torch.testing.assert_close(drawn(chosen), whole[chosen], rtol=1e-5, atol=1e-5)
    assert not torch.equal(drawn([0], seed=2), whole[:1])


def test_half_of_each_lead_is_zeroed_in_one_circular_span(make_batch):
    """All eight leads alike, so that only what is zeroed is zero; starts are spread evenly and differ between leads."""
    length_B = torch.arange(200) % 2 * 300 + 703
    level_BLT = torch.full((200, 12, SAMPLES), 800, dtype=torch.int16)
    seen = another_heart(make_batch(level_BLT, gain_BL=torch.full((200, 12), 1e-3), length_B=length_B), 0)
    starts_at = []
    for row_LT, length in zip(seen.signal_BLT, length_B.tolist(), strict=True):
        zero_LT = row_LT[:, :length] == 0
        assert zero_LT.sum(dim=1).tolist() == [length // 2] * 12
        begins_LT = zero_LT & ~zero_LT.roll(1, dims=1)
        assert begins_LT.sum(dim=1).tolist() == [1] * 12
        starts_at.append(begins_LT.float().argmax(dim=1) / length)
    start_BL = torch.stack(starts_at)
    assert start_BL.mean() == pytest.approx(0.5, abs=0.03)
    assert start_BL.std() == pytest.approx(12**-0.5, abs=0.02)
    assert (torch.corrcoef(start_BL.T) - torch.eye(12)).abs().max() < 4.5 / 200**0.5


def test_missing_leads_stay_missing_and_rows_without_the_eight_are_not_turned(beats):
    gain_BL = torch.full((4, 12), 1e-3)
    gain_BL[1, LEADS.index("aVL")] = gain_BL[2, LEADS.index("V3")] = 0
    gain_BL[3] = 0
    whole, part = another_heart(beats(4), 0), another_heart(beats(4, gain_BL=gain_BL), 0)
    assert torch.equal(part.gain_BL, gain_BL.ne(0).float())
    assert torch.isfinite(part.signal_BLT).all()
    assert not part.signal_BLT[gain_BL == 0].any()
    there_L = gain_BL[1] != 0
    assert torch.equal(part.signal_BLT[1, there_L], whole.signal_BLT[1, there_L]), "aVL is not among the eight"
    kept_LT = part.signal_BLT[2] != 0
    plain_LT = beats(4).signal_BLT[2] * 1e-3
    assert torch.equal(part.signal_BLT[2], torch.where(kept_LT, plain_LT, 0.0)), "as it is, where it is not zeroed"
    assert not torch.equal(whole.signal_BLT[2], torch.where(kept_LT, plain_LT, 0.0))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"leads": ["I", "II", "V2"]},
            "data.leads I,II,V2 lacks V1, V3, V4, V5, V6, but objective.name 3kg needs I, II, V1, V2, V3, V4, V5, V6; "
            "leave data.leads empty or choose another objective",
        ),
        (
            {"normalisation": "zscore"},
            "data.normalisation zscore: objective.name 3kg needs mv, since leads that are scaled each by itself are no "
            "projections of one vector",
        ),
    ],
)
def test_data_without_a_vectorcardiogram_are_refused(data, said):
    config = objective_config(name="3kg")
    ThreeKG.check(ModelConfig(), config, DataConfig(leads=["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]), 500)
    with pytest.raises(InputError) as refused:
        ThreeKG.check(ModelConfig(), config, DataConfig(**data), 500)
    assert str(refused.value) == said
