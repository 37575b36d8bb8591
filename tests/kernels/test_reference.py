"""The plain PyTorch truth, which everything else is held against, against plainer truths and finite differences.

Shape suffixes: M places, K negatives, Q code width, G code groups; the others as in conftest.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ecgscale_kernels import forced, info_nce_logits, lead_masked_conv_stem, lead_masked_patch_embed

WIDE = {"dtype": torch.float64, "signal": torch.float64}


@pytest.fixture(autouse=True)
def reference():
    with forced("reference"):
        yield


def value_of(arguments) -> torch.Tensor:
    """gain · (x − offset), with the leads of the draw at zero."""
    keep_BL = arguments["lead_draw"].keep_BL(arguments["gain_BL"].shape[1])
    gain_BL1 = (arguments["gain_BL"] * keep_BL)[..., None].double()
    return gain_BL1 * (arguments["signal_BLT"].double() - arguments["offset_BL"][..., None])


def plain_patch_embed(arguments) -> torch.Tensor:
    patch = arguments["weight_DLP"].shape[2]
    token_BDN = F.conv1d(value_of(arguments), arguments["weight_DLP"], arguments["bias_D"], stride=patch)
    kept_BL = (arguments["gain_BL"] != 0) & arguments["lead_draw"].keep_BL(arguments["gain_BL"].shape[1])
    token_BND = token_BDN.transpose(1, 2) + torch.einsum("bl,ld->bd", kept_BL.double(), arguments["lead_LD"])[:, None]
    token_BND = torch.where(arguments["masked_BN"][..., None], arguments["mask_token_D"], token_BND)
    return token_BND + arguments["position_ND"]


def plain_conv_stem(arguments) -> torch.Tensor:
    x_BCT = value_of(arguments)
    for block, (weight, bias) in enumerate(zip(arguments["weights"], arguments["biases"], strict=True)):
        x_BCT = F.conv1d(x_BCT, weight, bias, stride=2)
        if block == 0:
            x_BCT = F.group_norm(x_BCT, len(weight), arguments["norm_weight_C"], arguments["norm_bias_C"])
        x_BCT = F.gelu(x_BCT)
    return x_BCT.transpose(1, 2)


def test_patch_embed_is_a_convolution(patch_arguments) -> None:
    for samples, patch in ((101, 7), (50, 50), (40, 1)):
        arguments = patch_arguments(3, 3, samples, patch, 9, **WIDE)
        torch.testing.assert_close(lead_masked_patch_embed(**arguments), plain_patch_embed(arguments))


def test_conv_stem_is_a_stack_of_convolutions(stem_arguments) -> None:
    for samples, channels in ((101, (6, 5, 7)), (31, (4, 4, 4, 4)), (9, (5,))):
        arguments = stem_arguments(3, 3, samples, channels=channels, **WIDE)
        torch.testing.assert_close(lead_masked_conv_stem(**arguments), plain_conv_stem(arguments))


def test_gradients_are_those_of_finite_differences(patch_arguments, stem_arguments) -> None:
    patch, stem = patch_arguments(2, 2, 11, 3, 3, **WIDE), stem_arguments(2, 2, 11, channels=(2, 3, 2), **WIDE)
    for op, arguments in ((lead_masked_patch_embed, patch), (lead_masked_conv_stem, stem)):
        arguments["gain_BL"] = arguments["gain_BL"] * 1000
        arguments["signal_BLT"] = torch.randn_like(arguments["signal_BLT"]).requires_grad_()
        arguments["offset_BL"] = torch.randn_like(arguments["offset_BL"])
        values = [one for value in arguments.values() for one in (value if isinstance(value, list) else [value])]
        asks = [one for one in values if isinstance(one, torch.Tensor) and one.requires_grad]
        assert len(asks) == (6 if op is lead_masked_patch_embed else 8)
        # gradcheck changes the tensors where they are, so that the arguments change with them.
        assert torch.autograd.gradcheck(lambda *_, op=op, arguments=arguments: op(**arguments), asks)


# --- contrastive logits ---


@pytest.fixture
def contrast(device):
    """Prediction, target, codes and negatives of two rows with 7 places; few codes, so that some are equal."""
    torch.manual_seed(0)
    prediction_BMQ, target_BMQ = torch.randn(2, 2, 7, 5, dtype=torch.float64, device=device)
    code_BMG = torch.randint(0, 2, (2, 7, 2), device=device)
    negative_BMK = torch.randint(0, 7, (2, 7, 9), device=device)
    return prediction_BMQ.requires_grad_(), target_BMQ.requires_grad_(), code_BMG, negative_BMK


def naive_logits(prediction_BMQ, target_BMQ, code_BMG, negative_BMK, temperature) -> torch.Tensor:
    """By a (B, M, K, Q) tensor of negatives."""
    row_B11 = torch.arange(len(target_BMQ), device=target_BMQ.device)[:, None, None]
    negative_BMKQ, code_BMKG = target_BMQ[row_B11, negative_BMK], code_BMG[row_B11, negative_BMK]
    candidate_BMKQ = torch.cat([target_BMQ[:, :, None], negative_BMKQ], dim=2)
    logit_BMK = F.cosine_similarity(prediction_BMQ[:, :, None], candidate_BMKQ, dim=-1) / temperature
    same_BMK = (code_BMKG == code_BMG[:, :, None]).all(dim=-1)
    return torch.cat([logit_BMK[..., :1], logit_BMK[..., 1:].masked_fill(same_BMK, -torch.inf)], dim=2)


def test_contrastive_logits_are_those_of_the_naive_form(contrast) -> None:
    found, expected = info_nce_logits(*contrast, 0.1), naive_logits(*contrast, 0.1)
    excluded_BMK = expected.isinf()
    assert excluded_BMK.any()
    assert not excluded_BMK.all(dim=2).any()
    assert not excluded_BMK[..., 0].any()
    torch.testing.assert_close(found, expected.float())
    gradients = []
    for logit_BMK in (found, expected):
        loss = F.cross_entropy(logit_BMK.flatten(0, 1), torch.zeros(14, dtype=torch.int64, device=logit_BMK.device))
        gradients.append(torch.autograd.grad(loss, contrast[:2]))
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_all_negatives_with_the_codes_of_the_target(contrast) -> None:
    """Then only the target is left: a loss of zero with finite gradients."""
    prediction_BMQ, target_BMQ, code_BMG, negative_BMK = contrast
    logit_BMK = info_nce_logits(prediction_BMQ, target_BMQ, torch.zeros_like(code_BMG), negative_BMK, 0.1)
    assert logit_BMK[..., 1:].isneginf().all()
    loss = F.cross_entropy(logit_BMK.flatten(0, 1), torch.zeros(14, dtype=torch.int64, device=logit_BMK.device))
    assert loss == 0
    assert all(one.isfinite().all() for one in torch.autograd.grad(loss, (prediction_BMQ, target_BMQ)))
