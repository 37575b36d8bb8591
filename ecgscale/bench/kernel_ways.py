"""What the kernel bench compares: several ways to compute the same, and whether they do.

Every way begins from int16 counts and ends with (B, N, D) numbers that lie next to each other in memory, as the ops do.

Shape suffixes: B rows, L leads, T samples, P samples of a patch, N patches or places, D width, C channels, M masked
places, K negatives, Q code width, G code groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ecgscale.bench.device import Call, Device
from ecgscale_kernels import (
    Backend,
    forced,
    lead_masked_conv_stem,
    lead_masked_patch_embed,
    reference,
)
from ecgscale_kernels.counts import ConvStemSize, PatchEmbedSize

TRITON, REFERENCE = "ecgscale, Triton", "ecgscale, reference"
CONV, CONV_VIEW = "eager conv1d", "eager conv1d, left as (B, D, N)"
COMPILED_CONV, COMPILED_PRODUCT = "compiled conv1d", "compiled reshape + addmm"
FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "forward + backward")

_RIGHT = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # relative error that is allowed beside twice eager's own

Way = Callable[..., Tensor]  # learned tensors -> result


@dataclass(frozen=True)
class Problem:
    """One op at one shape, and the ways to compute it: ours, the framework's own, and others."""

    name: str  # "patch_embed/B512_P16_D768": of its scalars
    title: str
    ours: str
    eager: str
    learned: tuple[Tensor, ...]
    grad: Tensor  # of the result
    ways: dict[str, Way]
    exact: Way  # right when it is given float64

    def call(self, way: str, mode: str) -> Call:
        """One mode of one way. A forward by itself keeps nothing; a backward is timed without its forward."""
        run = partial(self.ways[way], *self.learned)
        if mode == FORWARD:
            return Call(torch.no_grad()(lambda _: run()))
        if mode == BACKWARD:
            return Call(lambda out: torch.autograd.grad(out, self.learned, self.grad), run)
        return Call(lambda _: torch.autograd.grad(run(), self.learned, self.grad))

    def errors(self) -> dict[str, float]:
        """Of each way the largest of the relative errors ‖x − exact‖ / ‖exact‖ of its result and gradients."""
        learned = tuple(one.detach().double().requires_grad_() for one in self.learned)
        exact = _results(self.exact, learned, self.grad.double())
        return {name: _error(_results(way, self.learned, self.grad), exact) for name, way in self.ways.items()}

    def bound(self, errors: dict[str, float]) -> float:
        """The error that a way may have: twice that of the framework's own op, and a little."""
        return 2 * errors[self.eager] + _RIGHT[self.learned[0].dtype]


