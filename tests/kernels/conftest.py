"""What the kernels are held against. On a GPU they run compiled, elsewhere in Triton's interpreter.

Shape suffixes: B batch, L leads, T samples, P samples of a patch, N patches, D width, C channels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecgscale_kernels import LeadDraw, forced
from triton_interpreter import refusal

if not os.environ.get("ECGSCALE_GPU") and os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "Triton was imported before this file could turn its interpreter on"
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is unset
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode refuses products on a GPU

OPTIONS = ("bias", "lead", "place", "mask", "draw")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- how the kernels run ---


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """What nothing writes is NaN, so that no test passes on what happened to lie there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(2).new_empty(2, dtype=torch.bfloat16).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True, scope="module")
def interpreter(device: torch.device) -> Iterator[None]:
    """Fewer shares of a gradient, since each costs a walk through the interpreter, and bfloat16 as a GPU makes it.

    The interpreter cuts the lower bits of a float32 off; a GPU rounds to the nearest. Rounding here too lets the same
    tolerance hold on both.
    """
    if device.type != "cpu" or find_spec("triton") is None:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    from ecgscale_kernels import conv_stem, patch_embed

    if why := refusal():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.InterpretedFunction, "__getitem__", lambda *_: pytest.skip(why))
            yield
        return

    convert = interpreter._convert_float

    def rounding(data, given, wanted, mode):
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(data, given, wanted, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(conv_stem, "PROGRAMS", 3)
        patch.setattr(patch_embed, "PROGRAMS", 3)
        yield


# --- what they are given ---


def counts(batch: int, leads: int, samples: int, dtype: torch.dtype, kept: str, device: torch.device) -> dict[str, Any]:
    """Counts around an offset of their own in each lead, about 1e-3 each. Leads are kept: some, all or none."""
    offset_BL = torch.randint(-12000, 12000, (batch, leads)).float()
    signal_BLT = torch.randn(batch, leads, samples) * 1000 + offset_BL[..., None] + 300
    gain_BL = 1e-3 * (0.5 + torch.rand(batch, leads))
    if kept == "some":
        gain_BL[torch.arange(batch), torch.arange(batch) % leads] = 0
    elif kept == "none":
        gain_BL.zero_()
    signal_BLT = signal_BLT.round().to(dtype).to(device).requires_grad_(dtype.is_floating_point)
    return {"signal_BLT": signal_BLT, "gain_BL": gain_BL.to(device), "offset_BL": offset_BL.to(device)}


def some_draw(batch: int, device: torch.device) -> LeadDraw:
    row_B = torch.arange(batch, device=device)
    return LeadDraw(3 << 40, 4, 0.4, row_B % 2, row_B + (1 << 33))


@pytest.fixture(scope="session")
def patch_arguments(device: torch.device) -> Callable[..., dict[str, Any]]:
    """(B, L, T, P, D) -> arguments of ``lead_masked_patch_embed``; what can ask for a gradient does."""

    def make(
        *shape: int,
        dtype: torch.dtype = torch.float32,
        signal: torch.dtype = torch.int16,
        options: Sequence[str] = OPTIONS,
        kept: str = "some",
    ) -> dict[str, Any]:
        batch, leads, samples, patch, width = shape
        patches = samples // patch
        torch.manual_seed(0)
        made = counts(batch, leads, samples, signal, kept, device)
        made["weight_DLP"] = learned(width, leads, patch, scale=(leads * patch) ** -0.5, dtype=dtype, device=device)
        vectors = {
            "bias": {"bias_D": (width,)},
            "lead": {"lead_LD": (leads, width)},
            "place": {"position_ND": (patches, width)},
            "mask": {"mask_token_D": (width,)},
        }
        for option, shapes in vectors.items():
            if option in options:
                made |= {name: learned(*size, dtype=dtype, device=device) for name, size in shapes.items()}
        if "mask" in options:
            made["masked_BN"] = torch.rand(batch, patches, device=device) < 0.4
        if "draw" in options:
            made["lead_draw"] = some_draw(batch, device)
        return made

    return make


@pytest.fixture(scope="session")
def stem_arguments(device: torch.device) -> Callable[..., dict[str, Any]]:
    """(B, L, T) and channels of each block -> arguments of ``lead_masked_conv_stem``; 1 for blocks with a bias."""

    def make(
        *shape: int,
        channels: Sequence[int] = (6, 5, 7),
        biased: Sequence[int] = (1, 0, 1, 0),
        dtype: torch.dtype = torch.float32,
        signal: torch.dtype = torch.int16,
        draw: bool = True,
        kept: str = "some",
    ) -> dict[str, Any]:
        batch, leads, samples = shape
        torch.manual_seed(0)
        made = counts(batch, leads, samples, signal, kept, device)
        made["signal_BLT"] = made["signal_BLT"].detach()
        made["weights"], made["biases"] = [], []
        channels_in = leads
        for size, has_bias in zip(channels, biased, strict=False):
            made["weights"].append(learned(size, channels_in, 2, scale=channels_in**-0.5, dtype=dtype, device=device))
            made["biases"].append(learned(size, scale=0.3, dtype=dtype, device=device) if has_bias else None)
            channels_in = size
        made["norm_weight_C"] = learned(channels[0], dtype=dtype, device=device)
        made["norm_bias_C"] = learned(channels[0], dtype=dtype, device=device)
        return made | {"lead_draw": some_draw(batch, device) if draw else None}

    return make


def learned(*shape: int, scale: float = 1.0, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()


@pytest.fixture(scope="session")
def apart() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The same arguments as parts of larger tensors: nothing but the samples of a lead lies side by side."""

    def stretch(value: Any, every: int = 2) -> Any:
        if isinstance(value, list):
            return [stretch(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        spread = value.new_zeros([size * 2 + 1 for size in value.shape])
        part = spread[tuple(slice(1, None, 2) for _ in value.shape)]
        part.copy_(value.detach())
        return part.requires_grad_(value.requires_grad)

    def put_apart(arguments: dict[str, Any]) -> dict[str, Any]:
        made = {name: stretch(value) for name, value in arguments.items() if name not in ("signal_BLT", "lead_draw")}
        rows_BL = arguments["signal_BLT"]
        spread = rows_BL.new_zeros(2 * rows_BL.shape[0], rows_BL.shape[1] + 3, rows_BL.shape[2] + 5)
        signal_BLT = spread[::2, 2:-1, 3:-2]
        signal_BLT.copy_(rows_BL.detach())
        draw = arguments["lead_draw"]
        if draw is not None:
            made["lead_draw"] = draw._replace(**{name: stretch(getattr(draw, name)) for name in draw._fields[3:]})
        return made | {"signal_BLT": signal_BLT.requires_grad_(rows_BL.requires_grad)}

    return put_apart


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with forced(request.param):
        yield request.param


# --- what comes out ---


def outcomes(
    op: Callable[..., Tensor], arguments: dict[str, Any], kernels: str, wide: bool = False, draws: int = 1
) -> list[dict[str, Tensor]]:
    """The result, and by name the gradient of each tensor that asks for one, for some gradients of the result.

    ``wide`` computes in float64.
    """
    leaves: dict[str, Tensor] = {}

    def fresh(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [fresh(f"{name}[{i}]", one) for i, one in enumerate(value)]
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaves[name] = (value.detach().double() if wide else value.detach()).requires_grad_()
        return leaves[name]

    given = {name: fresh(name, value) for name, value in arguments.items()}
    with torch.enable_grad(), forced(kernels):
        result = op(**given)
    made_by = result.grad_fn.name()
    assert "Compiled" in made_by or ("ecgscale" in made_by) == (kernels == "triton"), "the other implementation ran"
    torch.manual_seed(1)
    found = []
    for _ in range(draws):
        upstream = (torch.randint(-8, 9, result.shape) / 4).to(result)  # numbers that every dtype holds
        gradients = torch.autograd.grad(result, list(leaves.values()), upstream, retain_graph=True)
        found.append({"result": result.detach(), **dict(zip(leaves, gradients, strict=True))})
    return found


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, Tensor]]:
    """(op, arguments, kernels) -> result and gradients by name."""
    return lambda *given: outcomes(*given)[0]


@pytest.fixture(scope="session")
def hold_against_float64() -> Callable[..., None]:
    """Result and gradients of the kernels may be off by twice what plain PyTorch in the same dtype is off.

    What it is off is the largest of five draws of the gradient that comes in, since a single small tensor is exact now
    and then. For what is exact in all five, one unit in the last place of the tensor's largest number comes on top.
    All start from the same numbers, rounded to the dtype before.
    """

    def hold(op: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
        exact = outcomes(op, arguments, "reference", wide=True, draws=5)
        plain = outcomes(op, arguments, "reference", draws=5)
        for name, found in outcomes(op, arguments, "triton")[0].items():
            right = exact[0][name]
            assert (found.dtype, found.shape) == (plain[0][name].dtype, right.shape), name
            plain_error = max(
                (one[name] - other[name]).abs().max().item() for one, other in zip(plain, exact, strict=True)
            )
            error = (found.double() - right).abs().max().item()
            unit = torch.finfo(found.dtype).eps * right.abs().max().item()
            assert error <= 2 * plain_error + unit, f"{name}: off by {error:.3g}, plain PyTorch by {plain_error:.3g}"

    return hold
