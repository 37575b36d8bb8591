"""The encoder, whole: stem, projection, positional convolution, transformer.

Oh et al. 2022 after wav2vec 2.0 (Baevski et al. 2020), weight-compatible with the public reference implementation.
Shape suffixes: B rows, N patches (tokens), C stem channels, D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model import DEFAULT
from ecgscale.model.base import Encoder, EncoderConfig, Features, valid_tokens
from ecgscale.model.dropout import add_dropout, dropout, kept_elements
from ecgscale.model.position import PositionalConvolution
from ecgscale.model.stem import CONV_PATCH_SAMPLES, ConvStem, PatchStem, check_kernels
from ecgscale_kernels import LONGEST_PATCH

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
class ModelConfig(EncoderConfig):
    """transformer: stem, projection, positional convolution, transformer. ``preset`` fills in what is not given."""

    encoder: str = DEFAULT
    patch_samples: int = 16
    """Samples of a token; the convolutional stem always has 16. Above 256, plain PyTorch embeds them on a GPU too."""
    width: int = 768
    """Width of the transformer."""
    preset: str = "base"
    """A named size, from tiny to gigantic (7 billion parameters): where the other fields begin."""
    stem: Literal["conv", "patch"] = "conv"
    """conv: four convolutions that halve the samples, as in the paper. patch: one linear map per patch."""
    stem_channels: int = 256
    """Channels of the stem."""
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

    training_keys: ClassVar = ("preset", "dropout", "attention_dropout", "feature_dropout", "stem_gradient_scale")

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

    @classmethod
    def filled_in(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The keys that are given, and of the others those of ``preset``. Raises InputError for an unknown one."""
        from ecgscale.model.presets import PRESETS

        preset = given.get("preset")
        if preset is None:
            return given
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(f"model.preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
        return asdict(PRESETS[preset]) | given

    def refuse_size(self, tensors: int, numbers: int) -> None:
        """Raises InputError where so many weights of so many numbers together cannot be of this shape."""
        if self.depth > tensors:
            raise InputError(f"depth {str(self.depth)[:20]}, but there are {tensors} weights")
        for name in SIZES:
            if (size := getattr(self, name)) > numbers:
                raise InputError(f"{name} {str(size)[:20]}, but all weights together are {numbers} numbers")

    def kernels(self, device: torch.device) -> str:
        """Which stem and which kernels run on a device."""
        chosen = check_kernels(device)
        if self.stem == "patch" and self.patch_samples > LONGEST_PATCH:
            chosen = "reference"
        return f"{self.stem} stem, {chosen} kernels on {device.type}"

    def in_short(self) -> str:
        """Stem, layers and width."""
        return f"{self.stem} stem, {self.depth} layers of width {self.width}"

    def in_full(self) -> str:
        """All sizes."""
        return (
            f"{self.depth} layers of width {self.width}, {self.heads} heads, feed-forward {self.ffn_width}"
            f"{', norm first' if self.pre_norm else ''}; {self.stem} stem of {self.stem_channels} channels, "
            f"{self.patch_samples} samples a token"
        )


def refuse_others(model: EncoderConfig, what: str) -> None:
    """Raises InputError where ``what`` would need to know another encoder than the transformer."""
    if not isinstance(model, ModelConfig):
        raise InputError(f"model.encoder {model.encoder}: {what} knows the transformer alone")


class ECGEncoder(Encoder):
    """Counts -> one vector per token."""

    Config = ModelConfig
    masks_tokens = True
    config: ModelConfig

    def __init__(self, config: ModelConfig, activation_checkpointing: bool | int = False) -> None:
        """``activation_checkpointing``: how many of the layers, from the first, are recomputed in the backward pass."""
        super().__init__(config)
        self.feature_dropout = config.feature_dropout
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
        self.recompute(activation_checkpointing)
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
        x_BND = self.through_blocks(x_BND, attend_B11N)
        if self.config.pre_norm:
            x_BND = self.norm(x_BND)
        return x_BND

    @property
    def feature_width(self) -> int:
        """Channels of the stem."""
        return self.config.stem_channels

    def blocks(self) -> Sequence[nn.Module]:
        """The layers of the transformer."""
        return self.layers  # type: ignore[return-value]

    def unused_unmasked(self) -> Sequence[nn.Module]:
        """What stands for masked tokens."""
        return [self.mask]

    def stem_modules(self) -> Sequence[nn.Module]:
        """The stem."""
        return [self.stem]


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
