"""Checks of what the ops are given. Each raises ValueError in one line that names the argument and both shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ecgscale_kernels.lead_draw import LeadDraw

_SIGNAL = (torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_input(signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor, lead_draw: LeadDraw | None) -> None:
    """The counts and what they are worth."""
    if signal_BLT.dim() != 3:
        raise ValueError(f"signal_BLT is {_shape(signal_BLT)}, must be (rows, leads, samples)")
    _check_dtype("signal_BLT", signal_BLT, _SIGNAL)
    if signal_BLT.shape[2] > 1 and signal_BLT.stride(2) != 1:
        raise ValueError(
            f"signal_BLT has strides {tuple(signal_BLT.stride())} for {_shape(signal_BLT)}: the samples of a lead must "
            "be contiguous; call .contiguous()"
        )
    if signal_BLT.shape[1] == 0:
        raise ValueError(f"signal_BLT is {_shape(signal_BLT)}, must have one lead or more")
    rows_leads = signal_BLT.shape[:2]
    for name, tensor in (("gain_BL", gain_BL), ("offset_BL", offset_BL)):
        check_shape(name, tensor, rows_leads, f"signal_BLT {_shape(signal_BLT)}")
        _check_dtype(name, tensor, _WEIGHT)
    if lead_draw is not None:
        if not 0 <= lead_draw.probability <= 1:
            raise ValueError(f"lead_draw.probability is {lead_draw.probability:g}, must be between 0 and 1")
        for name, tensor in (("segment_B", lead_draw.segment_B), ("position_B", lead_draw.position_B)):
            check_shape(f"lead_draw.{name}", tensor, rows_leads[:1], f"signal_BLT {_shape(signal_BLT)}")
            _check_dtype(f"lead_draw.{name}", tensor, (torch.int64,))
    named = {"gain_BL": gain_BL, "offset_BL": offset_BL}
    if lead_draw is not None:
        named |= {"lead_draw.segment_B": lead_draw.segment_B, "lead_draw.position_B": lead_draw.position_B}
    check_devices(signal_BLT, named)


def check_patch_embed(
    signal_BLT: Tensor,
    weight_DLP: Tensor,
    bias_D: Tensor | None,
    lead_LD: Tensor | None,
    position_ND: Tensor | None,
    masked_BN: Tensor | None,
    mask_token_D: Tensor | None,
) -> None:
    """The weights of the patch embedding against the signal."""
    batch, leads, samples = signal_BLT.shape
    if weight_DLP.dim() != 3 or 0 in weight_DLP.shape or weight_DLP.shape[1] != leads:
        raise ValueError(
            f"weight_DLP is {_shape(weight_DLP)}, must be (width, {leads}, samples of a patch) without zeros "
            f"for signal_BLT {_shape(signal_BLT)}"
        )
    _check_dtype("weight_DLP", weight_DLP, _WEIGHT)
    width, _, patch = weight_DLP.shape
    if patch > samples:
        raise ValueError(
            f"weight_DLP is {_shape(weight_DLP)}: a patch of {patch} samples is longer than signal_BLT "
            f"{_shape(signal_BLT)}"
        )
    if (masked_BN is None) != (mask_token_D is None):
        raise ValueError("masked_BN and mask_token_D belong together: give both or neither")
    patches, why = samples // patch, f"weight_DLP {_shape(weight_DLP)} and signal_BLT {_shape(signal_BLT)}"
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "bias_D": (bias_D, (width,)),
        "lead_LD": (lead_LD, (leads, width)),
        "position_ND": (position_ND, (patches, width)),
        "mask_token_D": (mask_token_D, (width,)),
        "masked_BN": (masked_BN, (batch, patches)),
    }
    given = {name: tensor for name, (tensor, _) in expected.items() if tensor is not None}
    for name, tensor in given.items():
        check_shape(name, tensor, expected[name][1], why)
        _check_dtype(name, tensor, (torch.bool,) if name == "masked_BN" else (weight_DLP.dtype,))
    check_devices(signal_BLT, {"weight_DLP": weight_DLP, **given})


def check_conv_stem(
    signal_BLT: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
) -> None:
    """The weights of the stem against the signal."""
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases: give one of each, or None, for every block")
    if signal_BLT.shape[2] < 2 ** len(weights):
        raise ValueError(f"signal_BLT is {_shape(signal_BLT)}: {len(weights)} blocks need {2 ** len(weights)} samples")
    channels = signal_BLT.shape[1]
    named: dict[str, Tensor] = {}
    for block, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{block}]"
        if weight.dim() != 3 or weight.shape[0] == 0 or weight.shape[1:] != (channels, 2):
            raise ValueError(
                f"{name} is {_shape(weight)}, must be (channels, {channels}, 2) for signal_BLT {_shape(signal_BLT)}"
            )
        channels = weight.shape[0]
        named[name] = weight
        if bias is not None:
            check_shape(f"biases[{block}]", bias, (channels,), f"{name} {_shape(weight)}")
            named[f"biases[{block}]"] = bias
    for name, tensor in (("norm_weight_C", norm_weight_C), ("norm_bias_C", norm_bias_C)):
        check_shape(name, tensor, weights[0].shape[:1], f"weights[0] {_shape(weights[0])}")
        named[name] = tensor
    for name, tensor in named.items():
        _check_dtype(name, tensor, (weights[0].dtype,) if weights[0].dtype in _WEIGHT else _WEIGHT)
    check_devices(signal_BLT, named)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], why: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {_shape(tensor)}, must be {tuple(shape)} for {why}")


def check_devices(signal_BLT: Tensor, named: Mapping[str, Tensor]) -> None:
    for name, tensor in named.items():
        if tensor.device != signal_BLT.device:
            raise ValueError(
                f"{name} {_shape(tensor)} is on {tensor.device}, must be where signal_BLT {_shape(signal_BLT)} is, "
                f"on {signal_BLT.device}"
            )


def _check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} {_shape(tensor)} is {str(tensor.dtype).removeprefix('torch.')}, must be {names}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
