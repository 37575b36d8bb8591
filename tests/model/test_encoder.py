"""The encoder's size, and what may and may not change its output."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ecgscale.errors import InputError
from ecgscale.model.base import mean_over_time, valid_tokens
from ecgscale.model.encoder import ECGEncoder, ModelConfig, _attention_in_steps


@pytest.fixture(
    scope="module", params=[{}, {"pre_norm": True}, {"stem": "patch"}], ids=["post-norm", "pre-norm", "patch stem"]
)
def encoder(request, small_model_config) -> ECGEncoder:
    torch.manual_seed(0)
    encoder = ECGEncoder(ModelConfig(**vars(small_model_config) | request.param)).eval()
    with torch.no_grad():
        for layer in encoder.layers:
            layer.query_key_value.weight *= 10  # as far from even attention as a trained one
    return encoder


@pytest.fixture
def counts(smooth_ecg):
    """(B, 12, T) int16 in µV."""

    def make(rows: int, samples: int) -> torch.Tensor:
        signal_BLT = np.stack([smooth_ecg(250, samples / 250, seed) for seed in range(rows)])
        return torch.from_numpy(np.rint(1000 * signal_BLT).astype(np.int16))

    return make


@pytest.fixture
def batch(make_batch, counts):
    """Rows of 800 samples in mV; any field may be given."""

    def make(rows: int = 2, samples: int = 800, **fields):
        gain_BL = torch.full((rows, 12), 1e-3)
        return make_batch(counts(rows, samples), **{"gain_BL": gain_BL} | fields)

    return make


def tokens_of(encoder: ECGEncoder, batch) -> torch.Tensor:
    with torch.no_grad():
        return encoder(batch)[0]


def close(a, b, atol=2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def differ(a, b) -> bool:
    return bool((a - b).abs().max() > 2e-3)


# --- size ---


@pytest.mark.parametrize("field", ["depth", "heads", "position_groups", "position_kernel", "width"])
def test_impossible_shapes_are_refused(field):
    with pytest.raises(InputError, match=rf"model\.{field} 0"):
        ModelConfig(**{field: 0})
    with pytest.raises(InputError, match=r"model\.width 100 is no multiple of model\.heads 12"):
        ModelConfig(width=100)


# --- tokens ---


@pytest.mark.parametrize("samples", [16, 47, 800, 1003])
def test_a_token_stands_for_16_samples_and_a_rest_is_left_out(encoder, batch, samples):
    token_BND, valid_BN = encoder(batch(samples=samples))
    assert token_BND.shape == (2, samples // 16, encoder.config.width)
    assert valid_BN is None
    assert torch.isfinite(token_BND).all()


def test_samples_after_the_last_whole_token_do_not_reach_the_tokens_but_for_the_norm(encoder, batch, make_batch):
    """The conv stem's norm runs over all outputs of its first block, so only the very last odd sample has no effect."""
    odd = batch(samples=1003)
    other_BLT = odd.signal_BLT.clone()
    other_BLT[..., 1002] += 5000
    close(tokens_of(encoder, odd), tokens_of(encoder, make_batch(other_BLT, gain_BL=odd.gain_BL)), atol=0)
    other_BLT[..., 1001] += 5000
    changed = differ(tokens_of(encoder, odd), tokens_of(encoder, make_batch(other_BLT, gain_BL=odd.gain_BL)))
    assert changed == (encoder.config.stem == "conv")


def test_rows_do_not_see_each_other(encoder, batch):
    three, one = batch(3), batch(1)
    close(tokens_of(encoder, three)[:1], tokens_of(encoder, one))
    assert differ(tokens_of(encoder, three)[1], tokens_of(encoder, three)[0])


# --- values and leads ---


def test_offset_takes_a_constant_out(encoder, batch, make_batch):
    plain = batch()
    moved_BL = torch.arange(-6, 6).expand(2, -1) * 1500
    moved = make_batch(
        plain.signal_BLT + moved_BL[..., None].short(), gain_BL=plain.gain_BL, offset_BL=moved_BL.float()
    )
    close(tokens_of(encoder, plain), tokens_of(encoder, moved), atol=2e-4)


def test_the_norm_over_time_takes_out_what_all_leads_share(encoder, batch, make_batch):
    """A constant of a lead moves each channel of the first block by a constant, which its norm removes."""
    plain = batch()
    moved = tokens_of(encoder, make_batch(plain.signal_BLT + 1500, gain_BL=plain.gain_BL))
    if encoder.config.stem == "conv":
        close(tokens_of(encoder, plain), moved, atol=5e-4)
    else:
        assert differ(tokens_of(encoder, plain), moved)


