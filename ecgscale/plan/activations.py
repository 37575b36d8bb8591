"""What the forward pass of one micro-step keeps for the backward pass, in bytes, by part of the model.

Each term below is a tensor that autograd keeps; tests hold the sums against
`torch.autograd.graph.saved_tensors_hooks` around the real modules. Weights, which are there anyway, do not count;
neither does what only lives within a module (``working_bytes`` is about that).

Letters: B rows, T samples, N tokens, M masked places, K negatives, C stem channels, D width, F feed-forward width,
H heads, Q code width, V codes of all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ecgscale.model.encoder import ModelConfig
from ecgscale.model.position import FFT_KERNEL, fast_length
from ecgscale.model.stem import BLOCKS
from ecgscale.objectives import ObjectiveConfig
from ecgscale.objectives.cmsc import CMSC
from ecgscale.objectives.keys import GlobalContrast
from ecgscale.objectives.masking import masked_tokens
from ecgscale.objectives.wav2vec2 import Wav2Vec2
from ecgscale.record import LEADS

_FP32 = 4
_INT64 = _COMPLEX = 8


@dataclass(frozen=True)
class Storage:
    """How tensors are kept, which depends on device and precision."""

    element: int
    """Bytes of an element of the model's arithmetic: 4 in fp32, 2 in bf16."""
    mask: int
    """Bytes of an element of a dropout mask: 1 on a GPU; a CPU keeps it as a number of the arithmetic."""
    attention: Literal["flash", "plain"]
    """flash: attention weights are computed again in the backward pass. plain: they are kept, with dropout thrice."""
    fused_stem: bool
    """The fused stem keeps the int16 signal and no activation of its first block."""
    position: Literal["direct", "fft"]
    """How the positional convolution is computed."""

    @staticmethod
    def on(device: str, precision: str, model: ModelConfig) -> Storage:
        """What runs on ``cpu`` or ``cuda``."""
        element = {"fp32": 4, "bf16": 2}[precision]
        if device == "cuda":
            return Storage(element, 1, "flash", True, "direct")
        return Storage(element, element, "plain", False, "fft" if model.position_kernel >= FFT_KERNEL else "direct")


def saved_bytes(
    model: ModelConfig,
    objective: ObjectiveConfig,
    rows: int,
    samples: int,
    storage: Storage,
    checkpointed_layers: int = 0,
    contrast_rows: int | None = None,
) -> dict[str, int]:
    """Bytes that are kept at the end of a forward pass, by part.

    Args:
        rows: segments that a rank works through in a micro-step.
        samples: of a segment.
        checkpointed_layers: layers of the transformer that keep their input only.
        contrast_rows: segments of all ranks, among which the global objective contrasts; the rank's own by default.
    """
    tokens, local = samples // model.patch_samples, isinstance(objective, Wav2Vec2.Config)
    once = min(checkpointed_layers, model.depth)
    kept = {
        "stem": rows * _stem(model, samples, storage),
        "features": rows * _features(model, tokens, storage, local),
        "position": rows * _position(model, tokens, storage) + _position_weight(model, tokens, storage),
        "layers": rows * (model.depth - once) * layer_bytes(model, tokens, storage)
        + rows * once * tokens * model.width * storage.element,
    }
    if model.pre_norm:
        kept["norm"] = rows * _norm(tokens, model.width, storage)
    if isinstance(objective, Wav2Vec2.Config):
        usage = 3 * objective.code_groups * objective.codes * _FP32
        kept["local_head"] = rows * _local_head(model, objective, tokens, storage) + usage
    kept["contrast"] = _contrast(model, objective, contrast_rows or rows)
    return kept


def layer_bytes(model: ModelConfig, tokens: int, storage: Storage) -> int:
    """Of one layer of the transformer and one row."""
    width, element = tokens * model.width, storage.element
    kept = width * element  # input of query, key and value
    kept += _attention(model, tokens, storage)
    kept += width * element  # input of the projection behind the attention
    kept += width * element  # input of the feed-forward half
    kept += 2 * tokens * model.ffn_width * element  # before and behind the GELU
    kept += 2 * _norm(tokens, model.width, storage)
    if model.dropout:
        kept += 2 * width * storage.mask
    return kept


def _attention(model: ModelConfig, tokens: int, storage: Storage) -> int:
    """Between the projections."""
    kept = 3 * tokens * model.width * storage.element  # query, key and value
    if storage.attention == "flash":
        return kept + model.heads * tokens * _FP32  # the logarithm of each row's sum
    weights = model.heads * tokens * tokens
    return kept + weights * (2 * storage.element + storage.mask if model.attention_dropout else storage.element)


def _norm(tokens: int, width: int, storage: Storage) -> int:
    """Input, mean and reciprocal deviation of a LayerNorm."""
    return tokens * (width * storage.element + 2 * _FP32)


