"""The plain PyTorch truth of each op, with the signature that the fused version has.

Shape suffixes: B batch, L leads, T samples, N patches, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lead_masked_conv_stem(
    signal_BLT: Tensor,
    gain_BL: Tensor,
    offset_BL: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Counts -> features: dequantise, mask leads, then blocks of Conv1d(kernel 2, stride 2) and GELU.

    Block 0 has a GroupNorm with one channel per group between convolution and GELU (Oh et al. 2022).

    Args:
        signal_BLT: counts, int16 or floating.
        gain_BL: what one count is worth; zero where a lead is masked or missing.
        offset_BL: counts that stand for zero. Value = gain · (x − offset).
        weights: one (C_out, C_in, 2) per block. The dtype of the first is the dtype of all arithmetic but the norm's.
        biases: one (C_out,) or None per block.
        norm_weight_C, norm_bias_C: affine part of block 0's norm.

    Returns:
        (B, N, C) with N = T // 2^blocks. Samples that do not fill a patch are ignored, as a strided convolution does.
    """
    gain_BL1 = gain_BL[..., None].float()
    value_BLT = torch.addcmul(-gain_BL1 * offset_BL[..., None].float(), gain_BL1, signal_BLT.float())
    x_BTC = value_BLT.to(weights[0].dtype).transpose(1, 2)
    for block, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x_BTC = _conv_k2_s2(x_BTC, weight, bias)
        if block == 0:
            x_BTC = _norm_over_time(x_BTC, norm_weight_C, norm_bias_C, norm_eps)
        x_BTC = F.gelu(x_BTC)
    return x_BTC


def _conv_k2_s2(x_BTC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose stride is its kernel is a reshape and one matrix product."""
    batch, samples, channels = x_BTC.shape
    pairs = x_BTC[:, : samples // 2 * 2].reshape(batch, samples // 2, 2 * channels)
    return F.linear(pairs, weight.transpose(1, 2).flatten(1), bias)


def _norm_over_time(x_BTC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """GroupNorm with one channel per group, statistics in float32. Equal samples give ``bias``, never NaN."""
    x32_BTC = x_BTC.float()
    variance_B1C, mean_B1C = torch.var_mean(x32_BTC, dim=1, correction=0, keepdim=True)
    scale_B1C = torch.rsqrt(variance_B1C + eps) * weight_C.float()
    return torch.addcmul(bias_C.float() - mean_B1C * scale_B1C, x32_BTC, scale_B1C).to(x_BTC.dtype)
