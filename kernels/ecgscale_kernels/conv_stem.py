"""``lead_masked_conv_stem`` in Triton: counts -> features without the activations of the first block.

Block 0 (24 numbers -> C channels) is so small that it is recomputed wherever it is needed: its norm's statistics come
from the covariance of the input (docs/kernels.md), so nothing of it is ever stored. Of the later blocks only the values
before GELU are kept for the backward. Gradients of weights are cut into a fixed number of shares that are added in a
fixed order, hence the same bits in every run.

Shape suffixes: B batch, L leads, T samples, M rows of a tile (places in time), C channels, I input channels, K inputs
(lead, tap) of block 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgscale_kernels.lead_draw import LeadDraw
from ecgscale_kernels.triton_parts import (
    PROGRAMS,
    Draw,
    Launch,
    arithmetic,
    cdiv,
    gelu,
    gelu_slope,
    kept_gain,
    power_of_two,
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
    """As the reference. The offset is subtracted by the norm whatever it is, and so is the bias of block 0."""
    learned = [*weights, *biases, norm_weight_C, norm_bias_C]
    keep = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in learned)
    out_BMC: Tensor = torch.ops.ecgscale.conv_stem(
        signal_BLT, gain_BL.contiguous(), [weight.contiguous() for weight in weights],
        [bias.contiguous() for bias in biases if bias is not None], [bias is not None for bias in biases],
        norm_weight_C.contiguous(), norm_bias_C.contiguous(), norm_eps, keep, *Draw.of(lead_draw),
    )[0]  # fmt: skip
    return out_BMC


# -- launches --------------------------------------------------------------------------------------------------------


def _moments_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    return {"BLOCK_M": 128, "BLOCK_C": min(64, power_of_two(channels)), "num_warps": 8}


def _first_blocks_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    block_m, block_i, block_c, warps = (32, 32, 64, 4) if dtype == torch.float32 else (128, 16, 128, 8)
    return {
        "BLOCK_M": block_m, "BLOCK_I": block_i, "BLOCK_C": min(block_c, power_of_two(channels)),
        "num_warps": warps, "num_stages": 3,
    }  # fmt: skip


def _block_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    block_m, block_i, block_c = (32, 32, 64) if dtype == torch.float32 else (64, 32, 256)
    return {
        "BLOCK_M": block_m, "BLOCK_I": block_i, "BLOCK_C": min(block_c, power_of_two(channels)),
        "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def _weight_grad_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    block_m, block_c, block_i = (32, 64, 32) if dtype == torch.float32 else (32, 128, 128)
    return {
        "BLOCK_M": block_m, "BLOCK_C": min(block_c, power_of_two(channels)),
        "BLOCK_I": min(block_i, power_of_two(inputs)), "programs": PROGRAMS, "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def _input_grad_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    block_m, block_c, block_i = (32, 32, 64) if dtype == torch.float32 else (64, 32, 128)
    return {
        "BLOCK_M": block_m, "BLOCK_C": min(block_c, power_of_two(channels)),
        "BLOCK_I": min(block_i, power_of_two(inputs)), "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def _block_0_grad_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    block_m, block_c, block_i = (32, 32, 32) if dtype == torch.float32 else (64, 64, 32)
    blocks = {"BLOCK_C": min(block_c, power_of_two(channels)), "BLOCK_I": min(block_i, power_of_two(inputs))}
    return {"BLOCK_M": block_m, **blocks, "num_warps": 8}


def _weight_1_grad_launch(dtype: torch.dtype, channels: int, inputs: int) -> Launch:
    block_m, block_c = (32, 32) if dtype == torch.float32 else (64, 64)
    blocks = {"BLOCK_C": min(block_c, power_of_two(channels)), "BLOCK_I": min(32, power_of_two(inputs))}
    return {"BLOCK_M": block_m, **blocks, "programs": PROGRAMS, "num_warps": 8}


# Chosen by dtype and sizes alone and never by timing, so that every run gives the same bits, and so that no registers
# spill in bf16 and fp16 on sm_80 and sm_90 with Triton 3.6 to 3.9.
LAUNCH: dict[str, Callable[[torch.dtype, int, int], Launch]] = {
    "moments": _moments_launch,
    "first_blocks": _first_blocks_launch,
    "block": _block_launch,
    "input_grad": _input_grad_launch,
    "weight_grad": _weight_grad_launch,
    "weight_1_grad": _weight_1_grad_launch,
    "block_0_grad": _block_0_grad_launch,
}


# -- the input of block 0 --------------------------------------------------------------------------------------------


@triton.jit
def _gain_of_inputs(
    gain_ptr, k_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr
):
    """Input k of block 0 is tap k % 2 of lead k // 2."""
    return kept_gain(
        gain_ptr, k_K // 2, k_K < 2 * leads, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW
    )


