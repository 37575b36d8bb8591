"""``lead_masked_patch_embed`` in Triton: counts are dequantised, masked and embedded in one pass.

A program makes the tokens of some patches of one row: it walks over the row's kept leads only, so that a masked lead
costs neither loads nor arithmetic. The weight's gradient is one matrix product over all tokens, cut into a fixed number
of shares that are added in a fixed order, hence the same bits in every run.

Shape suffixes: B batch, L leads, T samples, P samples of a patch, N patches, D width, K columns (lead, sample).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgscale_kernels.lead_draw import LeadDraw
from ecgscale_kernels.reference import effective_gain
from ecgscale_kernels.triton_parts import PROGRAMS, Draw, Launch, arithmetic, cdiv, kept_gain, power_of_two


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
    """As the reference."""
    embedding = (weight_DLP, bias_D, lead_LD, position_ND, masked_BN, mask_token_D)
    token_BND: Tensor = torch.ops.ecgscale.patch_embed(
        signal_BLT, gain_BL.contiguous(), offset_BL.contiguous(), *embedding, *Draw.of(lead_draw)
    )
    return token_BND


# -- launches --------------------------------------------------------------------------------------------------------


def _forward_launch(dtype: torch.dtype, patches: int, width: int, patch: int) -> Launch:
    block_p = power_of_two(patch)
    if block_p > 64 or dtype == torch.float32:
        block_n, block_d = 32, 32
    else:
        block_n, block_d = 64, 128 if block_p > 16 else 256
    return {
        "BLOCK_N": min(block_n, power_of_two(patches)), "BLOCK_D": min(block_d, power_of_two(width)),
        "num_warps": 4 if dtype == torch.float32 else 8, "num_stages": 3 if block_p <= 64 else 2,
    }  # fmt: skip


def _weight_grad_launch(dtype: torch.dtype, patches: int, width: int, columns: int) -> Launch:
    block_d = 32 if dtype == torch.float32 else 128
    return {
        "BLOCK_N": min(32, power_of_two(patches)), "BLOCK_D": min(block_d, power_of_two(width)),
        "BLOCK_K": min(64, power_of_two(columns)), "programs": PROGRAMS, "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def _signal_grad_launch(dtype: torch.dtype, patches: int, width: int, patch: int) -> Launch:
    block = 64 if power_of_two(patch) <= 64 and dtype != torch.float32 else 32
    return {"BLOCK_N": min(block, power_of_two(patches)), "BLOCK_D": min(block, power_of_two(width)), "num_warps": 4}


# Chosen by dtype and sizes alone and never by timing, so that every run gives the same bits, and so that no registers
# spill in bf16 and fp16 on sm_80 and sm_90 with Triton 3.6 to 3.9.
LAUNCH: dict[str, Callable[..., Launch]] = {
    "forward": _forward_launch,
    "weight_grad": _weight_grad_launch,
    "signal_grad": _signal_grad_launch,
}


# -- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    signal_ptr, gain_ptr, offset_ptr, weight_ptr, bias_ptr, lead_ptr, place_ptr, masked_ptr, mask_token_ptr, token_ptr,
    stride_b, stride_l, leads, patches, width,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    PATCH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LEAD: tl.constexpr, HAS_PLACE: tl.constexpr, HAS_MASK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(patches, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    n_N = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p_P, l_L = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_L)
    gain_L = kept_gain(
        gain_ptr, l_L, l_L < leads, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW
    )
    keep_L = gain_L != 0.0
    turn_L = tl.cumsum(keep_L.to(tl.int32), 0) - 1
    token_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    added_D = tl.zeros((BLOCK_D,), tl.float32)
    for turn in range(tl.sum(keep_L.to(tl.int32), 0)):
        here_L = keep_L & (turn_L == turn)
        lead, gain = tl.sum(tl.where(here_L, l_L, 0), 0), tl.sum(tl.where(here_L, gain_L, 0.0), 0)
        offset = tl.load(offset_ptr + row * leads + lead).to(tl.float32)
        there_NP = (n_N < patches)[:, None] & (p_P < PATCH)[None, :]
        sample_NP = signal_ptr + row * stride_b + lead.to(tl.int64) * stride_l + n_N[:, None] * PATCH + p_P[None, :]
        x_NP = tl.load(sample_NP, mask=there_NP, other=0.0).to(tl.float32)
        value_NP = tl.where(there_NP, (x_NP - offset) * gain, 0.0)
        weight_DP = tl.load(
            weight_ptr + d_D[:, None] * (leads * PATCH) + lead * PATCH + p_P[None, :],
            mask=(d_D < width)[:, None] & (p_P < PATCH)[None, :],
            other=0.0,
        )
        token_ND = tl.dot(value_NP.to(DOT), tl.trans(weight_DP.to(DOT)), token_ND, input_precision=PRECISION)
        if HAS_LEAD:
            added_D += tl.load(lead_ptr + lead * width + d_D, mask=d_D < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added_D += tl.load(bias_ptr + d_D, mask=d_D < width, other=0.0).to(tl.float32)
    token_ND += added_D[None, :]
    if HAS_MASK:
        masked_N = tl.load(masked_ptr + row * patches + n_N, mask=n_N < patches, other=0)
        mask_token_D = tl.load(mask_token_ptr + d_D, mask=d_D < width, other=0.0).to(tl.float32)
        token_ND = tl.where((masked_N != 0)[:, None], mask_token_D[None, :], token_ND)
    there_ND = (n_N < patches)[:, None] & (d_D < width)[None, :]
    if HAS_PLACE:
        place_ND = tl.load(place_ptr + n_N[:, None] * width + d_D[None, :], mask=there_ND, other=0.0)
        token_ND += place_ND.to(tl.float32)
    out_ND = token_ptr + (row * patches + n_N[:, None]) * width + d_D[None, :]
    tl.store(out_ND, token_ND.to(token_ptr.dtype.element_ty), mask=there_ND)


@torch.library.custom_op("ecgscale::patch_embed", mutates_args=())
def _patch_embed(
    signal: Tensor, gain: Tensor, offset: Tensor,
    weight: Tensor, bias: Tensor | None, lead: Tensor | None, place: Tensor | None, masked: Tensor | None,
    mask_token: Tensor | None,
    seed: int, purpose: int, probability: float, segment: Tensor | None, position: Tensor | None,
) -> Tensor:  # fmt: skip
    (batch, leads, samples), (width, _, patch) = signal.shape, weight.shape
    patches = samples // patch
    token_BND = signal.new_empty((batch, patches, width), dtype=weight.dtype)
    launch = LAUNCH["forward"](weight.dtype, patches, width, patch)
    _forward_kernel[(batch * cdiv(patches, launch["BLOCK_N"]), cdiv(width, launch["BLOCK_D"]))](
        signal, gain, offset, weight.contiguous(), _contiguous(bias), _contiguous(lead), _contiguous(place),
        _contiguous(masked), _contiguous(mask_token), token_BND,
        signal.stride(0), signal.stride(1), leads, patches, width,
        **Draw(seed, purpose, probability, segment, position).arguments(),
        PATCH=patch, BLOCK_L=power_of_two(leads), BLOCK_P=power_of_two(patch),
        HAS_BIAS=bias is not None, HAS_LEAD=lead is not None, HAS_PLACE=place is not None, HAS_MASK=masked is not None,
        **arithmetic(weight.dtype), **launch,
    )  # fmt: skip
    return token_BND


@_patch_embed.register_fake
def _(
    signal, gain, offset, weight, bias, lead, place, masked, mask_token, seed, purpose, probability, segment, position
):
    return signal.new_empty((signal.shape[0], signal.shape[2] // weight.shape[2], weight.shape[0]), dtype=weight.dtype)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# -- gradient of the weight ------------------------------------------------------------------------------------------


@triton.jit
def _weight_grad_kernel(
    signal_ptr, gain_ptr, offset_ptr, masked_ptr, grad_ptr, weight_ptr, bias_ptr,
    stride_b, stride_l, batch, leads, patches, width,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    PATCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_MASK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    share, shares = tl.program_id(2), tl.num_programs(2)
    lead_K, p_K, there_K = k_K // PATCH, k_K % PATCH, k_K < leads * PATCH
    weight_DK = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    bias_D = tl.zeros((BLOCK_D,), tl.float32)
    for number in range(batch * share // shares, batch * (share + 1) // shares):
        row = tl.cast(number, tl.int64)
        gain_K = kept_gain(
            gain_ptr, lead_K, there_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW
        )
        keep_K = gain_K != 0.0
        offset_K = tl.load(offset_ptr + row * leads + lead_K, mask=keep_K, other=0.0).to(tl.float32)
        for first in range(0, patches, BLOCK_N):
            n_N = first + tl.arange(0, BLOCK_N)
            live_N = n_N < patches
            if HAS_MASK:
                live_N &= tl.load(masked_ptr + row * patches + n_N, mask=live_N, other=1) == 0
            grad_ND = tl.load(
                grad_ptr + (row * patches + n_N[:, None]) * width + d_D[None, :],
                mask=live_N[:, None] & (d_D < width)[None, :],
                other=0.0,
            )
            there_NK = live_N[:, None] & keep_K[None, :]
            sample_K = signal_ptr + row * stride_b + lead_K.to(tl.int64) * stride_l + p_K
            x_NK = tl.load(sample_K[None, :] + n_N[:, None] * PATCH, mask=there_NK, other=0.0).to(tl.float32)
            # Zero where nothing was loaded. As tl.where, Triton 3.9 fails to compile it for sm_80 and up to 16 patches.
            value_NK = (x_NK - live_N.to(tl.float32)[:, None] * offset_K[None, :]) * gain_K[None, :]
            weight_DK = tl.dot(tl.trans(grad_ND.to(DOT)), value_NK.to(DOT), weight_DK, input_precision=PRECISION)
            bias_D += tl.sum(grad_ND.to(tl.float32), 0)
    out_DK = weight_ptr + (share * width + d_D[:, None]) * (leads * PATCH) + k_K[None, :]
    tl.store(out_DK, weight_DK, mask=(d_D < width)[:, None] & there_K[None, :])
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + share * width + d_D, bias_D, mask=d_D < width)


@torch.library.custom_op("ecgscale::patch_embed_weight_grad", mutates_args=())
def _weight_grad(
    signal: Tensor, gain: Tensor, offset: Tensor, masked: Tensor | None, grad: Tensor, patch: int,
    seed: int, purpose: int, probability: float, segment: Tensor | None, position: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, leads, _), (_, patches, width) = signal.shape, grad.shape
    launch = LAUNCH["weight_grad"](grad.dtype, patches, width, leads * patch)
    tiles = (cdiv(width, launch["BLOCK_D"]), cdiv(leads * patch, launch["BLOCK_K"]))
    shares = min(batch, cdiv(launch.pop("programs"), tiles[0] * tiles[1]))
    weight_SDLP = grad.new_empty((shares, width, leads, patch), dtype=torch.float32)
    bias_SD = grad.new_empty((shares, width), dtype=torch.float32)
    _weight_grad_kernel[(*tiles, shares)](
        signal, gain, offset, _contiguous(masked), grad, weight_SDLP, bias_SD,
        signal.stride(0), signal.stride(1), batch, leads, patches, width,
        **Draw(seed, purpose, probability, segment, position).arguments(),
        PATCH=patch, HAS_MASK=masked is not None, **arithmetic(grad.dtype), **launch,
    )  # fmt: skip
    return weight_SDLP.sum(0).to(grad.dtype), bias_SD.sum(0).to(grad.dtype)


@_weight_grad.register_fake
def _(signal, gain, offset, masked, grad, patch, seed, purpose, probability, segment, position):
    return grad.new_empty((grad.shape[2], signal.shape[1], patch)), grad.new_empty((grad.shape[2],))


# -- gradient of the signal ------------------------------------------------------------------------------------------


@triton.jit
def _signal_grad_kernel(
    gain_ptr, masked_ptr, grad_ptr, weight_ptr, out_ptr,
    leads, samples, patches, width,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    PATCH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(patches, BLOCK_N)
    row, lead = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    n_N = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    p_P, l_L = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_L)
    gain_L = kept_gain(
        gain_ptr, l_L, l_L < leads, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW
    )
    gain = tl.sum(tl.where(l_L == lead, gain_L, 0.0), 0)
    if gain != 0.0:
        live_N = n_N < patches
        if HAS_MASK:
            live_N &= tl.load(masked_ptr + row * patches + n_N, mask=live_N, other=1) == 0
        slope_NP = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        for first in range(0, width, BLOCK_D):
            d_D = first + tl.arange(0, BLOCK_D)
            grad_ND = tl.load(
                grad_ptr + (row * patches + n_N[:, None]) * width + d_D[None, :],
                mask=live_N[:, None] & (d_D < width)[None, :],
                other=0.0,
            )
            weight_DP = tl.load(
                weight_ptr + d_D[:, None] * (leads * PATCH) + lead * PATCH + p_P[None, :],
                mask=(d_D < width)[:, None] & (p_P < PATCH)[None, :],
                other=0.0,
            )
            slope_NP = tl.dot(grad_ND.to(DOT), weight_DP.to(DOT), slope_NP, input_precision=PRECISION)
        out_NP = out_ptr + (row * leads + lead) * samples + n_N[:, None] * PATCH + p_P[None, :]
        there_NP = (n_N < patches)[:, None] & (p_P < PATCH)[None, :]
        tl.store(out_NP, (slope_NP * gain).to(out_ptr.dtype.element_ty), mask=there_NP)


@torch.library.custom_op("ecgscale::patch_embed_signal_grad", mutates_args=())
def _signal_grad(
    signal: Tensor, gain: Tensor, masked: Tensor | None, grad: Tensor, weight: Tensor,
    seed: int, purpose: int, probability: float, segment: Tensor | None, position: Tensor | None,
) -> Tensor:  # fmt: skip
    (batch, leads, samples), (width, _, patch) = signal.shape, weight.shape
    patches = samples // patch
    out_BLT = signal.new_zeros((batch, leads, samples))
    launch = LAUNCH["signal_grad"](grad.dtype, patches, width, patch)
    _signal_grad_kernel[(batch * cdiv(patches, launch["BLOCK_N"]), leads)](
        gain, _contiguous(masked), grad, weight.contiguous(), out_BLT, leads, samples, patches, width,
        **Draw(seed, purpose, probability, segment, position).arguments(),
        PATCH=patch, BLOCK_L=power_of_two(leads), BLOCK_P=power_of_two(patch),
        HAS_MASK=masked is not None, **arithmetic(grad.dtype), **launch,
    )  # fmt: skip
    return out_BLT


@_signal_grad.register_fake
def _(signal, gain, masked, grad, weight, seed, purpose, probability, segment, position):
    return signal.new_empty(signal.shape)


# -- autograd --------------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    signal, gain, offset, weight, _, _, _, masked, _, *draw = inputs
    ctx.save_for_backward(signal, gain, offset, weight, masked, *draw[3:])
    ctx.draw = draw[:3]


def _backward(ctx, grad_BND):
    signal, gain, offset, weight, masked, *rows = ctx.saved_tensors
    draw = Draw(*ctx.draw, *rows)
    grad_BND = grad_BND.contiguous()
    for_signal, _, _, for_weight, for_bias, for_lead, for_place, _, for_mask_token, *_ = ctx.needs_input_grad
    signal_grad = weight_grad = bias_grad = lead_grad = place_grad = mask_token_grad = None
    if for_weight or for_bias:
        weight_grad, bias_grad = torch.ops.ecgscale.patch_embed_weight_grad(
            signal, gain, offset, masked, grad_BND, weight.shape[2], *draw
        )
    if for_signal:
        signal_grad = torch.ops.ecgscale.patch_embed_signal_grad(signal, gain, masked, grad_BND, weight, *draw)
    if for_place:
        place_grad = grad_BND.sum(0, dtype=torch.float32).to(grad_BND.dtype)
    if for_mask_token:
        hidden_BND = grad_BND.masked_fill(~masked[..., None], 0)
        mask_token_grad = hidden_BND.sum((0, 1), dtype=torch.float32).to(grad_BND.dtype)
    if for_lead:
        live_BND = grad_BND if masked is None else grad_BND.masked_fill(masked[..., None], 0)
        keep_BL = effective_gain(gain, draw.lead_draw()).ne(0).float()
        lead_grad = (keep_BL.T @ live_BND.sum(1, dtype=torch.float32)).to(grad_BND.dtype)
    gradients = (
        signal_grad, None, None, weight_grad if for_weight else None, bias_grad if for_bias else None,
        lead_grad, place_grad, None, mask_token_grad,
    )  # fmt: skip
    return (*gradients, *[None] * 5)


torch.library.register_autograd("ecgscale::patch_embed", _backward, setup_context=_setup)
