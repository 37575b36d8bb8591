"""Costs that few and small passes without data determine, against torch's counter and autograd on real modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecgscale.cost import Costs, costs_of, encoder_flops, parameters, step_flops
from ecgscale.data.batch import ECGBatch, synthetic_batch
from ecgscale.dry_run import held_by, part_of
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import OBJECTIVES, Objective, ObjectiveConfig, build_objective, objective_config
from ecgscale.objectives.gather import pretended_ranks
from small_jobs import config_of

ROWS, SAMPLES = 4, 2500
TINY = PRESETS["tiny"]
DRY = replace(TINY, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0)


# --- FLOPs ---


def counted(run: Callable[[], object]) -> dict[str, int]:
    """FLOPs of all that runs ("Global"), and by the path of each module below the outermost one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return {name.partition(".")[2] or name: sum(of.values()) for name, of in counter.get_flop_counts().items()}


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_encoder_of_each_preset(preset, stem, make_batch) -> None:
    config = replace(PRESETS[preset], stem=stem)
    if stem == "patch":  # the layers are those of the other stem, all of which are counted there
        config = replace(config, depth=3)
    batch = make_batch(torch.zeros(ROWS, 12, SAMPLES, dtype=torch.int16)).to(torch.device("meta"))
    with torch.device("meta"):
        encoder = ECGEncoder(config)
    found = counted(lambda: encoder(batch)[0].sum().backward())
    expected = {
        name: count.total for name, count in Costs(config, objective_config("cmsc"), SAMPLES).flops(ROWS).items()
    }
    assert found["stem"] == expected["stem"]
    assert found["feature_projection"] == expected["rest"]
    layers = sum(count for name, count in found.items() if name.startswith("layers.") and name.count(".") == 1)
    assert layers == expected["layers"]
    assert encoder_flops(encoder, ROWS, SAMPLES) == sum(expected.values()) - expected["loss"]


@pytest.mark.parametrize("kernel", [15, 16])
def test_position(kernel) -> None:
    """Each of its three passes: of grouped convolutions, torch's counter takes the backward pass without groups."""
    config = replace(TINY, position_kernel=kernel)
    x_BDN = torch.zeros(ROWS, config.width, SAMPLES // 16 + 2 * (kernel // 2), device="meta")
    weight = torch.zeros(config.width, config.width // config.position_groups, kernel, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.conv1d(x_BDN, weight, groups=config.position_groups)
    position = Costs(config, objective_config(), SAMPLES).flops(ROWS)["position"]
    assert position == (counter.get_total_flops(), 2 * counter.get_total_flops())


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
    expected = {name: count.total for name, count in Costs(model, config, 500).flops(ROWS).items()}
    assert found["Global"] - found["module.encoder.position"] == sum(expected.values()) - expected["position"]
    assert step_flops(model, config, ROWS, 500) == sum(expected.values())


class Given(nn.Module):
    """The loss of a batch whose views are made."""

    def __init__(self, module: Objective) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: ECGBatch) -> Tensor:
        return self.module.losses(batch, self.module.draw(batch, share=True), step=0, share=True)[0]


def test_contrast_of_all_ranks_and_rows() -> None:
    costs = Costs(PRESETS["base"], objective_config(), SAMPLES)
    one, two = costs.flops(16, ranks=64), costs.flops(32, ranks=32)
    assert one["loss"] == two["loss"] == (2 * 512 * 512 * 768, 4 * 512 * 512 * 768)
    assert all(two[part].total == 2 * one[part].total for part in one if part != "loss")


def test_counting_draws_nothing_from_the_generator_that_training_uses() -> None:
    torch.manual_seed(3)
    encoder, before = ECGEncoder(DRY), torch.get_rng_state()
    step_flops(TINY, objective_config(negatives=7), ROWS, SAMPLES)
    encoder_flops(encoder, 2, SAMPLES)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters() -> None:
    base = parameters(ModelConfig(), objective_config())
    assert sum(base.values()) == 90_883_072  # of the reference implementation
    assert base["encoder.mask.token"] == 768
    heads = {name.partition(".")[0] for name in base if not name.startswith("encoder.")}
    assert heads == {"local_head"}
    assert sum(parameters(ModelConfig()).values()) == 90_374_016


# --- bytes ---

CASES = {
    "fp32": (TINY, objective_config(), "fp32"),
    "no dropout": (DRY, objective_config(), "fp32"),
    "bf16": (TINY, objective_config(), "bf16"),
    "patch stem": (replace(TINY, stem="patch", patch_samples=25), objective_config(), "fp32"),
    "norm first": (replace(TINY, pre_norm=True), objective_config(), "fp32"),
    "direct convolution": (replace(TINY, position_kernel=15), objective_config(), "fp32"),
    "local alone": (TINY, objective_config(name="wav2vec2"), "fp32"),
    "global alone": (TINY, objective_config(name="cmsc"), "fp32"),
    "nt-xent": (TINY, objective_config(name="cmsc", global_form="nt_xent"), "fp32"),
    "simclr": (TINY, objective_config(name="simclr"), "fp32"),
    "3kg": (TINY, objective_config(name="3kg"), "fp32"),
}


def kept_for_backward(
    model: ModelConfig, objective: ObjectiveConfig, precision: str, rows: int = 4, ranks: int = 1, layers: int = 0
) -> dict[str, int]:
    """Bytes of the storages that autograd keeps of real tensors, weights left out, by part of the model."""
    module = build_objective(model, objective, seed=0, rate_hz=500.0, activation_checkpointing=layers)
    module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    batch = synthetic_batch(rows, 1250)
    seen = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    alive, kept, inside = [], dict.fromkeys(("stem", "position", "layers", "rest", "loss"), 0), [""]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            kept[part_of(inside[-1])] += storage.nbytes()
        return tensor

    def leave(*_: object) -> None:
        inside.pop()

    for name, one in module.named_modules():
        if name:  # what the objective itself does is no module's
            one.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            one.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), pretended_ranks(ranks):
        module(batch)
    return kept


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_keeps(case, ranks):
    model, objective, precision = CASES[case]
    predicted = costs_of(model, objective, 1250).kept("cpu", precision, 4, ranks).parts
    kept = kept_for_backward(model, objective, precision, ranks=ranks)
    assert predicted == {part: size for part, size in kept.items() if size}


