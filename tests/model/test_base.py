"""What encoders of any kind are given, and what holds for those that say nothing of themselves."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from ecgscale.errors import InputError
from ecgscale.model import ENCODERS, Encoder, EncoderConfig, build_encoder
from ecgscale.model.base import Features, kept_values
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.objectives.masking import draw_leads


class Plain(Encoder):
    """Each sample is a token, as wide as there are leads."""

    def features(self, batch):
        token_BND = kept_values(batch).transpose(1, 2)
        return Features(token_BND, token_BND, token_BND, None)

    def contextualise(self, token_BND, valid_BN, masked_BN=None):
        return token_BND


def test_kept_values_are_millivolts_of_kept_leads(make_batch):
    signal_BLT = torch.randint(-500, 500, (3, 12, 40), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    gain_BL = torch.full((3, 12), 1e-3)
    gain_BL[0, 4] = 0
    batch = make_batch(
        signal_BLT, gain_BL=gain_BL, offset_BL=torch.full((3, 12), 7.0), length_B=torch.tensor([40, 25, 40])
    )
    value_BLT = kept_values(batch)
    torch.testing.assert_close(value_BLT[2], (signal_BLT[2] - 7.0) * 1e-3)
    assert not value_BLT[0, 4].any()
    assert value_BLT[0, 5].any()
    assert not value_BLT[1, :, 25:].any()
    masked = batch.with_lead_draw(draw_leads(batch, seed=3, probability=0.5))
    keep_BL = masked.lead_draw.keep_BL(12)
    assert 0 < keep_BL.sum() < keep_BL.numel()
    torch.testing.assert_close(kept_values(masked), value_BLT * keep_BL[..., None])


def test_an_encoder_that_says_no_more_has_no_blocks_and_masks_nothing(make_batch):
    encoder = Plain(EncoderConfig(f"{__name__}:Plain", patch_samples=1, width=12))
    assert not encoder.masks_tokens
    assert (list(encoder.blocks()), list(encoder.unused_unmasked()), list(encoder.stem_modules())) == ([], [], [])
    encoder.recompute(True)
    assert encoder.recomputed_layers == 0
    with pytest.raises(InputError, match="activation_checkpointing 1: the model has 0 layers"):
        encoder.recompute(1)
    token_BND, valid_BN = encoder(make_batch(torch.ones(2, 12, 40, dtype=torch.int16)))
    assert token_BND.shape == (2, 40, 12)
    assert valid_BN is None


def test_the_transformer_is_what_a_config_without_a_name_means(small_model_config):
    assert ModelConfig().encoder == "transformer"
    torch.manual_seed(0)
    by_name = build_encoder(small_model_config, 1)
    torch.manual_seed(0)
    by_class = ECGEncoder(small_model_config, 1)
    assert type(by_name) is ENCODERS.find("transformer") is ECGEncoder
    assert by_name.recomputed_layers == by_class.recomputed_layers == 1
    assert all(torch.equal(t, by_class.state_dict()[name]) for name, t in by_name.state_dict().items())
    depends = set(asdict(small_model_config)) - set(ModelConfig.shape_keys())
    assert depends == {"preset", "dropout", "attention_dropout", "feature_dropout", "stem_gradient_scale"}