@triton.jit
def _inputs(signal_ptr, row, stride_b, stride_l, place_M, there_M, k_K, gain_K, mean_K):
    """(M, K) values of block 0's inputs at some places, without their mean; zero where the gain is."""
    there_MK = there_M[:, None] & (gain_K != 0.0)[None, :]
    at_K = signal_ptr + row * stride_b + (k_K // 2).to(tl.int64) * stride_l + k_K % 2
    x_MK = tl.load(at_K[None, :] + 2 * place_M[:, None], mask=there_MK, other=0.0).to(tl.float32)
    return tl.where(there_MK, (x_MK - mean_K[None, :]) * gain_K[None, :], 0.0)


@triton.jit
def _moments_kernel(
    signal_ptr, gain_ptr, weight_ptr, norm_weight_ptr, mean_ptr, covariance_ptr, inverse_std_ptr, scale_ptr,
    stride_b, stride_l, leads, places, channels, eps,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    gain_K = _gain_of_inputs(gain_ptr, k_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW)
    # Counts first, gains later, and all beside the first sample: the sums are small, and zero for a constant.
    one_K = tl.where(gain_K != 0.0, 1.0, 0.0)
    first_K = tl.load(signal_ptr + row * stride_b + (k_K // 2).to(tl.int64) * stride_l, mask=gain_K != 0.0, other=0.0)
    first_K = first_K.to(tl.float32)
    mean_K = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, places, BLOCK_M):
        place_M = first + tl.arange(0, BLOCK_M)
        x_MK = _inputs(signal_ptr, row, stride_b, stride_l, place_M, place_M < places, k_K, one_K, first_K)
        mean_K += tl.sum(x_MK, 0)
    mean_K = first_K + mean_K / places
    covariance_KK = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for first in range(0, places, BLOCK_M):
        place_M = first + tl.arange(0, BLOCK_M)
        x_MK = _inputs(signal_ptr, row, stride_b, stride_l, place_M, place_M < places, k_K, gain_K, mean_K)
        covariance_KK = tl.dot(tl.trans(x_MK), x_MK, covariance_KK, input_precision="ieee")
    covariance_KK = covariance_KK / places
    tl.store(mean_ptr + row * BLOCK_K + k_K, mean_K)
    tl.store(covariance_ptr + (row * BLOCK_K + k_K[:, None]) * BLOCK_K + k_K[None, :], covariance_KK)
    for first in range(0, channels, BLOCK_C):
        c_C = first + tl.arange(0, BLOCK_C)
        weight_CK = tl.load(
            weight_ptr + c_C[:, None] * (2 * leads) + k_K[None, :],
            mask=(c_C < channels)[:, None] & (k_K < 2 * leads)[None, :],
            other=0.0,
        ).to(tl.float32)
        variance_C = tl.sum(tl.dot(weight_CK, covariance_KK, input_precision="ieee") * weight_CK, 1)
        inverse_std_C = 1.0 / tl.sqrt_rn(tl.where(variance_C < 0.0, 0.0, variance_C) + eps)
        norm_weight_C = tl.load(norm_weight_ptr + c_C, mask=c_C < channels, other=0.0).to(tl.float32)
        tl.store(inverse_std_ptr + row * channels + c_C, inverse_std_C, mask=c_C < channels)
        tl.store(scale_ptr + row * channels + c_C, inverse_std_C * norm_weight_C, mask=c_C < channels)


@triton.jit
def _block_0(value_MK, weight_ptr, scale_ptr, norm_bias_ptr, row, leads, channels, c_C, k_K, DOT, PRECISION):
    """(M, C) normed output of block 0, before GELU."""
    weight_CK = tl.load(
        weight_ptr + c_C[:, None] * (2 * leads) + k_K[None, :],
        mask=(c_C < channels)[:, None] & (k_K < 2 * leads)[None, :],
        other=0.0,
    )
    scale_C = tl.load(scale_ptr + row * channels + c_C, mask=c_C < channels, other=0.0)
    bias_C = tl.load(norm_bias_ptr + c_C, mask=c_C < channels, other=0.0).to(tl.float32)
    raw_MC = tl.dot(value_MK.to(DOT), tl.trans(weight_CK.to(DOT)), input_precision=PRECISION)
    return raw_MC * scale_C[None, :] + bias_C[None, :]


# -- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _first_blocks_kernel(
    signal_ptr, gain_ptr, mean_ptr, weight_0_ptr, scale_ptr, norm_bias_ptr, weight_1_ptr, bias_ptr, raw_ptr, out_ptr,
    stride_b, stride_l, leads, places, channels_in, channels,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RAW: tl.constexpr, HAS_OUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks 0 and 1: the former is made a few channels at a time and consumed at once."""
    tiles = tl.cdiv(places, BLOCK_M)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    m_M = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    c_C, k_K = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    gain_K = _gain_of_inputs(gain_ptr, k_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW)
    mean_K = tl.load(mean_ptr + row * BLOCK_K + k_K)
    there_M = m_M < places
    even_MK = _inputs(signal_ptr, row, stride_b, stride_l, 2 * m_M, there_M, k_K, gain_K, mean_K)
    odd_MK = _inputs(signal_ptr, row, stride_b, stride_l, 2 * m_M + 1, there_M, k_K, gain_K, mean_K)
    z_MC = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, channels_in, BLOCK_I):
        i_I = first + tl.arange(0, BLOCK_I)
        even_MI = _block_0(
            even_MK, weight_0_ptr, scale_ptr, norm_bias_ptr, row, leads, channels_in, i_I, k_K, DOT, PRECISION
        )
        odd_MI = _block_0(
            odd_MK, weight_0_ptr, scale_ptr, norm_bias_ptr, row, leads, channels_in, i_I, k_K, DOT, PRECISION
        )
        at_CI = weight_1_ptr + c_C[:, None] * (2 * channels_in) + i_I[None, :]
        there_CI = (c_C < channels)[:, None] & (i_I < channels_in)[None, :]
        early_CI = tl.load(at_CI, mask=there_CI, other=0.0).to(DOT)
        late_CI = tl.load(at_CI + channels_in, mask=there_CI, other=0.0).to(DOT)
        z_MC = tl.dot(gelu(even_MI).to(DOT), tl.trans(early_CI), z_MC, input_precision=PRECISION)
        z_MC = tl.dot(gelu(odd_MI).to(DOT), tl.trans(late_CI), z_MC, input_precision=PRECISION)
    if HAS_BIAS:
        z_MC += tl.load(bias_ptr + c_C, mask=c_C < channels, other=0.0).to(tl.float32)[None, :]
    at_MC = (row * places + m_M[:, None]) * channels + c_C[None, :]
    there_MC = there_M[:, None] & (c_C < channels)[None, :]
    if HAS_RAW:
        tl.store(raw_ptr + at_MC, z_MC.to(raw_ptr.dtype.element_ty), mask=there_MC)
    if HAS_OUT:
        tl.store(out_ptr + at_MC, gelu(z_MC).to(out_ptr.dtype.element_ty), mask=there_MC)


@triton.jit
def _block_kernel(
    before_ptr, weight_ptr, bias_ptr, raw_ptr, out_ptr,
    rows, places_before, places, channels_in, channels,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RAW: tl.constexpr, HAS_OUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A later block: GELU of what the block before left, on the way into the product. M counts (row, place)."""
    m_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    before_M = before_ptr + (m_M // places * places_before + m_M % places * 2) * channels_in
    z_MC = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, 2 * channels_in, BLOCK_I):  # the two taps stand one behind the other
        i_I = first + tl.arange(0, BLOCK_I)
        there_MI = (m_M < rows)[:, None] & (i_I < 2 * channels_in)[None, :]
        before_MI = gelu(tl.load(before_M[:, None] + i_I[None, :], mask=there_MI, other=0.0).to(tl.float32))
        weight_CI = tl.load(
            weight_ptr + c_C[:, None] * (2 * channels_in) + i_I[None, :],
            mask=(c_C < channels)[:, None] & (i_I < 2 * channels_in)[None, :],
            other=0.0,
        )
        z_MC = tl.dot(before_MI.to(DOT), tl.trans(weight_CI.to(DOT)), z_MC, input_precision=PRECISION)
    if HAS_BIAS:
        z_MC += tl.load(bias_ptr + c_C, mask=c_C < channels, other=0.0).to(tl.float32)[None, :]
    at_MC = m_M[:, None] * channels + c_C[None, :]
    there_MC = (m_M < rows)[:, None] & (c_C < channels)[None, :]
    if HAS_RAW:
        tl.store(raw_ptr + at_MC, z_MC.to(raw_ptr.dtype.element_ty), mask=there_MC)
    if HAS_OUT:
        tl.store(out_ptr + at_MC, gelu(z_MC).to(out_ptr.dtype.element_ty), mask=there_MC)


@torch.library.custom_op("ecgscale::conv_stem", mutates_args=())
def _conv_stem(
    signal: Tensor, gain: Tensor, weights: list[Tensor], biases: list[Tensor], has_bias: list[bool],
    norm_weight: Tensor, norm_bias: Tensor, norm_eps: float, keep: bool,
    seed: int, purpose: int, probability: float, segment: Tensor | None, position: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The features, and with ``keep`` what the backward needs: mean, covariance, 1 / std and the blocks before GELU."""
    (batch, leads, samples), dtype = signal.shape, weights[0].dtype
    draw = Draw(seed, purpose, probability, segment, position).arguments()
    strides = (signal.stride(0), signal.stride(1), leads)
    weight_0, channels, inputs = weights[0], weights[0].shape[0], power_of_two(2 * leads)
    mean_BK, covariance_BKK = (signal.new_empty((batch, *[inputs] * n), dtype=torch.float32) for n in (1, 2))
    inverse_std_BC, scale_BC = signal.new_empty((2, batch, channels), dtype=torch.float32)
    _moments_kernel[(batch,)](
        signal, gain, weight_0, norm_weight, mean_BK, covariance_BKK, inverse_std_BC, scale_BC,
        *strides, samples // 2, channels, norm_eps, **draw,
        BLOCK_K=inputs, **LAUNCH["moments"](dtype, channels, 2 * leads),
    )  # fmt: skip
    given = iter(biases)
    bias_of = [next(given) if has else None for has in has_bias]
    raw: list[Tensor] = []
    out = signal.new_empty(0)
    for block in range(1, len(weights)):
        places, channels_in, channels = samples >> block + 1, *weights[block].shape[1::-1]
        last = block == len(weights) - 1
        z_BMC = None if last and not keep else signal.new_empty((batch, places, channels), dtype=dtype)
        out_BMC = signal.new_empty((batch, places, channels), dtype=dtype) if last else None
        launch = LAUNCH["first_blocks" if block == 1 else "block"](dtype, channels, 2 * channels_in)
        flags = {
            "HAS_BIAS": has_bias[block], "HAS_RAW": z_BMC is not None, "HAS_OUT": last, **arithmetic(dtype), **launch,
        }  # fmt: skip
        weight = _taps_first(weights[block])
        if block == 1:
            _first_blocks_kernel[(batch * cdiv(places, launch["BLOCK_M"]), cdiv(channels, launch["BLOCK_C"]))](
                signal, gain, mean_BK, weight_0, scale_BC, norm_bias, weight, bias_of[1], z_BMC, out_BMC,
                *strides, places, channels_in, channels, **draw, BLOCK_K=inputs, **flags,
            )  # fmt: skip
        else:
            rows = batch * places
            _block_kernel[(cdiv(rows, launch["BLOCK_M"]), cdiv(channels, launch["BLOCK_C"]))](
                raw[-1], weight, bias_of[block], z_BMC, out_BMC,
                rows, samples >> block, places, channels_in, channels, **flags,
            )  # fmt: skip
        if z_BMC is not None:
            raw.append(z_BMC)
        if out_BMC is not None:
            out = out_BMC
    return [out, mean_BK, covariance_BKK, inverse_std_BC, *raw] if keep else [out]


@_conv_stem.register_fake
def _(
    signal,
    gain,
    weights,
    biases,
    has_bias,
    norm_weight,
    norm_bias,
    norm_eps,
    keep,
    seed,
    purpose,
    probability,
    segment,
    position,
):
    batch, leads, samples = signal.shape
    dtype, blocks, inputs = weights[0].dtype, len(weights), power_of_two(2 * leads)
    raw = [
        signal.new_empty((batch, samples >> block + 1, weights[block].shape[0]), dtype=dtype)
        for block in range(1, blocks)
    ]
    out = torch.empty_like(raw[-1])
    if not keep:
        return [out]
    mean, covariance = (signal.new_empty((batch, *[inputs] * n), dtype=torch.float32) for n in (1, 2))
    return [out, mean, covariance, signal.new_empty((batch, weights[0].shape[0]), dtype=torch.float32), *raw]


def _taps_first(weight: Tensor) -> Tensor:
    """(C, I, 2) -> (C, 2 · I): a place and its neighbour are one row of 2 · I numbers in memory."""
    return weight.transpose(1, 2).flatten(1)


# -- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _slope(grad_ptr, raw_ptr, at, there, THROUGH_GELU):
    """Gradient of a block before its GELU; stored as such, or to be made of that behind it."""
    grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
    if THROUGH_GELU:
        grad *= gelu_slope(tl.load(raw_ptr + at, mask=there, other=0.0).to(tl.float32))
    return grad


@triton.jit
def _input_grad_kernel(
    grad_ptr, raw_ptr, weight_ptr, before_ptr, out_ptr,
    rows, places_before, places, channels_in, channels,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, THROUGH_GELU: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the block before, before its GELU."""
    m_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    y_MI = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c_C = first + tl.arange(0, BLOCK_C)
        there_MC = (m_M < rows)[:, None] & (c_C < channels)[None, :]
        grad_MC = _slope(grad_ptr, raw_ptr, m_M[:, None] * channels + c_C[None, :], there_MC, THROUGH_GELU)
        weight_CI = tl.load(
            weight_ptr + c_C[:, None] * (2 * channels_in) + i_I[None, :],
            mask=(c_C < channels)[:, None] & (i_I < 2 * channels_in)[None, :],
            other=0.0,
        )
        y_MI = tl.dot(grad_MC.to(DOT), weight_CI.to(DOT), y_MI, input_precision=PRECISION)
    at_MI = (m_M // places * places_before + m_M % places * 2)[:, None] * channels_in + i_I[None, :]
    there_MI = (m_M < rows)[:, None] & (i_I < 2 * channels_in)[None, :]
    y_MI *= gelu_slope(tl.load(before_ptr + at_MI, mask=there_MI, other=0.0).to(tl.float32))
    tl.store(out_ptr + at_MI, y_MI.to(out_ptr.dtype.element_ty), mask=there_MI)


@triton.jit
def _weight_grad_kernel(
    grad_ptr, raw_ptr, before_ptr, out_ptr,
    rows, places_before, places, channels_in, channels,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, THROUGH_GELU: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the gradient of a later block's weight, (C, 2 · I) in float32."""
    c_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    share, shares = tl.program_id(2), tl.num_programs(2)
    tiles = tl.cdiv(rows, BLOCK_M)
    weight_CI = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for tile in range(tiles * share // shares, tiles * (share + 1) // shares):
        m_M = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        there_MC = (m_M < rows)[:, None] & (c_C < channels)[None, :]
        grad_MC = _slope(grad_ptr, raw_ptr, m_M[:, None] * channels + c_C[None, :], there_MC, THROUGH_GELU)
        at_MI = (m_M // places * places_before + m_M % places * 2)[:, None] * channels_in + i_I[None, :]
        there_MI = (m_M < rows)[:, None] & (i_I < 2 * channels_in)[None, :]
        before_MI = gelu(tl.load(before_ptr + at_MI, mask=there_MI, other=0.0).to(tl.float32))
        weight_CI = tl.dot(tl.trans(grad_MC.to(DOT)), before_MI.to(DOT), weight_CI, input_precision=PRECISION)
    out_CI = out_ptr + (share * channels + c_C[:, None]) * (2 * channels_in) + i_I[None, :]
    tl.store(out_CI, weight_CI, mask=(c_C < channels)[:, None] & (i_I < 2 * channels_in)[None, :])


@triton.jit
def _weight_1_grad_kernel(
    signal_ptr, gain_ptr, mean_ptr, weight_0_ptr, scale_ptr, norm_bias_ptr, grad_ptr, raw_ptr, out_ptr,
    stride_b, stride_l, leads, batch, places, channels_in, channels,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
    THROUGH_GELU: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of block 1, whose input is made anew. Taps stand one behind the other in the result."""
    c_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    share, shares, k_K = tl.program_id(2), tl.num_programs(2), tl.arange(0, BLOCK_K)
    tiles = tl.cdiv(places, BLOCK_M)
    early_CI = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    late_CI = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for tile in range(batch * tiles * share // shares, batch * tiles * (share + 1) // shares):
        row, m_M = tl.cast(tile // tiles, tl.int64), tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        gain_K = _gain_of_inputs(
            gain_ptr, k_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW
        )
        mean_K, there_M = tl.load(mean_ptr + row * BLOCK_K + k_K), m_M < places
        even_MK = _inputs(signal_ptr, row, stride_b, stride_l, 2 * m_M, there_M, k_K, gain_K, mean_K)
        odd_MK = _inputs(signal_ptr, row, stride_b, stride_l, 2 * m_M + 1, there_M, k_K, gain_K, mean_K)
        even_MI = _block_0(
            even_MK, weight_0_ptr, scale_ptr, norm_bias_ptr, row, leads, channels_in, i_I, k_K, DOT, PRECISION
        )
        odd_MI = _block_0(
            odd_MK, weight_0_ptr, scale_ptr, norm_bias_ptr, row, leads, channels_in, i_I, k_K, DOT, PRECISION
        )
        at_MC = (row * places + m_M[:, None]) * channels + c_C[None, :]
        there_MC = there_M[:, None] & (c_C < channels)[None, :]
        grad_CM = tl.trans(_slope(grad_ptr, raw_ptr, at_MC, there_MC, THROUGH_GELU).to(DOT))
        early_CI = tl.dot(grad_CM, gelu(even_MI).to(DOT), early_CI, input_precision=PRECISION)
        late_CI = tl.dot(grad_CM, gelu(odd_MI).to(DOT), late_CI, input_precision=PRECISION)
    out_CI = out_ptr + (share * channels + c_C[:, None]) * (2 * channels_in) + i_I[None, :]
    there_CI = (c_C < channels)[:, None] & (i_I < channels_in)[None, :]
    tl.store(out_CI, early_CI, mask=there_CI)
    tl.store(out_CI + channels_in, late_CI, mask=there_CI)


@triton.jit
def _block_0_grad_kernel(
    signal_ptr, gain_ptr, mean_ptr, weight_0_ptr, scale_ptr, norm_bias_ptr, weight_1_ptr, grad_ptr, raw_ptr,
    product_ptr, sum_ptr,
    stride_b, stride_l, leads, places, channels_in, channels,
    seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
    THROUGH_GELU: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each row: the gradient of block 0's normed output summed over time, and summed times the inputs (I, K)."""
    row = tl.program_id(0).to(tl.int64)
    i_I, k_K = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_K)
    gain_K = _gain_of_inputs(gain_ptr, k_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW)
    mean_K = tl.load(mean_ptr + row * BLOCK_K + k_K)
    product_IK = tl.zeros((BLOCK_I, BLOCK_K), tl.float32)
    sum_I = tl.zeros((BLOCK_I,), tl.float32)
    for tile in range(0, places, BLOCK_M):
        m_M = tile + tl.arange(0, BLOCK_M)
        there_M = m_M < places
        even_MI = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        odd_MI = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for first in range(0, channels, BLOCK_C):
            c_C = first + tl.arange(0, BLOCK_C)
            at_MC = (row * places + m_M[:, None]) * channels + c_C[None, :]
            there_MC = there_M[:, None] & (c_C < channels)[None, :]
            grad_MC = _slope(grad_ptr, raw_ptr, at_MC, there_MC, THROUGH_GELU).to(DOT)
            at_CI = weight_1_ptr + c_C[:, None] * (2 * channels_in) + i_I[None, :]
            there_CI = (c_C < channels)[:, None] & (i_I < channels_in)[None, :]
            early_CI = tl.load(at_CI, mask=there_CI, other=0.0).to(DOT)
            late_CI = tl.load(at_CI + channels_in, mask=there_CI, other=0.0).to(DOT)
            even_MI = tl.dot(grad_MC, early_CI, even_MI, input_precision=PRECISION)
            odd_MI = tl.dot(grad_MC, late_CI, odd_MI, input_precision=PRECISION)
        even_MK = _inputs(signal_ptr, row, stride_b, stride_l, 2 * m_M, there_M, k_K, gain_K, mean_K)
        odd_MK = _inputs(signal_ptr, row, stride_b, stride_l, 2 * m_M + 1, there_M, k_K, gain_K, mean_K)
        even_MI *= gelu_slope(
            _block_0(even_MK, weight_0_ptr, scale_ptr, norm_bias_ptr, row, leads, channels_in, i_I, k_K, DOT, PRECISION)
        )
        odd_MI *= gelu_slope(
            _block_0(odd_MK, weight_0_ptr, scale_ptr, norm_bias_ptr, row, leads, channels_in, i_I, k_K, DOT, PRECISION)
        )
        product_IK = tl.dot(tl.trans(even_MI.to(DOT)), even_MK.to(DOT), product_IK, input_precision=PRECISION)
        product_IK = tl.dot(tl.trans(odd_MI.to(DOT)), odd_MK.to(DOT), product_IK, input_precision=PRECISION)
        sum_I += tl.sum(even_MI + odd_MI, 0)
    tl.store(sum_ptr + row * channels_in + i_I, sum_I, mask=i_I < channels_in)
    out_IK = product_ptr + (row * channels_in + i_I[:, None]) * BLOCK_K + k_K[None, :]
    tl.store(out_IK, product_IK, mask=(i_I < channels_in)[:, None])


@torch.library.custom_op("ecgscale::conv_stem_grad", mutates_args=())
def _conv_stem_grad(
    signal: Tensor, gain: Tensor, weights: list[Tensor], has_bias: list[bool], norm_weight: Tensor, norm_bias: Tensor,
    kept: list[Tensor], grad: Tensor,
    seed: int, purpose: int, probability: float, segment: Tensor | None, position: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights, of the norm's weight and bias, and of the biases that there are."""
    (batch, leads, samples), dtype = signal.shape, weights[0].dtype
    draw = Draw(seed, purpose, probability, segment, position).arguments()
    strides = (signal.stride(0), signal.stride(1), leads)
    mean_BK, covariance_BKK, inverse_std_BC, *raw = kept
    weight_grads: list[Tensor] = []
    bias_grads: list[Tensor] = []
    through_gelu = True  # of the last block the gradient behind GELU is given, of the others that before
    for block in range(len(weights) - 1, 1, -1):
        places, channels_in, channels = samples >> block + 1, *weights[block].shape[1::-1]
        shape = (batch * places, samples >> block, places, channels_in, channels)
        z, before, weight = raw[block - 1], raw[block - 2], _taps_first(weights[block])
        flags = {"THROUGH_GELU": through_gelu, **arithmetic(dtype)}
        launch = LAUNCH["weight_grad"](dtype, channels, 2 * channels_in)
        tiles = (cdiv(channels, launch["BLOCK_C"]), cdiv(2 * channels_in, launch["BLOCK_I"]))
        shares = cdiv(launch.pop("programs"), tiles[0] * tiles[1])
        weight_SCI = grad.new_empty((shares, channels, 2 * channels_in), dtype=torch.float32)
        _weight_grad_kernel[(*tiles, shares)](grad, z, before, weight_SCI, *shape, **launch, **flags)
        weight_grads.insert(0, _taps_last(weight_SCI.sum(0)).to(dtype))
        if has_bias[block]:
            bias_grads.insert(0, _bias_grad(grad, z, through_gelu))
        launch = LAUNCH["input_grad"](dtype, channels, 2 * channels_in)
        before_grad = torch.empty_like(before)
        before_grad[:, 2 * places :] = 0  # a last odd place goes nowhere
        _input_grad_kernel[(cdiv(batch * places, launch["BLOCK_M"]), cdiv(2 * channels_in, launch["BLOCK_I"]))](
            grad, z, weight, before, before_grad, *shape, **launch, **flags
        )
        grad, through_gelu = before_grad, False
    places, channels_in, channels = samples >> 2, *weights[1].shape[1::-1]
    weight_0, scale_BC = weights[0], inverse_std_BC * norm_weight.float()
    first = (signal, gain, mean_BK, weight_0, scale_BC, norm_bias)
    inputs = mean_BK.shape[1]
    flags = {**draw, "BLOCK_K": inputs, "THROUGH_GELU": through_gelu, **arithmetic(dtype)}
    launch = LAUNCH["weight_1_grad"](dtype, channels, channels_in)
    tiles = (cdiv(channels, launch["BLOCK_C"]), cdiv(channels_in, launch["BLOCK_I"]))
    shares = cdiv(launch.pop("programs"), tiles[0] * tiles[1])
    weight_SCI = grad.new_empty((shares, channels, 2 * channels_in), dtype=torch.float32)
    _weight_1_grad_kernel[(*tiles, shares)](
        *first, grad, raw[0], weight_SCI, *strides, batch, places, channels_in, channels, **launch, **flags
    )
    weight_grads.insert(0, _taps_last(weight_SCI.sum(0)).to(dtype))
    if has_bias[1]:
        bias_grads.insert(0, _bias_grad(grad, raw[0], through_gelu))
    if has_bias[0]:  # the norm takes away whatever it adds
        bias_grads.insert(0, weight_0.new_zeros(channels_in))
    product_BCK = grad.new_empty((batch, channels_in, inputs), dtype=torch.float32)
    sum_BC = grad.new_empty((batch, channels_in), dtype=torch.float32)
    launch = LAUNCH["block_0_grad"](dtype, channels, channels_in)
    _block_0_grad_kernel[(batch, cdiv(channels_in, launch["BLOCK_I"]))](
        *first, _taps_first(weights[1]), grad, raw[0], product_BCK, sum_BC,
        *strides, places, channels_in, channels, **launch, **flags,
    )  # fmt: skip
    # Through the norm (see docs/kernels.md): means over time become sums over the covariance of the inputs.
    weight_CK = weight_0.flatten(1).float()
    product_BCK, covariance_BKK = product_BCK[..., : 2 * leads], covariance_BKK[:, : 2 * leads, : 2 * leads]
    normed_BC = inverse_std_BC * (product_BCK * weight_CK).sum(2)  # gradient times normed value, summed over time
    through_BCK = product_BCK - (normed_BC * inverse_std_BC)[..., None] * (weight_CK @ covariance_BKK)
    weight_grads.insert(0, (scale_BC[..., None] * through_BCK).sum(0).to(dtype).view_as(weights[0]))
    norm_grads = [normed_BC.sum(0).to(dtype), sum_BC.sum(0).to(dtype)]
    return [*weight_grads, *norm_grads, *bias_grads]


@_conv_stem_grad.register_fake
def _(signal, gain, weights, has_bias, norm_weight, norm_bias, kept, grad, *draw):
    biases = [weight.new_empty(len(weight)) for weight, has in zip(weights, has_bias, strict=True) if has]
    return [torch.empty_like(one) for one in [*weights, norm_weight, norm_bias, *biases]]


def _taps_last(weight_CI: Tensor) -> Tensor:
    return weight_CI.view(len(weight_CI), 2, -1).transpose(1, 2).contiguous()


def _bias_grad(grad: Tensor, raw: Tensor, through_gelu: bool) -> Tensor:
    if through_gelu:
        grad = torch.ops.aten.gelu_backward(grad, raw)
    return grad.sum((0, 1), dtype=torch.float32).to(grad.dtype)


# -- autograd --------------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    signal, gain, weights, _, has_bias, norm_weight, norm_bias, _, _, *draw = inputs
    ctx.blocks, ctx.has_bias, ctx.draw = len(weights), has_bias, draw[:3]
    ctx.save_for_backward(signal, gain, norm_weight, norm_bias, *draw[3:], *weights, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    signal, gain, norm_weight, norm_bias, segment, position, *rest = ctx.saved_tensors
    weights, kept = rest[: ctx.blocks], rest[ctx.blocks :]
    gradients = torch.ops.ecgscale.conv_stem_grad(
        signal, gain, weights, ctx.has_bias, norm_weight, norm_bias, kept, grads[0].contiguous(), *ctx.draw,
        segment, position,
    )  # fmt: skip
    weight_grads, norm_grads, bias_grads = (
        gradients[: ctx.blocks],
        gradients[ctx.blocks :][:2],
        gradients[ctx.blocks + 2 :],
    )
    return None, None, weight_grads, bias_grads, None, *norm_grads, *[None] * 7


torch.library.register_autograd("ecgscale::conv_stem", _backward, setup_context=_setup)
