"""How a step is computed: stage, precision, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from ecgscale.errors import InputError
from ecgscale.settings import option
from ecgscale.training.optimizers import Option, check_elementwise, layout_of

_ADAMW = ("beta1", "beta2", "epsilon", "weight_decay")


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed and spread over ranks."""

    zero_stage: Literal[0, 1, 2, 3] = option(1, resumable=True)
    """What DeepSpeed ZeRO shares out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    whole_below: int = option(100_000, resumable=True)
    """At stage 3, parameters with fewer elements stay whole on every rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model. Weights and moments of the optimizer are fp32 in either case."""
    activation_checkpointing: bool | int = option(False, resumable=True)
    """Recompute transformer layers in the backward pass instead of storing their activations: how many of them, from
    the first. true: all, false: none."""
    compile: bool = option(False, resumable=True)
    """Compile the transformer layers with torch.compile, for the shapes that come; on a CPU with a C++ compiler."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    optimizer: str = "adamw"
    """adamw, or package.module:Class for a torch.optim.Optimizer of your own. It must treat each number by itself:
    from ZeRO stage 1 on it sees the parameters flattened, joined and cut."""
    optimizer_options: dict[str, Option] = field(default_factory=dict)
    """What a class of your own takes beside parameters and lr, such as {momentum: 0.9}. adamw has keys of its own."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on all parameters, as in the reference implementation."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; larger ones are scaled down. 0 turns it off."""
    peak_tflops: float = option(0.0, resumable=True)
    """Peak rate of one device in 1e12 FLOP/s, of which MFU is a share. 0: by the table of known GPUs."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "clip_norm", "peak_tflops"):
            if getattr(self, name) < 0:
                raise InputError(f"engine.{name} {getattr(self, name):g}: give 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"engine.{name} {getattr(self, name):g}: give 0 or more and below 1")
        if self.activation_checkpointing < 0:
            raise InputError(f"engine.activation_checkpointing {self.activation_checkpointing}: give 0 or more layers")
        if self.compile and self.zero_stage == 3:
            raise InputError("engine.compile: not with engine.zero_stage 3, whose parameters come and go; use stage 2")
        if self.whole_below < 0:
            raise InputError(f"engine.whole_below {self.whole_below}: give 0 or more")
        if self.epsilon <= 0:
            raise InputError(f"engine.epsilon {self.epsilon:g}: give a positive number")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        if self.optimizer == "adamw":
            if self.optimizer_options:
                raise InputError(f"engine.optimizer_options: adamw has keys of its own: {_keys(_ADAMW)}")
            return
        usual = {one.name: one.default for one in fields(self)}
        if given := [name for name in _ADAMW if getattr(self, name) != usual[name]]:
            raise InputError(f"{_keys(given)}: of adamw; give {self.optimizer} its own in engine.optimizer_options")
        layout_of(self.optimizer, self.optimizer_options, torch.device("cpu"))
        if self.zero_stage > 0:
            check_elementwise(self.optimizer, self.optimizer_options)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the optimizer's class is given beside parameters and learning rate."""
        if self.optimizer != "adamw":
            return self.optimizer_options
        betas = (self.beta1, self.beta2)
        return {"betas": betas, "eps": self.epsilon, "weight_decay": self.weight_decay, "fused": True}


def _keys(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"engine.{name}" for name in names)
