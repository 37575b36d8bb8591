"""Optimizers by name: PyTorch's AdamW, or a class of the user's own. To add one: its class here, and its name below."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecgscale.errors import InputError
from ecgscale.registry import Registry

Option = bool | int | float | str | list[float]

OPTIMIZERS: Registry[torch.optim.Optimizer] = Registry(
    "engine.optimizer", "torch.optim:Optimizer", {"adamw": "ecgscale.training.optimizers:AdamW"}
)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, whose own step imports torch.compile's machinery (2.13), for a graph break in nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def build_optimizer(name: str, options: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of that name, at learning rate 0. Raises InputError for options that its class does not take."""
    kind = OPTIMIZERS.find(name)
    known = [argument for argument in inspect.signature(kind).parameters if argument not in ("params", "lr")]
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise InputError(f"engine.optimizer_options.{option}: {name} does not take it; {hint}")
    spare_the_compiler()
    try:
        return kind(parameters, lr=0.0, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"engine.optimizer {name}: does not begin with these options ({reason})") from error


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer has kept so far, but the tensors of its slots."""

    slots: list[str]
    """Of which each trained parameter has a tensor; none before the first update."""
    scalars: dict[str, float]
    """Numbers beside them, the same for all parameters: AdamW's step."""
    group: dict[str, float]
    """Numbers of the parameter group that steps have changed."""


@dataclass(frozen=True)
class Layout:
    """What an optimizer keeps, by name: of each parameter, and beside them."""

    slots: tuple[str, ...]
    """Tensors in the shape of their parameter, float32."""
    scalars: Mapping[str, Tensor | float]
    """Numbers that are the same for all parameters, as a step has left them: they show the kind, not the value."""
    group: Mapping[str, float]
    """Numbers in the parameter group, as they were before any step."""

    def entry(self, like: Tensor, state: OptimizerState) -> dict[str, Any]:
        """The optimizer's entry for a tensor that it updates, with slots of zeros."""
        entry: dict[str, Any] = {slot: torch.zeros_like(like) for slot in self.slots}
        for name, example in self.scalars.items():
            value = state.scalars[name]
            entry[name] = torch.full_like(example, value) if isinstance(example, Tensor) else type(example)(value)
        return entry

    def check(self, name: str, state: OptimizerState) -> None:
        """Raises InputError unless it is the state of such an optimizer, or of one that has done nothing."""
        own, given = (list(self.slots), self.scalars.keys()), (state.slots, state.scalars.keys())
        if given not in (own, ([], set())) or not state.group.keys() <= self.group.keys():
            kept, saved = ([*slots, *numbers] for slots, numbers in (own, given))
            raise InputError(f"engine.optimizer {name} keeps {kept}, the checkpoint has {[*saved, *state.group]} of it")


def layout_of(name: str, options: Mapping[str, Any], device: torch.device) -> Layout:
    """What the optimizer of that name keeps, by trying it on a small parameter.

    Raises InputError for one whose state could not be saved by name at each ZeRO stage: it must keep float32 tensors in
    the shape of the parameter and plain numbers, from its first step on.
    """
    parameter = nn.Parameter(torch.zeros(2, 3, device=device))
    optimizer = build_optimizer(name, options, [parameter])
    if optimizer.state:
        raise InputError(f"engine.optimizer {name}: keeps state before its first step; make it in the first step")
    group = _numbers(optimizer.param_groups[0])
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"engine.optimizer {name}: cannot do a step from gradients alone ({reason})") from error
    slots, scalars = [], {}
    for key, value in optimizer.state[parameter].items():
        if "." in str(key) or key in ("weight", "buffer"):  # names in a checkpoint are SLOT.PARAMETER
            raise InputError(
                f"engine.optimizer {name}: keeps {key!r}; give it a name without dots, not weight or buffer"
            )
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == torch.float32:
            slots.append(key)
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
            scalars[key] = value
        elif value is not None:
            what = f"a {value.dtype} tensor of {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise InputError(
                f"engine.optimizer {name}: keeps {key}, {what}, for a parameter of {list(parameter.shape)}; it can be "
                "saved where all that it keeps are float32 tensors in the parameter's shape, and numbers"
            )
    return Layout(tuple(slots), scalars, group)


def check_elementwise(name: str, options: Mapping[str, Any]) -> None:
    """Raises InputError for an optimizer that does not treat each number by itself, by trying it whole and in pieces.

    From ZeRO stage 1 on it sees the parameters flattened, joined and cut over the ranks: what depends on a matrix, such
    as its norm, would be that of whatever piece a rank has.
    """
    generator = torch.Generator().manual_seed(0)
    values, *gradients = (torch.randn(6, 4, generator=generator) for _ in range(3))

    def updated(cut: Callable[[Tensor], list[Tensor]]) -> Tensor:
        pieces = [nn.Parameter(piece.clone()) for piece in cut(values)]
        optimizer = build_optimizer(name, options, pieces)
        optimizer.param_groups[0]["lr"] = 1e-2
        for gradient in gradients:
            for piece, its_gradient in zip(pieces, cut(gradient), strict=True):
                piece.grad = its_gradient.clone()
            optimizer.step()
        return torch.cat([piece.detach().flatten() for piece in pieces])

    whole, in_pieces = updated(lambda matrix: [matrix]), updated(lambda matrix: [*torch.split(matrix.flatten(), 9)])
    if not torch.allclose(whole, in_pieces, rtol=1e-4, atol=1e-6):
        raise InputError(
            f"engine.optimizer {name}: updates a matrix as another than its numbers one by one, and from "
            "engine.zero_stage 1 on it would see them cut over the ranks; give engine.zero_stage=0"
        )


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a parameter group but the learning rate, which is set before each step."""
    return {key: value for key, value in group.items() if isinstance(value, (int, float)) and key != "lr"}


def state_of(optimizer: torch.optim.Optimizer, layout: Layout) -> OptimizerState:
    """What an optimizer has kept so far, but the tensors of its slots."""
    numbers = _numbers(optimizer.param_groups[0])
    group = {key: value for key, value in numbers.items() if layout.group.get(key) != value}
    entry = next((entry for entry in optimizer.state.values() if entry), None)
    if entry is None:
        return OptimizerState([], {}, group)
    scalars = {name: entry[name] for name in layout.scalars}
    scalars = {name: value.item() if isinstance(value, Tensor) else value for name, value in scalars.items()}
    return OptimizerState(list(layout.slots), scalars, group)


def clip_gradient(parameters: Iterable[nn.Parameter], most: float) -> tuple[Tensor, bool]:
    """Clip the gradient to a norm (0: any). Its norm before, and whether that is finite.

    If not, the gradient is dropped, so that the update does nothing.
    """
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in learning])
    finite = bool(norm.isfinite())
    if not finite:
        for parameter in learning:
            parameter.grad = None
    elif most:
        torch.nn.utils.clip_grads_with_norm_(learning, most, norm)
    return norm, finite


def spare_the_compiler() -> None:
    """Keep torch.compile's machinery from being imported by an optimizer: three seconds of each start.

    PyTorch 2.13 imports it to keep it away from its optimizers.
    """
    for name, method in vars(torch.optim.Optimizer).items():
        wrapped = getattr(method, "__wrapped__", None)
        if name in ("add_param_group", "load_state_dict", "zero_grad") and wrapped is not None:
            wrapped.__dynamo_disable = wrapped