def _results(way: Way, learned: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    out = way(*learned)
    return [out.detach(), *torch.autograd.grad(out, learned, grad)]


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    each = [float((one.double() - right).norm() / right.norm()) for one, right in pairs]
    return max(error if error == error else float("inf") for error in each)  # NaN is the largest


# -- patch embedding -------------------------------------------------------------------------------------------------


def patch_embed(size: PatchEmbedSize, device: Device, compiled: bool) -> Problem:
    """``lead_masked_patch_embed`` with a bias."""
    signal_BLT, gain_BL, offset_BL = _rows(size.rows, size.leads, size.kept, size.samples, device)
    weight_DLP = _learned((size.width, size.leads, size.patch), device, (size.leads * size.patch) ** -0.5)
    bias_D = _learned((size.width,), device)
    rows = (signal_BLT, gain_BL, offset_BL)
    product = partial(reference.lead_masked_patch_embed, *rows)
    ways = _op_ways(partial(lead_masked_patch_embed, *rows), device) | {
        CONV: partial(_conv_patch_embed, *rows),
        CONV_VIEW: partial(_conv_patch_embed, *rows, view=True),
    }
    if compiled:
        ways |= {
            COMPILED_CONV: partial(_compile(_conv_patch_embed), *rows),
            COMPILED_PRODUCT: partial(_compile(reference.lead_masked_patch_embed), *rows),
        }
    return Problem(
        f"patch_embed/B{size.rows}_P{size.patch}_D{size.width}",
        f"Patch embedding, B {size.rows}, P {size.patch}, D {size.width}",
        _ours(device),
        CONV,
        (weight_DLP, bias_D),
        torch.randn(size.rows, size.patches, size.width, device=device.torch).to(device.dtype),
        ways,
        product,
    )


def _conv_patch_embed(
    signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor, weight_DLP: Tensor, bias_D: Tensor, view: bool = False
) -> Tensor:
    value_BLT = _dequantised(signal_BLT, gain_BL, offset_BL, weight_DLP.dtype)
    token_BND = F.conv1d(value_BLT, weight_DLP, bias_D, stride=weight_DLP.shape[2]).transpose(1, 2)
    return token_BND if view else token_BND.contiguous()


# -- stem ------------------------------------------------------------------------------------------------------------


def conv_stem(size: ConvStemSize, device: Device, compiled: bool) -> Problem:
    """``lead_masked_conv_stem`` without biases, as the presets have it."""
    rows = _rows(size.rows, size.leads, size.kept, size.samples, device)
    inputs = [size.leads] + [size.channels] * (size.blocks - 1)
    weights = [_learned((size.channels, each, 2), device, each**-0.5) for each in inputs]
    norm = [_learned((size.channels,), device, 0.1, around) for around in (1.0, 0.0)]
    exact = _stem_of(reference.lead_masked_conv_stem, *rows)
    ways = _op_ways(_stem_of(lead_masked_conv_stem, *rows), device) | {CONV: partial(_conv_chain, *rows)}
    if compiled:
        ways |= {
            COMPILED_CONV: partial(_compile(_conv_chain), *rows),
            COMPILED_PRODUCT: partial(_compile(_product_chain), *rows),
        }
    places = size.places(size.blocks - 1)
    return Problem(
        f"conv_stem/B{size.rows}_C{size.channels}",
        f"Convolutional stem, B {size.rows}, C {size.channels}",
        _ours(device),
        CONV,
        (*weights, *norm),
        torch.randn(size.rows, places, size.channels, device=device.torch).to(device.dtype),
        ways,
        exact,
    )


def _stem_of(op: Callable[..., Tensor], *rows: Tensor) -> Way:
    """The op on four weights and the norm's two parameters, without biases."""

    def way(*learned: Tensor) -> Tensor:
        *weights, norm_weight_C, norm_bias_C = learned
        return op(*rows, weights, [None] * len(weights), norm_weight_C, norm_bias_C)

    return way


def _conv_chain(signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor, *learned: Tensor) -> Tensor:
    *weights, norm_weight_C, norm_bias_C = learned
    x_BCT = _dequantised(signal_BLT, gain_BL, offset_BL, weights[0].dtype)
    for block, weight in enumerate(weights):
        x_BCT = F.conv1d(x_BCT, weight, stride=2)
        if block == 0:
            x_BCT = F.group_norm(x_BCT, len(weight), norm_weight_C, norm_bias_C)
        x_BCT = F.gelu(x_BCT)
    return x_BCT.transpose(1, 2).contiguous()


def _product_chain(signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor, *learned: Tensor) -> Tensor:
    """A convolution of kernel 2 and stride 2 is a product with pairs of places; channels lie last throughout."""
    *weights, norm_weight_C, norm_bias_C = learned
    x_BTC = _dequantised(signal_BLT, gain_BL, offset_BL, weights[0].dtype).transpose(1, 2)
    for block, weight in enumerate(weights):
        batch, samples, channels = x_BTC.shape
        pair_BTK = x_BTC[:, : samples // 2 * 2].reshape(batch, samples // 2, 2 * channels)
        x_BTC = F.linear(pair_BTK, weight.transpose(1, 2).flatten(1))
        if block == 0:
            variance_B1C, mean_B1C = torch.var_mean(x_BTC.float(), dim=1, correction=0, keepdim=True)
            normed_BTC = (x_BTC.float() - mean_B1C) * torch.rsqrt(variance_B1C + 1e-5)
            x_BTC = (normed_BTC * norm_weight_C.float() + norm_bias_C.float()).to(x_BTC.dtype)
        x_BTC = F.gelu(x_BTC)
    return x_BTC


# -- parts -----------------------------------------------------------------------------------------------------------


def _ours(device: Device) -> str:
    return TRITON if device.cuda else REFERENCE


def _op_ways(op: Way, device: Device) -> dict[str, Way]:
    def way(backend: Backend) -> Way:
        def run(*learned: Tensor) -> Tensor:
            with forced(backend):
                return op(*learned)

        return run

    return ({TRITON: way("triton")} if device.cuda else {}) | {REFERENCE: way("reference")}


def _compile(way: Way) -> Way:
    """With ``fullgraph``: otherwise it would fall back to eager without a word."""
    torch.compiler.reset()  # of earlier problems: it gives up on a function that it has compiled for eight shapes
    return torch.compile(way, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)


def _rows(rows: int, leads: int, kept: int, samples: int, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """Random counts, gains that are zero but for ``kept`` leads of each row, and offsets."""
    signal_BLT = torch.randint(-2000, 2000, (rows, leads, samples), dtype=torch.int16, device=device.torch)
    turn_BL = torch.rand(rows, leads, device=device.torch).argsort(dim=1).argsort(dim=1)
    gain_BL = torch.where(turn_BL < kept, 1e-3, 0.0)
    return signal_BLT, gain_BL, 10 * torch.randn(rows, leads, device=device.torch)


def _dequantised(signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.sub(signal_BLT, offset_BL[..., None]).mul_(gain_BL[..., None]).to(dtype)


def _learned(shape: tuple[int, ...], device: Device, deviation: float = 1.0, mean: float = 0.0) -> Tensor:
    numbers = mean + deviation * torch.randn(shape, device=device.torch)
    return numbers.to(device.dtype).requires_grad_()
