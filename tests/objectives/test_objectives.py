"""What holds for every objective, and the configs that compare them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecgscale.config import PretrainConfig, load
from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.objectives import OBJECTIVES, build_objective, objective_config
from ecgscale.pretrain import masked_picture
from small_jobs import config_of, small

ABLATIONS = sorted((Path(__file__).parents[2] / "configs" / "pretrain" / "ablation").glob("*.yaml"))
PAIRS, SAMPLES = 4, 625


@pytest.fixture
def build(small_model_config):
    def make(name: str, seed: int = 3, **fields):
        torch.manual_seed(0)
        config = config_of(name, codes=8, code_width=16, negatives=10, **fields)
        model = replace(small_model_config, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0)
        return build_objective(model, config, seed, rate_hz=250)

    return make


@pytest.fixture
def batch(make_batch, smooth_ecg) -> ECGBatch:
    """Segment pairs of four patients in mV, one pair of them short."""
    mv_BLT = torch.stack([torch.from_numpy(smooth_ecg(250, SAMPLES / 250, seed)) for seed in range(2 * PAIRS)])
    pair_B = torch.arange(PAIRS).repeat(2)
    length_B = torch.where(pair_B == 2, 300, SAMPLES)
    signal_BLT = (1000 * mv_BLT).short() * (torch.arange(SAMPLES) < length_B[:, None, None])
    return make_batch(
        signal_BLT,
        gain_BL=torch.full((2 * PAIRS, 12), 1e-3),
        length_B=length_B,
        segment_B=torch.arange(2).repeat_interleave(PAIRS),
        position_B=pair_B + 100,
        patient_B=pair_B * 7,
    )


def rows_of(batch: ECGBatch, chosen: list[int]) -> ECGBatch:
    return replace(batch, **{name: value[chosen] for name, value in vars(batch).items() if torch.is_tensor(value)})


def outcome(objective, batch: ECGBatch) -> tuple[float, dict[str, torch.Tensor]]:
    objective.zero_grad()
    loss, _ = objective(batch, share=False)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def test_names_are_those_of_the_registry(build):
    with pytest.raises(InputError, match=r"^objective\.name 'simclear' is unknown; did you mean 'simclr'\? \("):
        build("simclear")
    with pytest.raises(InputError, match=r"known are wav2vec2, cmsc, wav2vec2\+cmsc, simclr, 3kg"):
        build("other")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_has_a_finite_loss_with_named_parts_and_reaches_the_encoder(build, batch, name):
    objective = build(name)
    loss, parts = objective(batch, share=False)
    assert objective.named_losses
    assert all(parts[one] > 0 for one in objective.named_losses)
    assert parts["loss"] == loss.detach()
    assert not any(part.requires_grad for part in parts.values())
    _, grads = outcome(objective, batch)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    unused = {name for name, _ in objective.named_parameters()} - grads.keys()
    assert unused == (set() if "wav2vec2" in name else {"encoder.mask.token"})
    heads = {name.split(".")[0] for name, _ in objective.named_parameters()}
    assert heads == ({"encoder", "local_head"} if "wav2vec2" in name else {"encoder"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_pairs_does_not_matter(build, batch, name):
    objective = build(name, augmentations=["emg", "power_line"])
    order = [2, 0, 3, 1]
    loss, grads = outcome(objective, batch)
    other_loss, other_grads = outcome(objective, rows_of(batch, order + [PAIRS + p for p in order]))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    largest = max(grad.norm() for grad in grads.values())
    for parameter, grad in grads.items():
        assert (other_grads[parameter] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, parameter


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_share_of_the_pairs_is_seen_as_in_the_whole(build, batch, name):
    """As on two ranks: views and lead masks of a row depend on nothing but the row."""
    objective = build(name, augmentations=["emg", "baseline_wander"])
    whole = objective.view(batch)
    for pairs in ([0, 1], [2, 3]):
        rows = pairs + [PAIRS + p for p in pairs]
        share = objective.view(rows_of(batch, rows))
        torch.testing.assert_close(share.signal_BLT, whole.signal_BLT[rows], rtol=1e-6, atol=1e-6)
        masked = objective.draw(share, share=False).lead_draw.keep_BL(12)
        assert torch.equal(masked, objective.draw(whole, share=False).lead_draw.keep_BL(12)[rows])


@pytest.mark.parametrize("name", ["simclr", "3kg"])
def test_both_views_are_of_the_first_segment_and_differ(build, batch, name):
    objective = build(name)
    other_BLT = batch.signal_BLT.clone()
    other_BLT[PAIRS:] += 500
    view = objective.view(batch)
    assert torch.equal(objective.view(replace(batch, signal_BLT=other_BLT)).signal_BLT, view.signal_BLT)
    assert not torch.equal(view.signal_BLT[:PAIRS], view.signal_BLT[PAIRS:])
    assert view.signal_BLT.dtype == torch.float32
    assert not view.signal_BLT[[2, 6], :, 300:].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_leads_are_masked_after_the_augmentations(build, batch, name):
    """The stem drops leads of a float signal too: as if they were missing in what the augmentations have made."""
    objective = build(name, augmentations=["emg"], lead_mask_probability=0.6)
    view = objective.view(batch)
    draws = objective.draw(view, share=False)
    keep_BL = draws.lead_draw.keep_BL(12)
    assert not keep_BL.all()
    loss, _ = objective.losses(view, draws, 0, share=False)
    missing, _ = objective.losses(view.with_gain(view.gain_BL * keep_BL), draws._replace(lead_draw=None), 0, False)
    torch.testing.assert_close(loss, missing)
    shown, _ = objective.losses(view, draws._replace(lead_draw=None), 0, False)
    assert abs(shown - loss) > 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_blank_recordings_are_finite(build, batch, name):
    loss, grads = outcome(build(name), batch.with_gain(torch.zeros_like(batch.gain_BL)))
    assert torch.isfinite(torch.tensor(loss))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_twins_of_another_pair_are_positives_of_3kg_and_not_of_simclr(build, batch):
    one_patient = replace(batch, patient_B=torch.zeros_like(batch.patient_B))
    assert outcome(build("3kg"), one_patient)[0] == 0, "no negatives"
    assert outcome(build("3kg"), batch)[0] > 0
    assert outcome(build("simclr"), one_patient)[0] == outcome(build("simclr"), batch)[0]


def test_the_picture_shows_the_view(build, batch):
    for name in ("wav2vec2+cmsc", "simclr", "3kg"):
        objective = build(name)
        figure = masked_picture(batch, objective, SAMPLES / 250)
        drawn = torch.from_numpy(figure.axes[7].lines[0].get_ydata())
        expected = objective.view(batch)
        expected_T = expected.gain_BL[0, 7] * (expected.signal_BLT[0, 7] - expected.offset_BL[0, 7])
        torch.testing.assert_close(drawn, expected_T.to(drawn.dtype))


@pytest.mark.parametrize(("name", "refused"), [("simclr", True), ("wav2vec2+cmsc", False), ("3kg", False)])
def test_mains_need_a_rate_that_holds_them(small_model_config, name, refused):
    def check(rate_hz: float, **fields) -> None:
        OBJECTIVES.find(name).check(small_model_config, objective_config(name, **fields), DataConfig(), rate_hz)

    check(121)
    check(100, augmentations=["emg"])
    said = (
        r"^objective\.augmentations power_line needs more than 120 Hz, the data has 100 Hz; give others, such as emg,"
    )
    with pytest.raises(InputError, match=said):
        check(100, augmentations=["power_line"])
    if refused:
        with pytest.raises(InputError, match=said):
            check(100)
    else:
        check(100)


# --- the paper's table ---


def test_every_row_of_the_table_has_a_config():
    names = {path.stem for path in ABLATIONS}
    assert names >= {"w2v", "cmsc", "w2v_cmsc", "w2v_rlm", "cmsc_rlm", "w2v_cmsc_rlm", "simclr_rlm", "three_kg"}
    for path in ABLATIONS:
        config = load(PretrainConfig, ["--config", str(path)])
        base = load(PretrainConfig, ["--config", str(path.parents[1] / "base.yaml")])
        assert replace(config, objective=base.objective) == base, "nothing but the objective differs"
        assert (config.objective.lead_mask_probability > 0) == path.stem.endswith("rlm")
        same = {"name", "lead_mask_probability"}
        for key, value in vars(config.objective).items():
            assert key in same or getattr(base.objective, key) == value, key
    assert load(PretrainConfig, ["--config", str(path.with_name("w2v_cmsc_rlm.yaml"))]) == base


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_config_builds_a_model_that_trains(batch, path):
    name = load(PretrainConfig, ["--config", str(path)]).objective.name
    options = small(f"--objective.name={name}")
    shrunk = [option for option in options if option.startswith(("--model", "--objective", "--data"))]
    config = load(PretrainConfig, ["--config", str(path), *shrunk])
    kind = OBJECTIVES.find(name)
    kind.check(config.model, config.objective, config.data, 250)
    torch.manual_seed(0)
    objective = build_objective(config.model, config.objective, config.train.seed, 250)
    assert type(objective) is kind
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # the same dropout
        optimizer.zero_grad()
        loss, _ = objective(batch, share=False)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
