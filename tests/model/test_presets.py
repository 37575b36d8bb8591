"""Named sizes: exact counts from 0.4 million to 7 billion parameters, and shapes that belong together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ecgscale.cost import parameters
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.model.presets import PRESETS, preset_of
from ecgscale.objectives import build_objective, objective_config

COUNTS = {  # with the pretraining heads, without
    "tiny": (596_576, 392_672),
    "mini": (1_116_224, 893_888),
    "small": (5_432_768, 5_136_704),
    "small12": (10_171_328, 9_875_264),
    "medium": (40_903_424, 40_459_904),
    "base8": (62_531_584, 62_022_528),
    "base": (90_883_072, 90_374_016),
    "large": (311_940_352, 311_365_760),
    "huge": (1_035_768_576, 1_034_899_072),
    "giant": (3_014_720_256, 3_013_588_608),
    "gigantic": (6_885_698_816, 6_884_173_952),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_exactly_as_many_parameters_as_they_should(preset: str) -> None:
    with torch.device("meta"):
        objective = build_objective(PRESETS[preset], objective_config(), seed=0, rate_hz=500)
    total = sum(parameter.numel() for parameter in objective.parameters())
    assert (total, sum(parameter.numel() for parameter in objective.encoder.parameters())) == COUNTS[preset]
    assert sum(parameters(PRESETS[preset], objective_config()).values()) == total, "what a plan reckons with"


def test_every_preset_is_counted_and_they_stand_in_the_order_of_their_size() -> None:
    assert COUNTS.keys() == PRESETS.keys()
    assert all(smaller < larger for (smaller, _), (larger, _) in pairwise(COUNTS.values()))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_found_by_its_shape(preset: str) -> None:
    assert PRESETS[preset].preset == preset
    assert preset_of(ModelConfig(**vars(PRESETS[preset]) | {"preset": "base", "dropout": 0.3})) == preset


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_shapes_are_those_that_hardware_likes(preset: str) -> None:
    model = PRESETS[preset]
    assert model.width // model.heads in (64, 128)
    assert model.ffn_width == 4 * model.width
    assert model.width % 64 == model.stem_channels % 64 == 0
    assert model.pre_norm == (model.depth > 24), "deep ones need the norm before"


def test_the_pre_norm_presets_compute_something() -> None:
    """The shape of gigantic, a 64th as wide and 4 layers: gradients reach every parameter but the mask token."""
    model = PRESETS["gigantic"]
    narrow = {"width": 64, "ffn_width": 256, "heads": 2, "position_groups": 1, "depth": 4, "stem_channels": 16}
    torch.manual_seed(0)
    encoder = ECGEncoder(ModelConfig(**vars(model) | narrow)).eval()
    out_BND = encoder.contextualise(torch.randn(2, 9, 64), None)
    out_BND[..., 0].sum().backward()
    blind = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert all(name.startswith(("stem", "feature", "mask")) for name in blind), blind
    assert out_BND.isfinite().all()
