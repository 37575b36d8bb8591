"""Is the noise what it says it is, in every lead, of every row, on any rank?"""

from __future__ import annotations

import pytest
import torch

from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.objectives import OBJECTIVES, objective_config
from ecgscale.objectives.augmentation import EIGHT, EIGHT_LEADS, NOISE, add_noise, as_values, normal, twelve_leads

RATE_HZ, ROWS, SAMPLES = 500.0, 128, 2500
SEGMENT_S = SAMPLES / RATE_HZ


@pytest.fixture(scope="module")
def silent(make_batch):
    """Rows of zeros, in which noise stands alone."""

    def make(rows: int = ROWS, samples: int = SAMPLES, **fields):
        return make_batch(torch.zeros(rows, 12, samples, dtype=torch.int16), **fields)

    return make


@pytest.fixture(scope="module")
def noise(silent):
    """(B, L, T) of one augmentation, made once."""
    return {name: add_noise(silent(), [name], 1, 1.0, RATE_HZ).signal_BLT for name in NOISE}


# --- what holds for each ---


@pytest.mark.parametrize("name", NOISE)
def test_einthoven_holds(noise, name):
    lead = dict(zip(LEADS, noise[name].unbind(dim=1), strict=True))
    for derived, expected in {
        "III": lead["II"] - lead["I"],
        "aVR": -(lead["I"] + lead["II"]) / 2,
        "aVL": (lead["I"] - lead["III"]) / 2,
        "aVF": (lead["II"] + lead["III"]) / 2,
    }.items():
        torch.testing.assert_close(lead[derived], expected, rtol=0, atol=1e-6, msg=derived)
    assert noise[name].dtype == torch.float32
    assert all(lead[name].abs().amax(dim=1).gt(0).all() for name in EIGHT_LEADS)


def test_the_eight_leads_stay_as_they_are():
    eight_BET = torch.arange(8.0)[None, :, None]
    assert twelve_leads(eight_BET)[:, EIGHT].equal(eight_BET)
    assert [LEADS[i] for i in EIGHT] == list(EIGHT_LEADS)


@pytest.mark.parametrize("name", NOISE)
def test_noise_stops_at_the_end_and_spares_missing_leads(silent, name):
    gain_BL = torch.ones(4, 12)
    gain_BL[1, 0] = gain_BL[2, 5:] = 0
    gain_BL[3] = 0
    length_B = torch.tensor([2500, 1000, 16, 2500])
    noisy = add_noise(silent(4, gain_BL=gain_BL, length_B=length_B), [name], 1, 1.0, RATE_HZ)
    assert torch.equal(noisy.gain_BL, gain_BL)
    assert not noisy.offset_BL.any()
    assert not noisy.signal_BLT[gain_BL == 0].any()
    for row_LT, gain_L, length in zip(noisy.signal_BLT, gain_BL, length_B, strict=True):
        assert not row_LT[:, length:].any()
        if name != "power_line":  # which is the same in I and II, and so not there in III
            assert row_LT[gain_L != 0].any(dim=1).all()


@pytest.mark.parametrize("name", NOISE)
def test_draws_depend_on_seed_position_and_segment_alone(silent, name):
    position_B, segment_B = torch.tensor([3, 2**33 + 3, 3, 900, 17]), torch.tensor([0, 0, 1, 1, 0])

    def drawn(chosen, seed=1):
        rows = silent(len(chosen), 300, position_B=position_B[chosen], segment_B=segment_B[chosen])
        return add_noise(rows, [name], seed, 1.0, RATE_HZ).signal_BLT

    whole = drawn([0, 1, 2, 3, 4])
    for chosen in ([3], [4, 0, 2], [2, 1]):  # shares of ranks, in any order
        torch.testing.assert_close(drawn(chosen), whole[chosen], rtol=0, atol=1e-7)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 5
    assert not any(torch.equal(one, other) for one, other in zip(drawn([0, 1, 2], seed=2), whole[:3], strict=True))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_is_added_with_the_probability_and_for_itself(silent, probability):
    rows = silent(400, 32)
    added = torch.stack(
        [add_noise(rows, [name], 5, probability, RATE_HZ).signal_BLT.flatten(1).any(dim=1) for name in NOISE]
    ).float()
    assert (added.mean(dim=1) - probability).abs().max() <= 4 * (probability * (1 - probability) / 400) ** 0.5
    if 0 < probability < 1:
        assert (torch.corrcoef(added) - torch.eye(len(NOISE))).abs().max() < 4.5 / 20


