"""What every encoder is: counts -> one vector per token, and what training, use and exports need to know of it.

Shape suffixes: B rows, L leads, T samples, N tokens, C channels of the features, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.model.stem import check_kernels


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of the encoder; ``encoder`` chooses it, and the other keys are those of the chosen one."""

    encoder: str
    """transformer, or package.module:Class for one of your own."""
    patch_samples: int
    """Samples of a token."""
    width: int
    """Width of the tokens that it gives."""

    training_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that neither weights nor embeddings depend on, such as dropout."""

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        for name in ("patch_samples", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} {getattr(self, name)}: give 1 or more")

    @classmethod
    def filled_in(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The keys that are given, with those that they stand for, such as a preset."""
        return given

    @classmethod
    def shape_keys(cls) -> list[str]:
        """Keys that weights or embeddings depend on."""
        return [field.name for field in fields(cls) if field.name not in cls.training_keys]

    def refuse_size(self, tensors: int, numbers: int) -> None:
        """Raises InputError where so many weights of so many numbers together cannot be of this shape.

        Asked before anything of this shape is built: a config may come from anybody.
        """

    def kernels(self, device: torch.device) -> str:
        """Which code runs on a device, in words. Raises InputError where ECGSCALE_KERNELS asks for what cannot."""
        check_kernels(device)
        return f"{self.encoder} on {device.type}"

    def in_short(self) -> str:
        """What it is, in a few words."""
        return f"{self.encoder} of width {self.width}"

    def in_full(self) -> str:
        """What it is, with all that its size depends on."""
        return f"{self.in_short()}, {self.patch_samples} samples a token"


class Features(NamedTuple):
    """What the first part of an encoder gives, before any masking in time."""

    stem_BNC: Tensor  # raw output of the stem, for its penalty
    normed_BNC: Tensor  # after LayerNorm: the targets of the local objective
    token_BND: Tensor  # in the encoder's width
    valid_BN: Tensor | None  # tokens that lie in the recording; None: all


class Encoder(nn.Module, ABC):
    """Counts -> one vector per token: ``features`` makes tokens, ``contextualise`` lets them know of each other."""

    Config: ClassVar[type[EncoderConfig]] = EncoderConfig
    """A frozen dataclass of the keys that the encoder has, each with a default but ``encoder``."""
    masks_tokens: ClassVar[bool] = False
    """Whether ``contextualise`` takes masked tokens; then the first two of its features are of one value per token."""
    feature_dropout: float = 0.0
    """Dropout of the features, before they become tokens and before an objective takes them for targets."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputed_layers = 0

    @abstractmethod
    def features(self, batch: ECGBatch) -> Features:
        """Tokens of the kept leads, each of ``config.patch_samples`` samples; what is left over at the end is not read.

        ``batch.lead_draw`` says which leads are masked beside those of gain zero.
        """

    @abstractmethod
    def contextualise(self, token_BND: Tensor, valid_BN: Tensor | None, masked_BN: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D). ``masked_BN`` tokens are hidden first, by encoders with ``masks_tokens``."""

    def forward(self, batch: ECGBatch) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) of an unmasked batch and which of them are valid (None: all)."""
        features = self.features(batch)
        return self.contextualise(features.token_BND, features.valid_BN), features.valid_BN

    @property
    def feature_width(self) -> int:
        """C, of the features that an objective takes for targets."""
        return self.config.width

    def blocks(self) -> Sequence[nn.Module]:
        """Modules that may be compiled, and recomputed in the backward pass, in the order in which they run."""
        return ()

    def recompute(self, activation_checkpointing: bool | int) -> None:
        """Recompute so many blocks, from the first. Raises InputError for more than there are."""
        self.recomputed_layers = recomputed_layers(activation_checkpointing, len(self.blocks()))

    def through_blocks(self, x_BND: Tensor, *more: Any) -> Tensor:
        """One block after the other, those that are to be recomputed without their activations."""
        recomputed = self.recomputed_layers if self.training else 0
        for number, block in enumerate(self.blocks()):
            again = number < recomputed
            x_BND = checkpoint(block, x_BND, *more, use_reentrant=False) if again else block(x_BND, *more)
        return x_BND

    def unused_unmasked(self) -> Sequence[nn.Module]:
        """Modules that take no part where nothing is masked in time, as in fine-tuning."""
        return ()

    def stem_modules(self) -> Sequence[nn.Module]:
        """Modules that ``task.freeze_stem`` keeps as they are."""
        return ()


def recomputed_layers(activation_checkpointing: bool | int, depth: int) -> int:
    """How many layers are recomputed: True stands for all of them. Raises InputError for more than there are."""
    if activation_checkpointing is True:
        return depth
    if activation_checkpointing > depth:
        raise InputError(
            f"engine.activation_checkpointing {activation_checkpointing}: the model has {depth} layers; give at most "
            "that many, or true for all"
        )
    return int(activation_checkpointing)


def kept_values(batch: ECGBatch) -> Tensor:
    """(B, L, T) float32 values in mV or z-units: zero in leads that are missing or masked and behind the valid samples.

    For encoders whose first layer does not take counts; those of ours dequantise and mask within it.
    """
    gain_BL = batch.gain_BL
    if batch.lead_draw is not None:
        gain_BL = gain_BL * batch.lead_draw.keep_BL(gain_BL.shape[1])
    value_BLT = gain_BL[..., None] * (batch.signal_BLT - batch.offset_BL[..., None])
    sample_T = torch.arange(value_BLT.shape[-1], device=value_BLT.device)
    return torch.where(sample_T < batch.length_B[:, None, None], value_BLT, 0.0)


def mean_over_time(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """(B, D) mean of the valid tokens, in float32."""
    if valid_BN is None:
        return x_BND.float().mean(dim=1)
    weight_BN1 = valid_BN[..., None].float()
    return (x_BND.float() * weight_BN1).sum(dim=1) / weight_BN1.sum(dim=1).clamp(min=1)


def valid_tokens(valid_B: Tensor, tokens: int) -> Tensor:
    """(B, N) whether a token is one of the first ``valid`` of its row, which lie wholly within the valid samples."""
    return torch.lt(torch.arange(tokens, device=valid_B.device), valid_B[:, None])