def test_gain_is_what_a_count_is_worth(encoder, batch, make_batch):
    plain = batch()
    finer = make_batch(plain.signal_BLT * 4, gain_BL=plain.gain_BL / 4)
    close(tokens_of(encoder, plain), tokens_of(encoder, finer))
    as_float = make_batch(plain.signal_BLT.float() / 1000)
    close(tokens_of(encoder, plain), tokens_of(encoder, as_float))


def test_leads_without_gain_have_no_effect_whatever_they_hold(encoder, batch, make_batch):
    gain_BL = torch.full((2, 12), 1e-3)
    gain_BL[0, [0, 7]], gain_BL[1, 1:] = 0, 0
    plain = batch(gain_BL=gain_BL)
    other_BLT = plain.signal_BLT.clone()
    other_BLT[gain_BL == 0] = torch.randint(-32768, 32767, other_BLT.shape, dtype=torch.int16)[gain_BL == 0]
    other = make_batch(other_BLT, gain_BL=gain_BL, offset_BL=torch.where(gain_BL == 0, 12345.0, 0.0))
    close(tokens_of(encoder, plain), tokens_of(encoder, other), atol=0)
    assert differ(tokens_of(encoder, plain), tokens_of(encoder, batch()))


def test_all_leads_masked_is_finite_with_finite_gradients(encoder, batch):
    encoder.zero_grad()
    token_BND, _ = encoder(batch(gain_BL=torch.zeros(2, 12)))
    assert torch.isfinite(token_BND).all()
    close(token_BND[0], token_BND[1])
    token_BND.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


# --- padding ---
# As in the reference implementation, the first block's norm and the positional convolution see the padding (which
# holds zeros, always); attention and the mean over time do not.


def test_a_patch_may_have_any_length(small_model_config, batch):
    encoder = ECGEncoder(ModelConfig(**vars(small_model_config) | {"stem": "patch", "patch_samples": 25})).eval()
    assert tokens_of(encoder, batch(2, 818)).shape == (2, 32, 32)
    length_B = torch.tensor([818, 99])
    valid_BN = encoder.features(batch(2, 818, length_B=length_B)).valid_BN
    assert valid_BN.sum(dim=1).tolist() == [32, 3]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stem": "linear"}, "model.stem 'linear': give conv or patch"),
        (
            {"patch_samples": 25},
            "model.patch_samples 25: the conv stem has 16; leave it out",
        ),
        ({"stem": "patch", "patch_samples": 0}, "model.patch_samples 0: give 1 or more"),
    ],
)
def test_stems_that_cannot_be(fields, said):
    with pytest.raises(InputError, match=re.escape(said)):
        ModelConfig(**fields)


