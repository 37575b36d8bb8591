"""The encoder, whole: stem, projection, positional convolution, transformer.

Oh et al. 2022 after wav2vec 2.0 (Baevski et al. 2020), weight-compatible with the public reference implementation.
Shape suffixes: B rows, N patches (tokens), C stem channels, D width, H heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.model.dropout import add_dropout, dropout, kept_elements
from ecgscale.model.position import PositionalConvolution
from ecgscale.model.stem import CONV_PATCH_SAMPLES, ConvStem, PatchStem
from ecgscale.record import LEADS

# Fields of ModelConfig that count something.
SIZES = (
    "patch_samples",
    "stem_channels",
    "width",
    "depth",
    "heads",
    "ffn_width",
    "position_kernel",
    "position_groups",
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the encoder. ``preset`` fills in the fields that are not given."""

    preset: str = "base"
    """A named size, from tiny to gigantic (7 billion parameters): where the other fields begin."""
    stem: Literal["conv", "patch"] = "conv"
    """conv: four convolutions that halve the samples, as in the paper. patch: one linear map per patch."""
    patch_samples: int = 16
    """Samples of a token; the convolutional stem always has 16. Above 256, plain PyTorch embeds them on a GPU too."""
    stem_channels: int = 256
    """Channels of the stem."""
    width: int = 768
    """Width of the transformer."""
    depth: int = 12
    """Transformer layers."""
    heads: int = 12
    """Attention heads."""
    ffn_width: int = 3072
    """Width of the feed-forward layers."""
    position_kernel: int = 128
    """Kernel of the positional convolution in tokens."""
    position_groups: int = 16
    """Groups of the positional convolution."""
    dropout: float = 0.1
    """Dropout in the transformer."""
    attention_dropout: float = 0.1
    """Dropout of the attention weights."""
    feature_dropout: float = 0.1
    """Dropout of the stem's features, before the transformer and before the quantizer."""
    pre_norm: bool = False
    """Norm before each layer's two halves instead of after."""
    stem_bias: bool = False
    """Bias in the stem."""
    stem_gradient_scale: float = 0.1
    """Factor on the gradients that flow into the stem."""

    def __post_init__(self) -> None:
        if self.stem not in ("conv", "patch"):
            raise InputError(f"model.stem {self.stem!r}: give conv or patch")
        if self.stem == "conv" and self.patch_samples != CONV_PATCH_SAMPLES:
            raise InputError(
                f"model.patch_samples {self.patch_samples}: the conv stem has {CONV_PATCH_SAMPLES}; "
                "leave it out or choose model.stem patch"
            )
        for name in SIZES:
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} {getattr(self, name)}: give 1 or more")
        if self.width % self.heads:
            raise InputError(f"model.width {self.width} is no multiple of model.heads {self.heads}")
        if self.width % self.position_groups:
            raise InputError(f"model.width {self.width} is no multiple of model.position_groups {self.position_groups}")
        if not 0 <= self.stem_gradient_scale < float("inf"):  # NaN neither
            raise InputError(f"model.stem_gradient_scale {self.stem_gradient_scale:g}: give 0 or more")
        for name in ("dropout", "attention_dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"model.{name} {getattr(self, name)}: give a probability below 1")


class Features(NamedTuple):
    """What the stem gives, before any masking in time."""

    stem_BNC: Tensor  # raw output of the stem, for its penalty
    normed_BNC: Tensor  # after LayerNorm: the targets of the local objective
    token_BND: Tensor  # projected to the transformer's width
    valid_BN: Tensor | None  # tokens that lie in the recording; None: all


class ECGEncoder(nn.Module):
    """Counts -> one vector per token."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool | int = False) -> None:
        """``activation_checkpointing``: how many of the layers, from the first, are recomputed in the backward pass."""
        super().__init__()
        self.config = config
        self.stem: ConvStem | PatchStem
        if config.stem == "conv":
            self.stem = ConvStem(len(LEADS), config.stem_channels, config.stem_bias)
        else:
            self.stem = PatchStem(len(LEADS), config.stem_channels, config.patch_samples, config.stem_bias)
        self.feature_norm = nn.LayerNorm(config.stem_channels)
        self.feature_projection = nn.Linear(config.stem_channels, config.width)
        self.mask = MaskToken(config.width)
        self.position = PositionalConvolution(config.width, config.position_kernel, config.position_groups)
        self.norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.depth))
        self.recomputed_layers = recomputed_layers(activation_checkpointing, config.depth)
        self.layers.apply(_bert_init)
        nn.init.xavier_uniform_(self.feature_projection.weight)

    def features(self, batch: ECGBatch) -> Features:
        """Stem, norm and projection; leads are masked by the gains of the batch."""
        stem_BNC = _scale_gradient(self.stem(batch), self.config.stem_gradient_scale)
        normed_BNC = self.feature_norm(stem_BNC)
        token_BND = dropout(self.feature_projection(normed_BNC), self.config.feature_dropout, self.training)
        valid_BN = None
        if batch.padded:
            valid_BN = valid_tokens(batch.length_B // self.config.patch_samples, stem_BNC.shape[1])
        return Features(stem_BNC, normed_BNC, token_BND, valid_BN)

    def contextualise(self, token_BND: Tensor, valid_BN: Tensor | None, masked_BN: Tensor | None = None) -> Tensor:
        """The transformer over tokens (B, N, D); ``masked_BN`` tokens are replaced by the mask token first."""
        if masked_BN is not None:
            token_BND = self.mask(token_BND, masked_BN)
        x_BND: Tensor = token_BND + self.position(token_BND)
        if not self.config.pre_norm:
            x_BND = self.norm(x_BND)
        x_BND = dropout(x_BND, self.config.dropout, self.training)
        attend_B11N = None if valid_BN is None else valid_BN[:, None, None, :]
        recomputed = self.recomputed_layers if self.training else 0
        for number, layer in enumerate(self.layers):
            if number < recomputed:
                x_BND = checkpoint(layer, x_BND, attend_B11N, use_reentrant=False)
            else:
                x_BND = layer(x_BND, attend_B11N)
        if self.config.pre_norm:
            x_BND = self.norm(x_BND)
        return x_BND

    def forward(self, batch: ECGBatch) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D) of an unmasked batch and which of them are valid (None: all)."""
        features = self.features(batch)
        return self.contextualise(features.token_BND, features.valid_BN), features.valid_BN


def recomputed_layers(activation_checkpointing: bool | int, depth: int) -> int:
    """How many layers are recomputed: True stands for all of them. Raises InputError for more than there are."""
    if activation_checkpointing > depth:
        raise InputError(
            f"engine.activation_checkpointing {activation_checkpointing}: the model has {depth} layers; give at most "
            "that many, or true for all"
        )
    return depth if activation_checkpointing is True else int(activation_checkpointing)


def mean_over_time(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """(B, D) mean of the valid tokens, in float32."""
    if valid_BN is None:
        return x_BND.float().mean(dim=1)
    weight_BN1 = valid_BN[..., None].float()
    return (x_BND.float() * weight_BN1).sum(dim=1) / weight_BN1.sum(dim=1).clamp(min=1)


def valid_tokens(valid_B: Tensor, tokens: int) -> Tensor:
    """(B, N) whether a token is one of the first ``valid`` of its row, which lie wholly within the valid samples."""
    return torch.lt(torch.arange(tokens, device=valid_B.device), valid_B[:, None])


class MaskToken(nn.Module):
    """Puts one learned vector in place of masked tokens.

    A module of its own, since ZeRO stage 3 gathers a parameter when the forward of its owner runs.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(width).uniform_())

    def forward(self, token_BND: Tensor, masked_BN: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return torch.where(masked_BN[..., None], self.token, token_BND)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.pre_norm = config.heads, config.pre_norm
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width)
        self.ffn_in = nn.Linear(config.width, config.ffn_width)
        self.ffn_out = nn.Linear(config.ffn_width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width)

    def forward(self, x_BND: Tensor, attend_B11N: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, D); keys where ``attend_B11N`` is False are not attended to."""
        if self.pre_norm:
            x_BND = self._added(x_BND, self._attention(self.attention_norm(x_BND), attend_B11N))
            return self._added(x_BND, self._ffn(self.ffn_norm(x_BND)))
        x_BND = self.attention_norm(self._added(x_BND, self._attention(x_BND, attend_B11N)))
        normed: Tensor = self.ffn_norm(self._added(x_BND, self._ffn(x_BND)))
        return normed

    def _added(self, x_BND: Tensor, y_BND: Tensor) -> Tensor:
        return add_dropout(x_BND, y_BND, self.dropout, self.training)

    def _attention(self, x_BND: Tensor, attend_B11N: Tensor | None) -> Tensor:
        batch, tokens, width = x_BND.shape
        q_BHNd, k_BHNd, v_BHNd = (
            self.query_key_value(x_BND).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        probability = self.attention_dropout if self.training else 0.0
        if attend_B11N is None and torch.is_grad_enabled() and x_BND.device.type == "cpu":
            y_BHNd = _attention_in_steps(q_BHNd, k_BHNd, v_BHNd, probability)
        else:
            y_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attend_B11N, probability)
        y_BND: Tensor = self.attention_out(y_BHNd.transpose(1, 2).reshape(batch, tokens, width))
        return y_BND

    def _ffn(self, x_BND: Tensor) -> Tensor:
        y_BND: Tensor = self.ffn_out(F.gelu(self.ffn_in(x_BND)))
        return y_BND


def _attention_in_steps(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, probability: float) -> Tensor:
    """Attention for training on a CPU, with its weights in memory: PyTorch 2.13 has no fused one with dropout there.

    Without dropout it has, but forward and backward take 1.1 times as long in float32, and 2.9 times in bfloat16, where
    products and softmax here hand each other bfloat16.
    """
    weight_BHNN = (q_BHNd * q_BHNd.shape[-1] ** -0.5 @ k_BHNd.transpose(2, 3)).softmax(dim=-1)
    if probability:
        kept_BHNN, scale = kept_elements(weight_BHNN, probability)
        weight_BHNN, v_BHNd = weight_BHNN * kept_BHNN, v_BHNd * scale
    y_BHNd: Tensor = weight_BHNN @ v_BHNd
    return y_BHNd


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None  # type: ignore[attr-defined]


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return x
    scaled: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled


def _bert_init(module: nn.Module) -> None:
    """Normal(0, 0.02) weights and zero biases, as wav2vec 2.0 begins its transformer."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