def test_several_add_up(silent, noise):
    together = add_noise(silent(), list(NOISE), 1, 1.0, RATE_HZ).signal_BLT
    torch.testing.assert_close(together, sum(noise.values()), rtol=0, atol=1e-6)


# --- what is special to each ---


def peaks(x_BT: torch.Tensor) -> torch.Tensor:
    """(B,) Hz."""
    return torch.fft.rfft(x_BT.double()).abs().argmax(dim=1) / SEGMENT_S


def evenly_spread(x: torch.Tensor, low: float, high: float) -> None:
    """As uniform numbers between ``low`` and ``high`` are."""
    assert x.min() >= low
    assert x.max() <= high
    share = ((x.flatten().sort().values - low) / (high - low)).double()
    expected = (torch.arange(share.numel()) + 0.5) / share.numel()
    assert (share - expected).abs().max() < 1.95 / share.numel() ** 0.5, "Kolmogorov and Smirnov at 0.1 %"


def test_mains_have_50_or_60_hz(noise):
    one_BT = noise["power_line"][:, 0]
    hz_B = peaks(one_BT)
    assert set(hz_B.tolist()) == {50.0, 60.0}
    assert 40 < int((hz_B == 50).sum()) < 88
    spectrum_BF = torch.fft.rfft(one_BT.double())
    line_B = spectrum_BF.gather(1, (hz_B * SEGMENT_S).long()[:, None])[:, 0]
    rest_BF = spectrum_BF.abs().scatter(1, (hz_B * SEGMENT_S).long()[:, None], 0)
    assert (rest_BF.amax(dim=1) < 1e-3 * line_B.abs()).all(), "nothing else"
    evenly_spread(2 * line_B.abs() / SAMPLES, 0, 0.5)
    evenly_spread(line_B.angle(), -torch.pi, torch.pi)


def test_muscle_is_white_and_as_strong_in_each_lead_as_drawn(noise):
    eight_BET = noise["emg"][:, EIGHT].double()
    deviation_BE = eight_BET.std(dim=2)
    assert deviation_BE.max() < 0.53, "what is counted of 2,500 samples scatters by 1.4 %"
    evenly_spread(deviation_BE.clamp(max=0.5), 0, 0.5)
    standard_BET = eight_BET / deviation_BE[..., None]
    assert standard_BET.mean() == pytest.approx(0, abs=4e-3)
    assert (standard_BET**3).mean() == pytest.approx(0, abs=1e-2)
    assert (standard_BET**4).mean() == pytest.approx(3, abs=3e-2)
    assert (standard_BET[..., 1:] * standard_BET[..., :-1]).mean() == pytest.approx(0, abs=4e-3)
    across_BEE = standard_BET @ standard_BET.transpose(1, 2) / SAMPLES - torch.eye(8)
    assert across_BEE.abs().max() < 0.12, "each lead has its own"


def test_box_muller_gives_two_independent_normals():
    generator = torch.Generator().manual_seed(0)
    uniform_BK = torch.rand(4, 20000, generator=generator).clamp(min=2.0**-24)
    made_BK = normal(uniform_BK)
    assert made_BK.shape == uniform_BK.shape
    assert made_BK.std() == pytest.approx(1, abs=0.01)
    first, second = made_BK.chunk(2, dim=1)
    assert (first * second).mean() == pytest.approx(0, abs=0.02)
    assert torch.isfinite(normal(torch.tensor([[2.0**-24, 1 - 2.0**-24]]))).all()


@pytest.mark.parametrize("length", [2500, 1003, 4])
def test_the_baseline_shifts_over_one_span_of_a_fifth(silent, length):
    batch = silent(length_B=torch.full((ROWS,), length))
    shifted_BET = add_noise(batch, ["baseline_shift"], 1, 1.0, RATE_HZ).signal_BLT[:, EIGHT]
    there_BET = shifted_BET != 0
    assert torch.equal(there_BET, there_BET[:, :1].expand_as(there_BET)), "in all leads at once"
    assert set(there_BET[:, 0].sum(dim=1).tolist()) == {round(0.2 * length)}
    begins_BT = there_BET[:, 0] & ~torch.nn.functional.pad(there_BET[:, 0], (1, 0))[:, :-1]
    assert (begins_BT.sum(dim=1) == 1).all(), "one span"
    step_BE = shifted_BET.sum(dim=2) / there_BET.sum(dim=2)
    torch.testing.assert_close(shifted_BET, step_BE[..., None] * there_BET, rtol=1e-5, atol=1e-6)
    evenly_spread(step_BE, -0.25, 0.25)
    if length == 2500:
        evenly_spread(begins_BT.float().argmax(dim=1), 0, 2000)