def test_valid_tokens_lie_wholly_within_the_samples():
    valid_BN = valid_tokens(torch.tensor([0, 15, 16, 31, 32, 48, 64]) // 16, 3)
    assert valid_BN.sum(dim=1).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert valid_BN[4].tolist() == [True, True, False]


def test_attention_ignores_padded_tokens(encoder):
    x_BND = torch.randn(2, 20, encoder.config.width)
    valid_BN = torch.arange(20) < torch.tensor([[20], [13]])
    other_BND = torch.where(valid_BN[..., None], x_BND, 100 * torch.randn_like(x_BND))
    with torch.no_grad():
        for layer in encoder.layers:
            ours = [layer(x, valid_BN[:, None, None, :])[valid_BN] for x in (x_BND, other_BND)]
            close(*ours)
            cut = layer(x_BND[1:, :13], None)[0]
            close(layer(x_BND, valid_BN[:, None, None, :])[1, :13], cut)
            assert differ(layer(other_BND, None)[valid_BN], ours[0]), "without a mask it would not"


def test_the_mean_ignores_padded_tokens():
    x_BND = torch.arange(24.0).view(2, 4, 3)
    valid_BN = torch.tensor([[True, True, False, False], [False] * 4])
    assert mean_over_time(x_BND, valid_BN).tolist() == [[1.5, 2.5, 3.5], [0, 0, 0]]
    x_BND[0, 2:] = 1e30
    assert mean_over_time(x_BND, valid_BN)[0].tolist() == [1.5, 2.5, 3.5]
    assert mean_over_time(x_BND[:, :2].bfloat16(), None).dtype == torch.float32
    assert mean_over_time(x_BND[:, :2], None)[0].tolist() == [1.5, 2.5, 3.5]


def test_a_row_of_full_length_is_the_same_in_a_padded_batch(encoder, batch):
    alone = tokens_of(encoder, batch())
    padded = batch(length_B=torch.tensor([800, 400]))
    assert padded.padded
    token_BND, valid_BN = encoder(padded)
    assert valid_BN.sum(dim=1).tolist() == [50, 25]
    close(token_BND[0].detach(), alone[0])
    assert differ(token_BND[1, :25].detach(), alone[1, :25])


# --- masking in time ---


def test_masked_tokens_are_hidden(encoder, batch):
    with torch.no_grad():
        features = encoder.features(batch())
        masked_BN = torch.zeros(2, 50, dtype=torch.bool)
        masked_BN[:, 10:20] = True
        other_BND = torch.where(masked_BN[..., None], torch.randn_like(features.token_BND), features.token_BND)
        hidden = [encoder.contextualise(x_BND, None, masked_BN) for x_BND in (features.token_BND, other_BND)]
        close(*hidden, atol=0)
        assert differ(encoder.contextualise(other_BND, None), encoder.contextualise(features.token_BND, None))


# --- how it is computed ---


def test_bf16_is_finite_and_near_float32(encoder, batch):
    expected = tokens_of(encoder, batch())
    rounded = ECGEncoder(encoder.config).eval()
    rounded.load_state_dict(encoder.state_dict())
    token_BND = tokens_of(rounded.bfloat16(), batch())
    assert token_BND.dtype == torch.bfloat16
    assert torch.isfinite(token_BND).all()
    assert (token_BND.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_autocast_reaches_the_stem(small_model_config, batch, stem):
    encoder = ECGEncoder(ModelConfig(**vars(small_model_config) | {"stem": stem}))
    with torch.autocast("cpu", torch.bfloat16):
        feature_BNC = encoder.stem(batch())
    feature_BNC.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in encoder.stem.parameters() if p.grad is not None)
    assert torch.equal(feature_BNC, encoder.bfloat16().stem(batch()))


def test_activation_checkpointing_changes_no_gradient(small_model_config, batch):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = ECGEncoder(small_model_config, checkpointing)
        torch.manual_seed(1)
        mean_over_time(*encoder(batch())).square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert sum(float(gradient.abs().sum()) for gradient in gradients[0].values()) > 0


def test_the_stem_learns_with_scaled_gradients(small_model_config, batch):
    gradients = {}
    for scale in (1.0, 0.1, 0.0):
        torch.manual_seed(0)
        config = ModelConfig(**vars(small_model_config) | {"stem_gradient_scale": scale})
        encoder = ECGEncoder(config).eval()
        encoder(batch())[0][:, 0].square().sum().backward()
        gradients[scale] = encoder.stem.weight_0.grad, encoder.feature_projection.weight.grad
    assert gradients[1.0][0].norm() > 0
    torch.testing.assert_close(gradients[0.1][0], 0.1 * gradients[1.0][0])
    assert not gradients[0.0][0].any()
    torch.testing.assert_close(gradients[0.1][1], gradients[1.0][1])


@pytest.mark.parametrize(("asked", "recomputed"), [(False, 0), (True, 2), (0, 0), (1, 1), (2, 2)])
def test_so_many_layers_are_recomputed(small_model_config, batch, asked, recomputed):
    encoder, runs = ECGEncoder(small_model_config, asked), []
    for number, layer in enumerate(encoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    loss = mean_over_time(*encoder(batch())).square().sum()
    assert runs == [0, 1]
    loss.backward()
    assert sorted(runs) == sorted([0, 1, *range(recomputed)])


def test_more_layers_than_there_are_cannot_be_recomputed(small_model_config):
    with pytest.raises(InputError, match=r"engine\.activation_checkpointing 3: the model has 2 layers; give at most"):
        ECGEncoder(small_model_config, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_for_training_is_as_right_as_the_framework(dtype):
    """Against products and softmax written out: in bf16 both round what stands between them."""
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 21, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact = [value.detach().double().requires_grad_() for value in values]

    def results(y_BHNd, given):
        return [y_BHNd, *torch.autograd.grad(y_BHNd.square().sum(), given)]

    q_BHNd, k_BHNd, v_BHNd = values
    plain = results((q_BHNd @ k_BHNd.transpose(2, 3) / 4).softmax(dim=-1) @ v_BHNd, values)
    ours = results(_attention_in_steps(*values, 0.0), values)
    truth = results(F.scaled_dot_product_attention(*exact), exact)
    for right, theirs, mine in zip(truth, plain, ours, strict=True):
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + 1e-6 * right.norm()


def test_attention_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    q_BHNd, k_BHNd, v_BHNd = torch.randn(3, 1, 2, 5, 4)
    many = [_attention_in_steps(q_BHNd, k_BHNd, v_BHNd, 0.3) for _ in range(4000)]
    mean_BHNd = torch.stack(many).mean(dim=0)
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(mean_BHNd, F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd), rtol=0, atol=0.06)
