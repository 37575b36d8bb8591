"""Counts of parameters and FLOPs, against the modules themselves and torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecgscale.cost import encoder_flops, parameters, step_flops
from ecgscale.data.batch import ECGBatch
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import OBJECTIVES, Objective, build_objective, objective_config
from small_jobs import config_of

ROWS, SAMPLES = 4, 2500


def counted(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs of all that runs ("Global"), and by the path of each module below the outermost one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return {name.partition(".")[2] or name: sum(of.values()) for name, of in counter.get_flop_counts().items()}


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_encoder_of_each_preset(preset, stem, make_batch) -> None:
    config = replace(PRESETS[preset], stem=stem)
    batch = make_batch(torch.zeros(ROWS, 12, SAMPLES, dtype=torch.int16)).to(torch.device("meta"))
    with torch.device("meta"):
        encoder = ECGEncoder(config)
    found = counted(lambda: encoder(batch)[0].sum().backward())
    expected = {part: flops.total for part, flops in step_flops(config, objective_config(), ROWS, SAMPLES).items()}
    assert found["stem"] == expected["stem"]
    assert found["feature_projection"] == expected["feature_projection"]
    layers = sum(count for name, count in found.items() if name.startswith("layers.") and name.count(".") == 1)
    assert layers == expected["attention"] + expected["ffn"]


@pytest.mark.parametrize("kernel", [15, 16])
def test_position(kernel) -> None:
    """Its forward pass: of grouped convolutions, torch's counter takes the backward pass for one without groups."""
    config = replace(PRESETS["tiny"], position_kernel=kernel)
    x_BDN = torch.zeros(ROWS, config.width, SAMPLES // 16 + kernel - 1, device="meta")
    weight = torch.zeros(config.width, config.width // config.position_groups, kernel, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.conv1d(x_BDN, weight, groups=config.position_groups)
    assert counter.get_total_flops() == ROWS * encoder_flops(config, SAMPLES)["position"]


@pytest.mark.parametrize("form", ["reference", "nt_xent"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_step_of_each_objective(name, form, small_model_config, make_batch) -> None:
    model = replace(small_model_config, position_kernel=15)
    config = config_of(name, global_form=form, augmentations=["none"])
    module = build_objective(model, config, seed=0, rate_hz=500.0)
    row = torch.arange(ROWS)
    batch = module.view(
        make_batch(
            torch.randint(-500, 500, (ROWS, 12, 500), dtype=torch.int16),
            segment_B=row // 2,
            position_B=row % 2,
            patient_B=row % 2,
        )
    )
    found = counted(lambda: Given(module)(batch).backward())
    expected = {part: flops.total for part, flops in step_flops(model, config, ROWS, 500).items()}
    assert found["Global"] - found["module.encoder.position"] == sum(expected.values()) - expected["position"]


class Given(nn.Module):
    """The loss of a batch whose views are made."""

    def __init__(self, module: Objective) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: ECGBatch) -> Tensor:
        return self.module.losses(batch, self.module.draw(batch, share=True), step=0, share=True)[0]


def test_contrast_of_all_ranks_and_rows() -> None:
    model, config = PRESETS["base"], objective_config()
    one, two = (step_flops(model, config, rows, SAMPLES, 1024) for rows in (16, 32))
    assert one["contrast"] == two["contrast"] == (2 * 512 * 512 * 768, 4 * 512 * 512 * 768)
    assert all(two[part].total == 2 * one[part].total for part in one if part != "contrast")


def test_parameters() -> None:
    base = parameters(ModelConfig(), objective_config())
    assert sum(base.values()) == 90_883_072  # of the reference implementation
    assert base["mask"] == 768
    assert set(base) - set(parameters(ModelConfig())) == {"quantizer", "local_head"}
