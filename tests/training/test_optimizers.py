"""Optimizers of the user's own: which are taken, how they are configured, and what is refused before a run begins."""

from __future__ import annotations

import pytest
import torch

from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError
from ecgscale.run import first_difference
from ecgscale.training.optimizers import OPTIMIZERS, check_elementwise, layout_of

CPU = torch.device("cpu")


def refusal(*arguments: str) -> str:
    with pytest.raises(InputError) as refused:
        load(PretrainConfig, list(arguments))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_adamw_keeps_its_keys() -> None:
    engine = load(PretrainConfig, ["--engine.beta1", "0.8", "--engine.weight_decay", "0"]).engine
    assert engine.optimizer == "adamw"
    assert engine.arguments == {"betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.0, "fused": True}
    layout = layout_of("adamw", engine.arguments, CPU)
    assert layout.slots == ("exp_avg", "exp_avg_sq")
    assert list(layout.scalars) == ["step"]


@pytest.mark.parametrize(
    "given",
    [
        ["--engine.optimizer_options.momentum", "0.9", "--engine.optimizer_options.nesterov=true"],
        ["--engine.optimizer_options", "{momentum: 0.9, nesterov: true}"],
    ],
)
def test_options_of_an_optimizer_of_ones_own(given) -> None:
    config = load(PretrainConfig, ["--engine.optimizer", "torch.optim:SGD", *given])
    assert config.engine.arguments == {"momentum": 0.9, "nesterov": True}
    assert layout_of("torch.optim:SGD", config.engine.arguments, CPU).slots == ("momentum_buffer",)
    differs = first_difference({"engine": {"optimizer": "torch.optim:SGD"}}, config)
    assert differs == ("engine.optimizer_options.momentum", None, 0.9)


@pytest.mark.parametrize(
    ("name", "options", "slots", "scalars"),
    [
        ("own_parts:Lion", {"decay": 0.1}, ("average",), ["count"]),
        ("torch.optim:Adamax", {"betas": [0.9, 0.95]}, ("exp_avg", "exp_inf"), ["step"]),
        ("torch.optim:SGD", {}, (), []),
    ],
)
def test_what_an_optimizer_keeps_is_seen_by_trying_it(name, options, slots, scalars) -> None:
    layout = layout_of(name, options, CPU)
    assert (layout.slots, list(layout.scalars)) == (slots, scalars)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine.optimizer=adam"], "engine.optimizer 'adam' is unknown; did you mean 'adamw'?"),
        (["--engine.optimizer=own_parts:Lions"], "own_parts has no class Lions; did you mean own_parts:Lion?"),
        (["--engine.optimizer=own_parts:Teaching"], "is no Optimizer; derive it from torch.optim.optimizer.Optimizer"),
        (
            ["--engine.optimizer=own_parts:Lion", "--engine.optimizer_options.deccay=1"],
            "engine.optimizer_options.deccay: own_parts:Lion does not take it; did you mean decay?",
        ),
        (
            ["--engine.optimizer=own_parts:Lion", "--engine.optimizer_options.beta1=2"],
            "engine.optimizer own_parts:Lion: does not begin with these options (beta1 2 is no share)",
        ),
        (
            ["--engine.optimizer=own_parts:Lion", "--engine.beta2=0.9"],
            "engine.beta2: of adamw; give own_parts:Lion its own in engine.optimizer_options",
        ),
        (["--engine.optimizer_options.decay=0"], "engine.optimizer_options: adamw has keys of its own: engine.beta1"),
        (
            ["--engine.optimizer=own_parts:Factored"],
            "engine.optimizer own_parts:Factored: keeps row, a torch.float32 tensor of [2], for a parameter of [2, 3]",
        ),
        (
            ["--engine.optimizer=own_parts:Misnamed"],
            "keeps 'weight'; give it a name without dots, not weight or buffer",
        ),
        (
            ["--engine.optimizer=own_parts:Normed", "--engine.zero_stage=1"],
            "engine.optimizer own_parts:Normed: updates a matrix as another than its numbers one by one",
        ),
        (["--engine.optimizer=torch.optim:Adagrad"], "keeps state before its first step"),
        (["--engine.optimizer=torch.optim:LBFGS"], "cannot do a step from gradients alone"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_at_once(arguments, message) -> None:
    assert message in refusal(*arguments)


def test_an_optimizer_of_whole_matrices_is_taken_where_it_sees_them() -> None:
    arguments = ["--engine.optimizer=own_parts:Normed", "--engine.zero_stage=0"]
    assert load(PretrainConfig, arguments).engine.optimizer == "own_parts:Normed"


def test_every_optimizer_of_ours_can_be_tried_whole_and_in_pieces() -> None:
    for name in OPTIMIZERS:
        layout_of(name, {}, CPU)
        check_elementwise(name, {})