def _stem(model: ModelConfig, samples: int, storage: Storage) -> int:
    leads, channels, element = len(LEADS), model.stem_channels, storage.element
    signal = leads * samples * (2 if storage.fused_stem else element)
    if model.stem == "patch":
        return signal if storage.fused_stem else samples // model.patch_samples * model.patch_samples * leads * element
    lengths = [samples >> block for block in range(1, BLOCKS + 1)]
    if storage.fused_stem:
        return signal + sum(lengths[1:]) * channels * element
    # Block 0: before its norm, before its GELU, behind it; the later ones: before and behind; the last one's output is
    # kept by what follows.
    kept = (3 * lengths[0] + 2 * sum(lengths[1:-1]) + lengths[-1]) * channels * element
    return signal + kept + 2 * channels * element


def _features(model: ModelConfig, tokens: int, storage: Storage, local: bool) -> int:
    """LayerNorm of the stem's output, projection, dropouts, the mask token, and what the objective takes of them."""
    channels, width, element = tokens * model.stem_channels, tokens * model.width, storage.element
    kept = _norm(tokens, model.stem_channels, storage)
    kept += channels * element  # input of the projection
    if model.feature_dropout:
        kept += width * storage.mask
    if model.dropout:
        kept += width * storage.mask
    if not model.pre_norm:
        kept += _norm(tokens, model.width, storage)
    if local:
        kept += width * element  # the encoder's output, of which places are taken
        kept += tokens * _INT64  # their numbers
        kept += tokens  # which tokens are masked
        if model.feature_dropout:
            kept += channels * (element + storage.mask)  # the targets
        if element < _FP32:
            kept += channels * _FP32  # the feature penalty is computed in fp32
    return kept


def _position(model: ModelConfig, tokens: int, storage: Storage) -> int:
    """Input of the positional convolution, for the FFT with a margin and as a spectrum; its output before the GELU."""
    if storage.position == "fft":
        length = _fft_length(model, tokens)
        spectrum = (length // 2 + 1) * _COMPLEX
        return model.width * (length * _FP32 + spectrum + tokens * storage.element)
    outputs = tokens + 1 - model.position_kernel % 2
    return (tokens + outputs) * model.width * storage.element


def _position_weight(model: ModelConfig, tokens: int, storage: Storage) -> int:
    """The kernel that is made of direction and magnitude, or its spectrum; and in bf16 the direction in fp32."""
    weight = model.width * (model.width // model.position_groups)
    direction = _FP32 * model.position_kernel if storage.element < _FP32 else 0
    if storage.position == "fft":
        length = _fft_length(model, tokens)
        return weight * (length * _FP32 + (length // 2 + 1) * _COMPLEX + direction)
    return weight * (model.position_kernel * storage.element + direction)


def _fft_length(model: ModelConfig, tokens: int) -> int:
    return fast_length(max(tokens + model.position_kernel // 2, model.position_kernel))


def _local_head(model: ModelConfig, objective: Wav2Vec2.Config, tokens: int, storage: Storage) -> int:
    """Quantizer, projections and similarities of the masked places of a row."""
    places = masked_tokens(tokens, objective.time_mask_share)
    codes, width, negatives = objective.code_groups * objective.codes, objective.code_width, objective.negatives
    kept = model.stem_channels * storage.element  # input of the quantizer
    kept += codes * (2 * _FP32 + storage.element)  # probabilities without and with noise, and the choice
    kept += (model.width + width) * storage.element  # inputs of the two projections
    kept += 4 * width * _FP32  # what is normalised, and the normalised, of both sides
    kept += places * _FP32 + negatives * (_INT64 + 1)  # similarities, which of them are negatives, which excluded
    kept += (1 + negatives) * _FP32  # logits
    kept += 7 * _FP32  # norms, losses and weights
    return places * kept


def _contrast(model: ModelConfig, objective: ObjectiveConfig, rows: int) -> int:
    """Embeddings and similarities of the segments of all ranks."""
    if not isinstance(objective, GlobalContrast):
        return 0
    if not isinstance(objective, CMSC.Config):
        return 2 * rows * model.width * _FP32 + 5 * rows * rows * _FP32
    # Embeddings, similarities with the mask that belongs to them: of A with B; of A and of B with themselves too.
    embeddings, similarities, masks = (2, 3, 3) if objective.global_form == "nt_xent" else (1, 2, 1)
    return embeddings * rows * model.width * _FP32 + (similarities * _FP32 + masks) * (rows // 2) ** 2


def working_bytes(
    model: ModelConfig, objective: ObjectiveConfig, rows: int, samples: int, storage: Storage
) -> tuple[int, int]:
    """What lives beside the kept tensors for a short time: most at the end of the forward and in the backward pass.

    Forward: noise, one-hot codes and their products in the quantizer. Backward: gradients on both sides of the GELU of
    one layer, of its input and of its residual, or those of the attention weights where they are kept.
    """
    tokens = samples // model.patch_samples
    forward = 0
    if isinstance(objective, Wav2Vec2.Config):
        places = masked_tokens(tokens, objective.time_mask_share)
        forward = 5 * rows * places * objective.code_groups * objective.codes * _FP32
    token = rows * tokens * storage.element
    backward = token * (2 * model.ffn_width + 2 * model.width)
    if storage.attention == "plain":
        backward = max(backward, token * (2 * model.heads * tokens + 5 * model.width))
    return forward, backward
