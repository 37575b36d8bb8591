"""Named sizes of the encoder: from 0.4 million to 7 billion parameters; a test holds the exact counts.

Names are those that BERT and vision transformers use for their sizes; a number behind one is the layers of a variant.
Feed-forward layers are four times as wide as the model. What changes on the way up:

- Heads are 64 wide, from ``huge`` 128, which attention kernels on GPUs are fastest with.
- Channels of one group of the positional convolution stay 64 from ``large``, or its weights would grow with the square
  of the width.
- From ``huge`` the stem has 512 channels, as wav2vec 2.0. A token is 12 × 16 numbers at most: more adds only cost.
- From ``huge`` norms come before each half of a layer. After it, gradients near the output are large at the start and
  the more layers there are, the longer a warm-up is needed (Xiong et al. 2020); XLS-R (Babu et al. 2021), with 48
  layers, does the same. ``large`` and smaller keep the norm after, as the published weights have it.
"""

from __future__ import annotations

from ecgscale.model.encoder import ModelConfig


def _billions(preset: str, width: int, depth: int) -> ModelConfig:
    return ModelConfig(
        preset=preset,
        stem_channels=512,
        width=width,
        depth=depth,
        heads=width // 128,
        ffn_width=4 * width,
        position_groups=width // 64,
        pre_norm=True,
    )


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
    "mini": ModelConfig(
        preset="mini", stem_channels=64, width=128, depth=4, heads=2, ffn_width=512, position_kernel=64
    ),
    "small": ModelConfig(
        preset="small", stem_channels=128, width=256, depth=6, heads=4, ffn_width=1024, position_kernel=64
    ),
    "small12": ModelConfig(
        preset="small12", stem_channels=128, width=256, depth=12, heads=4, ffn_width=1024, position_kernel=64
    ),
    "medium": ModelConfig(preset="medium", width=512, heads=8, ffn_width=2048),
    "base8": ModelConfig(preset="base8", depth=8),
    "base": ModelConfig(),
    "large": ModelConfig(preset="large", width=1024, depth=24, heads=16, ffn_width=4096),
    "huge": _billions("huge", width=1536, depth=36),
    "giant": _billions("giant", width=2560, depth=38),
    "gigantic": _billions("gigantic", width=4096, depth=34),
}


def preset_of(model: ModelConfig) -> str:
    """The preset of the same shape; base where none is, whose fields then are all given."""
    for name, preset in PRESETS.items():
        if all(getattr(preset, field) == getattr(model, field) for field in ModelConfig.shape_keys()):
            return name
    return "base"
