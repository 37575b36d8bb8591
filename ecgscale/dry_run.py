"""One pass of an objective over tensors without data: what it computes, keeps for its backward pass, holds and sends.

The tensors are of torch's meta device, or fake ones that say that they lie on a CPU: nothing is allocated, and nothing
is multiplied. What such a pass cannot see has a stand-in below: the fused stems, and attention and dropout as a GPU's
kernels do them. Draws are made of real rows, since how many places are masked may depend on them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from ecgscale.data.batch import ECGBatch, synthetic_batch
from ecgscale.model.stem import BLOCKS, ConvStem, PatchStem
from ecgscale.objectives import Objective
from ecgscale.objectives.gather import Sent, pretended_ranks

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Device = Literal["cpu", "cuda"]
STEM, POSITION, LAYERS, REST, LOSS = PARTS = ("stem", "position", "layers", "rest", "loss")
"""Parts of a model: three of the encoder's modules, all other modules (of the encoder and heads), and what the
objective does outside of modules, which is in float32 and among the rows of all ranks."""
PHASES = BEFORE, IN_LAYERS, AFTER, BACK_TO_LAYERS, BACK_IN_LAYERS, BACK_BEFORE = range(6)
"""Of a pass: before, in and behind the layers, forward and back."""
WITH_LAYERS = (IN_LAYERS, AFTER, BACK_TO_LAYERS, BACK_IN_LAYERS)
"""Phases in which layers have something that they keep."""
_META = torch.device("meta")


class Flops(NamedTuple):
    """Floating-point operations of the two passes."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


class Held(NamedTuple):
    """Bytes of a pass, without the batch, the weights and their gradients; and what is sent."""

    kept: dict[str, int]  # for the backward pass, by part
    peaks: list[int]  # most at any time of each phase
    sent: list[Sent]


def part_of(module: str) -> str:
    """Part that a module of an objective belongs to, by its path: encoder.layers.3.ffn_in is one of the layers."""
    if not module:
        return LOSS
    owner, _, inner = module.partition(".")
    name = inner.partition(".")[0]
    return name if owner == "encoder" and name in (STEM, POSITION, LAYERS) else REST


# -- what is computed ------------------------------------------------------------------------------------------------


def flops_of(build: Callable[[], Objective], rows: int, samples: int, ranks: int = 1) -> dict[str, Flops]:
    """FLOPs of a rank's micro-step of an objective, by part.

    Args:
        rows: segments of the rank.
        samples: of a segment.
        ranks: that contrast their rows with each other.
    """
    with _META:
        losses = _Losses(build())
    with pretended_ranks(ranks):
        batch, draws = _drawn(losses.objective, rows, samples, lambda tensor: tensor.to(_META))
        return counted_flops(losses, lambda: losses(batch, draws), lambda path: part_of(path.partition(".")[2]))


def counted_flops(
    module: nn.Module, run: Callable[[], Tensor], part: Callable[[str], str] = lambda _: ""
) -> dict[str, Flops]:
    """FLOPs of ``run``, which calls ``module``, and of its backward pass, by the part that an inner path belongs to."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    own_formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=own_formulas) as counter:
        result = run()
        forward = _by_part(counter, type(module).__name__, part)
        result.sum().backward()  # type: ignore[no-untyped-call]
    both = _by_part(counter, type(module).__name__, part)
    return {name: Flops(forward[name], total - forward[name]) for name, total in both.items() if total}


def _by_part(counter: FlopCounterMode, root: str, part: Callable[[str], str]) -> dict[str, int]:
    """Of the modules of each part themselves: the counter has what is computed in inner ones in the outer too."""
    whole = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    everything = whole.pop("Global", 0)
    counts: dict[str, int] = defaultdict(int)
    counts[part("")] = everything - whole.get(root, 0)  # of what belongs to no module
    for path, count in whole.items():
        counts[part(path.partition(".")[2])] += count
        if around := _around(path, whole):
            counts[part(around.partition(".")[2])] -= count
    return counts


def _around(path: str, called: dict[str, int]) -> str:
    """The nearest module around one that was called too."""
    while path := path.rpartition(".")[0]:
        if path in called:
            break
    return path


def _convolution_backward(
    grad_shape: Sequence[int], x_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Each gradient takes as much as the forward pass; torch 2.13 counts one without groups."""
    from torch.utils.flop_counter import conv_flop_count

    transposed, output_mask = rest[4], rest[7]
    forward: int = conv_flop_count(list(x_shape), list(weight_shape), list(grad_shape), transposed=transposed)
    return forward * (int(output_mask[0]) + int(output_mask[1]))


