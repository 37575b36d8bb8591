"""Lead-masked patch embedding: counts -> features.

Shape suffixes: B rows, L leads, T samples, N patches, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale_kernels import lead_masked_conv_stem

BLOCKS = 4  # each halves the samples
SAMPLES_PER_PATCH = 2**BLOCKS


class ConvStem(nn.Module):
    """Four blocks of Conv1d(kernel 2, stride 2) and GELU, the first with a norm over time (Oh et al. 2022).

    Owns its parameters itself rather than through Conv1d modules, since the fused op reads them all at once and
    ZeRO stage 3 gathers only the parameters of the module that runs.
    """

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
            [getattr(self, f"weight_{block}") for block in range(BLOCKS)],
            [getattr(self, f"bias_{block}") for block in range(BLOCKS)],
            self.norm_weight,
            self.norm_bias,
        )
