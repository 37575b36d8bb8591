"""A small encoder of one's own: one linear map per patch, and a recurrent network over the patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model.base import Encoder, EncoderConfig, Features, kept_values, valid_tokens


class Recurrent(Encoder):
    """Tokens are read from left to right."""

    @dataclass(frozen=True)
    class Config(EncoderConfig):
        """Keys of the recurrent encoder."""

        patch_samples: int = 25
        """Samples of a token."""
        width: int = 8
        """Width of the state."""
        depth: int = 2
        """Recurrent layers."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.depth < 1:
                raise InputError(f"model.depth {self.depth}: give 1 or more")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.patches = nn.Linear(len(LEADS) * config.patch_samples, config.width)
        self.layers = nn.ModuleList(nn.RNN(config.width, config.width, batch_first=True) for _ in range(config.depth))

    def features(self, batch: ECGBatch) -> Features:
        value_BLT, patch = kept_values(batch), self.config.patch_samples
        patch_BNX = value_BLT.unfold(2, patch, patch).transpose(1, 2).flatten(2)
        token_BND = self.patches(patch_BNX.to(self.patches.weight.dtype))
        valid_BN = valid_tokens(batch.length_B // patch, token_BND.shape[1]) if batch.padded else None
        return Features(token_BND, token_BND, token_BND, valid_BN)

    def contextualise(self, token_BND: Tensor, valid_BN: Tensor | None, masked_BN: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            token_BND = token_BND + layer(token_BND)[0]
        return torch.tanh(token_BND)