def test_the_baseline_wanders_slowly_and_by_no_more_than_half_a_millivolt(noise, silent):
    eight_BET = noise["baseline_wander"][:, EIGHT]
    assert eight_BET.abs().max() <= 0.5
    assert eight_BET.abs().max() > 0.4
    assert eight_BET.diff(dim=2).abs().max() < 0.5 * 2 * torch.pi * 0.2 / RATE_HZ + 1e-6
    minutes = add_noise(silent(32, 60_000), ["baseline_wander"], 1, 1.0, 10.0).signal_BLT[:, EIGHT]  # of 100 each
    power_BF = torch.fft.rfft(minutes[:, 0].double()).abs().square()
    hz_F = torch.fft.rfftfreq(60_000, 0.1)
    band_F = (hz_F > 0.008) & (hz_F < 0.202)
    assert (power_BF[:, band_F].sum(dim=1) / power_BF.sum(dim=1)).min() > 0.999
    evenly_spread(hz_F[power_BF.argmax(dim=1)], 0.0, 0.21)
    one, other = minutes[:, 0], minutes[:, 3]
    correlation_B = (one * other).sum(dim=1) / (one.norm(dim=1) * other.norm(dim=1))
    torch.testing.assert_close(correlation_B, torch.ones(32), rtol=0, atol=1e-4, msg="the same breath in all leads")


# --- signals in floats ---


def test_values_are_what_the_counts_stand_for(make_batch):
    counts_BLT = torch.randint(-900, 900, (3, 12, 50), generator=torch.Generator().manual_seed(0)).short()
    gain_BL, offset_BL = torch.full((3, 12), 0.5), torch.full((3, 12), 3.0)
    gain_BL[1, 4] = 0
    batch = make_batch(counts_BLT, gain_BL=gain_BL, offset_BL=offset_BL, length_B=torch.tensor([50, 50, 20]))
    values = as_values(batch)
    expected_BLT = 0.5 * (counts_BLT - 3.0)
    expected_BLT[1, 4] = expected_BLT[2, :, 20:] = 0
    assert torch.equal(values.signal_BLT, expected_BLT)
    assert torch.equal(values.gain_BL, gain_BL.ne(0).float())
    assert values.padded
    assert batch.signal_BLT.dtype == torch.int16, "the batch itself is left alone"
    again = as_values(values)
    assert torch.equal(again.signal_BLT, expected_BLT)


# --- which are added ---


@pytest.mark.parametrize("name", ["wav2vec2", "cmsc", "wav2vec2+cmsc", "3kg", "simclr"])
def test_simclr_has_noise_of_its_own_and_any_objective_may_have_some(name):
    kind = OBJECTIVES.find(name)
    assert kind.noise(objective_config(name=name)) == (tuple(NOISE) if name == "simclr" else ())
    assert kind.noise(objective_config(name=name, augmentations=["none"])) == ()
    assert kind.noise(objective_config(name=name, augmentations=["emg", "power_line"])) == ("emg", "power_line")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"augmentations": ["powerline"]}, "objective.augmentations 'powerline' is unknown; did you mean power_line?"),
        (
            {"augmentations": ["x"]},
            "objective.augmentations 'x' is unknown; known are power_line, emg, baseline_shift, "
            "baseline_wander, or none alone",
        ),
        ({"augmentations": ["emg", "emg"]}, "objective.augmentations: emg stands 2 times; give it once"),
        (
            {"augmentation_probability": 1.5},
            "objective.augmentation_probability 1.5: give a probability from 0 to 1",
        ),
    ],
)
def test_wrong_ones_are_refused(fields, said):
    with pytest.raises(InputError) as refused:
        objective_config(**fields)
    assert str(refused.value) == said