class _Losses(nn.Module):
    """An objective's loss as the call of a module, which is what the counter sees."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: ECGBatch, draws: Any) -> Tensor:
        return self.objective.losses(batch, draws, step=0, share=True)[0]


# -- what is held ----------------------------------------------------------------------------------------------------


def held_by(
    build: Callable[[], Objective], dtype: torch.dtype, device: Device, rows: int, samples: int, ranks: int = 1
) -> Held:
    """Bytes of a rank's micro-step as it is on a device; other arguments as in `flops_of`."""
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device == "cpu" else None
    with fake or _META:
        objective = build()
        for module in objective.modules():  # Module.to changes no fake ones
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(weight.to(dtype), weight.requires_grad))
    with pretended_ranks(ranks) as sent:
        given = [_drawn(objective, rows, samples, fake.from_tensor if fake else lambda tensor: tensor.to(_META))]
        if not fake:
            objective.encoder.register_module("stem", _as_fused(objective.encoder.get_submodule("stem")))
        tracker = _Tracker(objective, *given[0])
        sent.clear()  # what is drawn together
        with fake or _as_on_gpu(), tracker, torch.autograd.graph.saved_tensors_hooks(tracker.keep, lambda saved: saved):
            loss = objective.losses(*given.pop(), step=0, share=True)[0]
            tracker.phase = BACK_TO_LAYERS
            loss.backward()  # type: ignore[no-untyped-call]
        return Held(dict(tracker.kept), tracker.peaks, list(sent))


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are there, and of those that autograd keeps: each once, weights left out."""

    def __init__(self, objective: Objective, batch: ECGBatch, draws: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[str, int] = defaultdict(int)
        self.peaks = [0] * len(PHASES)
        self._phase, self._live, self._inside = BEFORE, 0, [LOSS]
        self._there: dict[int, ref[torch.UntypedStorage]] = {}
        weights = [parameter.untyped_storage() for parameter in objective.parameters()]
        given = [tensor.untyped_storage() for tensor in vars(batch).values() if isinstance(tensor, Tensor)]
        # Held on to, so that no other storage gets the number of one that is gone.
        self._counted = {storage._cdata: storage for storage in weights}
        self._not_ours = {storage._cdata: storage for storage in [*weights, *given]}
        for tensor in tree_iter(draws):
            self._see(tensor)
        self._follow(objective)

    @property
    def phase(self) -> int:
        return self._phase

    @phase.setter
    def phase(self, phase: int) -> None:
        self._phase = phase
        self.peaks[phase] = max(self.peaks[phase], self._live)

    def keep(self, tensor: Tensor) -> Tensor:
        """What autograd calls for each tensor that it keeps."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._counted:
            self._counted[storage._cdata] = storage
            self.kept[self._inside[-1]] += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            self._see(tensor)
        return result

    def _see(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._there or number in self._not_ours:
            return

        def gone(_: object) -> None:
            del self._there[number]
            self._live -= size

        self._there[number] = ref(storage, gone)
        self._live += size
        self.phase = self._phase

    def _follow(self, objective: Objective) -> None:
        """Which part and which phase a pass is in; gradients of weights are given back as soon as they are there."""
        for parameter in filter(lambda parameter: parameter.requires_grad, objective.parameters()):
            parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
        for name, module in objective.named_modules():
            module.register_forward_pre_hook(partial(self._enter, part_of(name)))
            module.register_forward_hook(self._leave)
        layers = list(objective.encoder.get_submodule("layers").children())
        layers[0].register_forward_pre_hook(self._into_layers)
        layers[-1].register_forward_hook(self._out_of_layers)

    def _enter(self, part: str, *_: object) -> None:
        self._inside.append(part)

    def _leave(self, *_: object) -> None:
        self._inside.pop()

    def _into_layers(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        if self._phase == BEFORE:  # a layer that is recomputed is called again
            self.phase = IN_LAYERS
            given[0].register_hook(partial(self._turn, BACK_BEFORE))

    def _out_of_layers(self, _: nn.Module, __: object, result: Any) -> None:
        if self._phase == IN_LAYERS:
            self.phase = AFTER
            result.register_hook(partial(self._turn, BACK_IN_LAYERS))

    def _turn(self, phase: int, _: Tensor) -> None:
        self.phase = phase


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Ops keep what the kernels of a GPU keep. Replaced, since a mode for torch's functions is off in backward passes,
    in which layers are recomputed."""
    own = {"dropout": _dropout, "scaled_dot_product_attention": _attention}
    usual = {name: getattr(F, name) for name in own}
    try:
        for name, function in own.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in usual.items():
            setattr(F, name, function)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a mask of a byte for each element."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """Keeps no weights but the logarithm of each row's sum; a mask is kept by whoever made it."""
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]
    return result


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _as_fused(stem: nn.Module) -> nn.Module:
    return _FusedStem(stem) if isinstance(stem, ConvStem | PatchStem) else stem


class _FusedStem(nn.Module):
    """Keeps what a fused stem keeps: the counts, and of the convolutional one the later blocks before their GELU."""

    def __init__(self, stem: ConvStem | PatchStem) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, batch: ECGBatch) -> Tensor:
        weights = list(self.stem.parameters())
        rows, _, samples = batch.signal_BLT.shape
        channels = weights[0].shape[0]
        if isinstance(self.stem, ConvStem):
            tokens = [samples >> block for block in range(2, BLOCKS + 1)]
        else:
            tokens = [samples // self.stem.weight.shape[2]]
        shapes = [(rows, count, channels) for count in tokens]
        kept = shapes if isinstance(self.stem, ConvStem) else []
        result: Tensor = _Fused.apply(kept, shapes[-1], batch.signal_BLT, *weights)  # type: ignore[no-untyped-call]
        return result


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: list[tuple[int, ...]], shape: tuple[int, ...], signal: Tensor, *weights: Tensor) -> Any:
        ctx.save_for_backward(signal, *weights, *(weights[0].new_empty(one) for one in kept))
        ctx.weights = len(weights)
        return weights[0].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, *map(torch.empty_like, ctx.saved_tensors[1 : 1 + ctx.weights])


def _drawn(objective: Objective, rows: int, samples: int, move: Callable[[Tensor], Tensor]) -> tuple[ECGBatch, Any]:
    """A batch as the objective sees it, and what it draws for it."""
    with torch.random.fork_rng(devices=[]):
        batch = objective.view(synthetic_batch(rows, samples))
        draws = objective.draw(batch, share=True)
    return batch.each(move), tree_map_only(Tensor, move, draws)
