"""What a model costs: parameters, and floating-point operations of a training step, by module.

Model FLOPs: what the mathematics asks for, two per multiply-add of each matrix product and convolution, as
`torch.utils.flop_counter` counts them. Nothing is counted for norms, activations and other elementwise work, for
layers that are recomputed in the backward pass, or for products that a kernel does in another way.

Letters: N tokens, M masked places, P pairs of segments, D width, C stem channels, Q code width.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from ecgscale.model import EncoderConfig
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.stem import BLOCKS
from ecgscale.objectives import ObjectiveConfig, build_objective
from ecgscale.objectives.cmsc import CMSC
from ecgscale.objectives.keys import GlobalContrast
from ecgscale.objectives.masking import masked_tokens
from ecgscale.objectives.wav2vec2 import Wav2Vec2
from ecgscale.record import LEADS


class Flops(NamedTuple):
    """Floating-point operations of the two passes."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def parameters(model: EncoderConfig, objective: ObjectiveConfig | None = None) -> dict[str, int]:
    """Trained numbers by module: those of the encoder, and of the heads of an objective. Nothing is allocated."""
    with torch.device("meta"):
        module = build_objective(model, objective or CMSC.Config(), seed=0, rate_hz=500.0)
    counts: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        counts[_part(name)] += parameter.numel()
    return dict(counts)


def _part(name: str) -> str:
    """encoder.layers.3.ffn_in.weight -> ffn; local_head.quantizer.logits.bias -> quantizer."""
    owner, part, *rest = name.split(".")
    if owner != "encoder":
        return "quantizer" if part == "quantizer" else owner
    if part != "layers":
        return part
    return "ffn" if rest[1].startswith("ffn") else "attention"


def step_flops(
    model: EncoderConfig, objective: ObjectiveConfig, rows: int, samples: int, contrast_rows: int | None = None
) -> dict[str, Flops]:
    """Forward and backward pass of one rank's micro-step, by module; nothing of encoders that are not ours.

    Args:
        rows: segments that the rank works through.
        samples: of a segment.
        contrast_rows: segments of all ranks, among which the global objective contrasts; the rank's own by default.
    """
    if not isinstance(model, ModelConfig):
        return {}
    tokens = samples // model.patch_samples
    forward = encoder_flops(model, samples)
    backward = {part: 2 * count for part, count in forward.items()}
    backward["stem"] -= _first_product(model, samples)  # no gradient of the signal
    if isinstance(objective, Wav2Vec2.Config):
        head = _local_flops(model, objective, masked_tokens(tokens, objective.time_mask_share))
        forward |= head
        backward |= {part: 2 * count for part, count in head.items()}
    found = {part: Flops(rows * count, rows * backward[part]) for part, count in forward.items()}
    contrast = _contrast_flops(model, objective, contrast_rows or rows)
    return found | ({"contrast": Flops(contrast, 2 * contrast)} if contrast else {})


def encoder_flops(model: ModelConfig, samples: int) -> dict[str, int]:
    """Forward pass of the encoder over one segment, by module."""
    tokens, width = samples // model.patch_samples, model.width
    return {
        "stem": _first_product(model, samples) + _later_blocks(model, samples),
        "feature_projection": 2 * tokens * model.stem_channels * width,
        "position": 2 * tokens * width * (width // model.position_groups) * model.position_kernel,
        "attention": model.depth * (8 * tokens * width * width + 4 * tokens * tokens * width),
        "ffn": model.depth * 4 * tokens * width * model.ffn_width,
    }


def _first_product(model: ModelConfig, samples: int) -> int:
    """Of the stem's first block, or of all of the linear stem."""
    width = model.patch_samples if model.stem == "patch" else 2
    return 2 * (samples // width) * len(LEADS) * width * model.stem_channels


def _later_blocks(model: ModelConfig, samples: int) -> int:
    if model.stem == "patch":
        return 0
    return sum(4 * (samples >> block) * model.stem_channels**2 for block in range(2, BLOCKS + 1))


def _local_flops(model: ModelConfig, objective: Wav2Vec2.Config, masked: int) -> dict[str, int]:
    """Quantizer, the two projections and the similarities of a segment's masked places."""
    width, codes = objective.code_width, objective.code_groups * objective.codes
    return {
        "quantizer": 2 * masked * codes * (model.stem_channels + width // objective.code_groups),
        "local_head": 2 * masked * width * (width + model.width + masked),
    }


def _contrast_flops(model: ModelConfig, objective: ObjectiveConfig, rows: int) -> int:
    """Similarities of the embeddings of all ranks; every rank computes all of them."""
    if not isinstance(objective, GlobalContrast):
        return 0
    if not isinstance(objective, CMSC.Config):
        return 2 * rows * rows * model.width
    pairs = rows // 2
    products = 3 if objective.global_form == "nt_xent" else 1
    return 2 * products * pairs * pairs * model.width