def test_a_large_contrast_keeps_what_is_counted():
    for form in ("reference", "nt_xent"):
        objective = objective_config(name="cmsc", global_form=form)
        costs, many = costs_of(DRY, objective, 320), 256
        predicted = costs.kept("cpu", "fp32", 4, many).parts["loss"]
        embeddings, similarities, masks = (2, 3, 3) if form == "nt_xent" else (1, 2, 1)
        pairs = 2 * many
        square = (4 * similarities + masks) * pairs**2
        assert predicted == pytest.approx(square + embeddings * 2 * pairs * DRY.width * 4, rel=0.05)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_recomputed_layers_keep_their_input_only(layers):
    predicted = costs_of(TINY, objective_config(), 1250).kept("cpu", "fp32", 4, recomputed=layers)
    assert predicted.total == sum(kept_for_backward(TINY, objective_config(), "fp32", layers=layers).values())


def test_fused_attention_keeps_no_weights():
    """As of PyTorch's own fused attention on a CPU, which needs no dropout."""
    x_BND = torch.randn(2, 78, DRY.width)
    linear = nn.Linear(DRY.width, 3 * DRY.width)
    seen: dict[int, int] = {linear.weight.untyped_storage()._cdata: 0}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        seen.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        q, k, v = linear(x_BND).view(2, 78, 3, DRY.heads, -1).permute(2, 0, 3, 1, 4)
        F.scaled_dot_product_attention(q, k, v)
    costs = costs_of(DRY, objective_config("cmsc"), 1250)
    one = costs_of(replace(DRY, depth=1), objective_config("cmsc"), 1250)
    layer = (costs.kept("cuda", "fp32", 2).parts["layers"] - one.kept("cuda", "fp32", 2).parts["layers"]) // 2
    without = 2 * 78 * (DRY.width + 2 * DRY.ffn_width) * 4 + 2 * 2 * (78 * (DRY.width + 2) * 4)
    assert layer - without == pytest.approx(sum(seen.values()), abs=100)  # seeds of the dropout


def test_a_gpu_keeps_less():
    costs = costs_of(TINY, objective_config(), 1250)
    assert costs.kept("cuda", "fp32", 4).total < 0.6 * costs.kept("cpu", "fp32", 4).total


def test_a_fused_stem_keeps_the_counts_and_its_later_blocks():
    for stem, channels in (("conv", 2500 // 4 + 2500 // 8 + 2500 // 16), ("patch", 0)):
        costs = costs_of(replace(TINY, stem=stem), objective_config("cmsc"), SAMPLES)
        assert costs.kept("cuda", "bf16", 4).parts["stem"] == 4 * (12 * SAMPLES + channels * TINY.stem_channels) * 2


def test_peaks_hold_what_is_kept_and_what_comes_beside_it():
    costs = costs_of(TINY, objective_config(), 1250)
    for recomputed in (0, 1, 3):
        kept = costs.kept("cpu", "fp32", 8, recomputed=recomputed)
        assert kept.total <= kept.forward_peak < 2 * kept.total
        assert kept.total < kept.backward_peak


def test_a_pass_holds_the_same_each_time():
    def held() -> list[int]:
        return held_by(lambda: build_objective(DRY, objective_config(), 0, 500.0), torch.float32, "cpu", 4, 320).peaks

    assert held() == held()


def test_what_is_sent_grows_with_the_rows_of_all_ranks_or_not_at_all():
    few, many = (costs_of(TINY, objective_config(), 1250).sent(4, ranks) for ranks in (2, 8))
    assert costs_of(TINY, objective_config(), 1250).sent(4, 1) == []
    embeddings = [one.bytes for one in many if one.kind == "all-gather"]
    assert embeddings == [4 * one.bytes for one in few if one.kind == "all-gather"]
    assert max(embeddings) == 32 * TINY.width * 4
