"""Named sizes of the encoder, with exact parameter counts."""

from __future__ import annotations

from ecgscale.model.encoder import SIZES, ModelConfig

PRESETS = {
    "tiny": ModelConfig(
        preset="tiny",
        stem_channels=48,
        width=96,
        depth=3,
        heads=4,
        ffn_width=384,
        position_kernel=32,
        position_groups=8,
    ),
    "small": ModelConfig(
        preset="small", stem_channels=128, width=256, depth=6, heads=4, ffn_width=1024, position_kernel=64
    ),
    "base8": ModelConfig(preset="base8", depth=8),
    "base": ModelConfig(),
    "large": ModelConfig(preset="large", width=1024, depth=24, heads=16, ffn_width=4096),
}

# What weights and embeddings depend on; the other fields (dropout, the stem's gradient scale) are of training alone.
SHAPE_FIELDS = ("stem", *SIZES, "pre_norm", "stem_bias")


def preset_of(model: ModelConfig) -> str:
    """The preset of the same shape; base where none is, whose fields then are all given."""
    for name, preset in PRESETS.items():
        if all(getattr(preset, field) == getattr(model, field) for field in SHAPE_FIELDS):
            return name
    return "base"
