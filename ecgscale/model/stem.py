"""Lead-masked patch embedding: counts -> features. Two stems, one interface: (B, N, C) with N = T // patch samples.

Each owns its parameters itself rather than through Conv1d modules, since the fused op reads them all at once and
ZeRO stage 3 gathers only the parameters of the module that runs.

Shape suffixes: B rows, L leads, T samples, N patches, C channels.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale_kernels import backend, lead_masked_conv_stem, lead_masked_patch_embed

BLOCKS = 4  # of the convolutional stem; each halves the samples
CONV_PATCH_SAMPLES = 2**BLOCKS


class ConvStem(nn.Module):
    """Four blocks of Conv1d(kernel 2, stride 2) and GELU, the first with a norm over time (Oh et al. 2022)."""

    def __init__(self, leads: int, channels: int, bias: bool) -> None:
        super().__init__()
        for block in range(BLOCKS):
            weight = nn.Parameter(torch.empty(channels, leads if block == 0 else channels, 2))
            nn.init.kaiming_normal_(weight)
            self.register_parameter(f"weight_{block}", weight)
            self.register_parameter(f"bias_{block}", nn.Parameter(torch.zeros(channels)) if bias else None)
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, batch: ECGBatch) -> Tensor:
        """(B, N, C) with N = T // 16."""
        return lead_masked_conv_stem(
            batch.signal_BLT,
            batch.gain_BL,
            batch.offset_BL,
            [_in_autocast(getattr(self, f"weight_{block}")) for block in range(BLOCKS)],
            [_in_autocast(getattr(self, f"bias_{block}")) for block in range(BLOCKS)],
            _in_autocast(self.norm_weight),
            _in_autocast(self.norm_bias),
            lead_draw=batch.lead_draw,
        )


class PatchStem(nn.Module):
    """One linear map per patch, as in a vision transformer (Dosovitskiy et al. 2021)."""

    def __init__(self, leads: int, channels: int, patch_samples: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, leads, patch_samples))
        nn.init.kaiming_normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, batch: ECGBatch) -> Tensor:
        """(B, N, C) with N = T // patch samples."""
        weight, bias = _in_autocast(self.weight), _in_autocast(self.bias)
        return lead_masked_patch_embed(
            batch.signal_BLT, batch.gain_BL, batch.offset_BL, weight, bias, lead_draw=batch.lead_draw
        )


@overload
def _in_autocast(parameter: Tensor) -> Tensor: ...
@overload
def _in_autocast(parameter: None) -> None: ...
def _in_autocast(parameter: Tensor | None) -> Tensor | None:
    """In the dtype of torch.autocast where it is on, which by itself leaves ops that it does not know in fp32."""
    if parameter is None:
        return None
    device = parameter.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return parameter.to(torch.get_autocast_dtype(device)) if on else parameter


def check_kernels(device: torch.device) -> str:
    """Which kernels run on a device. Raises InputError where ECGSCALE_KERNELS asks for what cannot."""
    try:
        chosen: str = backend(device.type)
    except ValueError as error:
        raise InputError(str(error)) from error
    return chosen
