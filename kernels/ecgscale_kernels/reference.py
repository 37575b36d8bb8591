"""The plain PyTorch truth of each op, with the signature that the fused version has.

It is also the fast path on a CPU. There a patch embedding is fastest as a reshape and one matrix product, and the stem
as PyTorch's own convolutions (`ecgscale bench kernel` measures both).

Shape suffixes: B batch, L leads, T samples, P samples of a patch, N patches, D width, C channels, M places,
K negatives, Q code width, G code groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ecgscale_kernels.lead_draw import LeadDraw


def lead_masked_patch_embed(
    signal_BLT: Tensor,
    gain_BL: Tensor,
    offset_BL: Tensor,
    weight_DLP: Tensor,
    bias_D: Tensor | None = None,
    *,
    lead_draw: LeadDraw | None = None,
    lead_LD: Tensor | None = None,
    position_ND: Tensor | None = None,
    masked_BN: Tensor | None = None,
    mask_token_D: Tensor | None = None,
) -> Tensor:
    """Counts -> tokens: dequantise, mask leads, and one linear map per patch of P samples.

    Arguments and errors are those of the public op in ecgscale_kernels.
    """
    gain_BL = effective_gain(gain_BL, lead_draw)
    width, leads, samples = weight_DLP.shape
    value_BLT = _value(signal_BLT, gain_BL, offset_BL, weight_DLP.dtype)
    batch, patches = value_BLT.shape[0], value_BLT.shape[2] // samples  # len() would be a constant to a tracer
    patch_BLNP = value_BLT[..., : patches * samples].reshape(batch, leads, patches, samples)
    patch_BNK = patch_BLNP.transpose(1, 2).reshape(batch, patches, leads * samples)
    token_BND = F.linear(patch_BNK, weight_DLP.reshape(width, leads * samples), bias_D)
    if lead_LD is not None:
        token_BND = token_BND + (gain_BL.ne(0).to(lead_LD.dtype) @ lead_LD)[:, None]
    if masked_BN is not None:
        assert mask_token_D is not None
        token_BND = torch.where(masked_BN[..., None], mask_token_D, token_BND)
    return token_BND if position_ND is None else token_BND + position_ND


def lead_masked_conv_stem(
    signal_BLT: Tensor,
    gain_BL: Tensor,
    offset_BL: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    norm_eps: float = 1e-5,
    *,
    lead_draw: LeadDraw | None = None,
) -> Tensor:
    """Counts -> features: dequantise, mask leads, then blocks of Conv1d(kernel 2, stride 2) and GELU. As above."""
    value_BLT = _value(signal_BLT, effective_gain(gain_BL, lead_draw), offset_BL, weights[0].dtype)
    x_BCT = value_BLT
    for block, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x_BCT = F.conv1d(x_BCT, weight, bias, stride=2)
        if block == 0:
            x_BCT = torch.group_norm(x_BCT, weight.shape[0], norm_weight_C, norm_bias_C, norm_eps)
        x_BCT = F.gelu(x_BCT)
    return x_BCT.transpose(1, 2).contiguous()


def info_nce_logits(
    prediction_BMQ: Tensor, target_BMQ: Tensor, code_BMG: Tensor, negative_BMK: Tensor, temperature: float
) -> Tensor:
    """(B, M, 1 + K) cosine similarities over temperature: the own target first, then the negatives.

    All negatives of a place are masked places of the same row, so one similarity matrix per row and a gather replace
    a (B, M, K, Q) tensor. A negative with the same codes as the target is excluded (−inf).

    Args:
        prediction_BMQ: what the encoder predicts for each masked place.
        target_BMQ: the quantised target of each masked place.
        code_BMG: which code of each group the target is.
        negative_BMK: the places, numbers below M, that each place is held against.
        temperature: of the softmax that follows.
    """
    prediction_BMQ = F.normalize(prediction_BMQ.float(), dim=-1)
    target_BMQ = F.normalize(target_BMQ.float(), dim=-1)
    similarity_BMM = prediction_BMQ @ target_BMQ.transpose(1, 2) / temperature
    negative_logit_BMK = similarity_BMM.gather(2, negative_BMK)
    same_BMM = (code_BMG[:, :, None] == code_BMG[:, None, :]).all(dim=-1)
    negative_logit_BMK = negative_logit_BMK.masked_fill(same_BMM.gather(2, negative_BMK), float("-inf"))
    own_BM1 = similarity_BMM.diagonal(dim1=1, dim2=2)[..., None]
    return torch.cat([own_BM1, negative_logit_BMK], dim=-1)


def effective_gain(gain_BL: Tensor, lead_draw: LeadDraw | None) -> Tensor:
    """The gains with those of the leads that were drawn to be masked set to zero."""
    if lead_draw is None:
        return gain_BL
    return torch.where(lead_draw.keep_BL(gain_BL.shape[1]), gain_BL, 0)


def _value(signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """gain · (x − offset) in ``dtype``, computed in float32 or float64; zero where the gain is."""
    wide = torch.promote_types(torch.float32, dtype)
    gain_BL1, offset_BL1 = gain_BL[..., None].to(wide), offset_BL[..., None].to(wide)
    silent_BL1 = gain_BL1 == 0
    if signal_BLT.dtype != torch.int16:
        signal_BLT = torch.where(silent_BL1, 0, signal_BLT.to(wide))
    # Subtracted first: a difference of counts is exact, one of products is not.
    return torch.sub(signal_BLT, torch.where(silent_BL1, 0, offset_BL1)).mul_(gain_BL1).to(dtype)
