"""Fused ops of the pretraining hot path, each beside its plain PyTorch truth.

A row of a batch is int16 counts with a gain and an offset for each lead: value = gain · (x − offset), in mV or z-units.
A gain of zero is a lead that is masked or missing; it contributes nothing, whatever its samples are.

Shape suffixes: B batch, L leads, T samples, P samples of a patch, N patches, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ecgscale_kernels import reference
from ecgscale_kernels.arguments import check_conv_stem, check_input, check_patch_embed
from ecgscale_kernels.dispatch import Backend, backend, forced
from ecgscale_kernels.lead_draw import LeadDraw
from ecgscale_kernels.reference import info_nce_logits

__all__ = [
    "LONGEST_PATCH",
    "Backend",
    "LeadDraw",
    "backend",
    "forced",
    "info_nce_logits",
    "lead_masked_conv_stem",
    "lead_masked_patch_embed",
]

LONGEST_PATCH = 256  # samples, and
_MOST_LEADS = 32  # beyond which a program's share does not fit into a multiprocessor; plain PyTorch takes over


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
    """Counts -> tokens in one pass: dequantise, mask leads, and one linear map per patch of P samples.

    Equals a Conv1d of kernel and stride P on the dequantised signal. Samples that fill no patch are ignored.

    Args:
        signal_BLT: counts, int16 or floating; the samples of a lead are contiguous.
        gain_BL: what one count is worth; zero where a lead is masked or missing. NaN and infinity propagate.
        offset_BL: counts that stand for zero.
        weight_DLP: the map. Its dtype is that of the result; products are summed in float32 or wider.
        bias_D: added to every token.
        lead_draw: random lead masking on top of the zero gains, drawn where it is needed.
        lead_LD: a vector for each lead, added to every token of the rows in which that lead is kept.
        position_ND: a vector for each place, added to every token, masked ones too.
        masked_BN: bool, the tokens in whose place ``mask_token_D`` stands.
        mask_token_D: what stands there.

    Returns:
        (B, N, D) with N = T // P. Gradients flow to the weight, to all vectors, and to a floating signal that asks for
        them; not to gain and offset.

    Raises:
        ValueError: in one line, for shapes, dtypes, devices or strides that do not go together.
    """
    check_input(signal_BLT, gain_BL, offset_BL, lead_draw)
    check_patch_embed(signal_BLT, weight_DLP, bias_D, lead_LD, position_ND, masked_BN, mask_token_D)
    if _plain(signal_BLT, weight_DLP) or weight_DLP.shape[2] > LONGEST_PATCH:
        run = reference.lead_masked_patch_embed
    else:
        from ecgscale_kernels.patch_embed import lead_masked_patch_embed as run
    return run(
        signal_BLT,
        gain_BL.detach(),
        offset_BL.detach(),
        weight_DLP,
        bias_D,
        lead_draw=lead_draw,
        lead_LD=lead_LD,
        position_ND=position_ND,
        masked_BN=masked_BN,
        mask_token_D=mask_token_D,
    )


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
    """Counts -> features: dequantise, mask leads, then blocks of Conv1d(kernel 2, stride 2) and GELU.

    Block 0 has a GroupNorm with one channel per group between convolution and GELU (Oh et al. 2022).

    Args:
        signal_BLT, gain_BL, offset_BL, lead_draw: as in ``lead_masked_patch_embed``.
        weights: one (C_out, C_in, 2) per block, of one dtype, which is that of the result.
        biases: one (C_out,) or None per block.
        norm_weight_C, norm_bias_C: affine part of block 0's norm.
        norm_eps: added to its variance.

    Returns:
        (B, N, C) with N = T // 2^blocks. Samples that do not fill a patch are ignored, as a strided convolution does,
        but those of block 0 take part in its norm. Gradients flow to weights, biases and norm and to a floating signal.

    Raises:
        ValueError: in one line, for shapes, dtypes, devices or strides that do not go together.
    """
    check_input(signal_BLT, gain_BL, offset_BL, lead_draw)
    check_conv_stem(signal_BLT, weights, biases, norm_weight_C, norm_bias_C)
    # The fused stem keeps two blocks together, holds the covariance of all leads and gives no gradient of the signal.
    leads = signal_BLT.shape[1]
    if _plain(signal_BLT, weights[0]) or len(weights) < 2 or leads > _MOST_LEADS or signal_BLT.requires_grad:
        run = reference.lead_masked_conv_stem
    else:
        from ecgscale_kernels.conv_stem import lead_masked_conv_stem as run
    norm = (norm_weight_C, norm_bias_C, norm_eps)
    return run(signal_BLT, gain_BL.detach(), offset_BL.detach(), weights, biases, *norm, lead_draw=lead_draw)


def _plain(signal_BLT: Tensor, weight: Tensor) -> bool:
    """Whether plain PyTorch runs. It also takes what no kernel does: no rows, and float64."""
    wide = weight.element_size() > 4 or signal_BLT.element_size() > 4
    return wide or signal_BLT.shape[0] == 0 or backend(signal_BLT.device.type) == "reference"
