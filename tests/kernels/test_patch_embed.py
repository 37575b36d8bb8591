"""The patch embedding in Triton against float64: result and every gradient."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgscale_kernels import forced
from ecgscale_kernels import lead_masked_patch_embed as op

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGNALS = [torch.int16, *DTYPES]
OPTIONS = ("bias", "lead", "place", "mask", "draw")
SHAPES = {  # B, L, T, P, D
    "12 leads, a tail of 3": (2, 12, 203, 25, 40),
    "T=1003": (1, 2, 1003, 16, 20),
    "T=101, P=50": (2, 3, 101, 50, 33),
    "odd patch": (3, 3, 101, 7, 9),
    "one lead": (2, 1, 101, 16, 24),
    "one row of one lead": (1, 1, 40, 16, 16),
    "D=1": (2, 2, 64, 16, 1),
    "P=1": (2, 3, 5, 1, 4),
    "one patch": (2, 2, 25, 25, 17),
    "more than one tile of everything": (2, 17, 203, 3, 300),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(hold_against_float64, patch_arguments, shape, dtype) -> None:
    hold_against_float64(op, patch_arguments(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signal", SIGNALS, ids=str)
def test_dtypes_of_the_signal(hold_against_float64, patch_arguments, signal, dtype) -> None:
    hold_against_float64(op, patch_arguments(2, 3, 101, 16, 24, dtype=dtype, signal=signal))


@pytest.mark.parametrize("options", [some for n in (0, 1, 4) for some in combinations(OPTIONS, n)], ids="-".join)
def test_options(hold_against_float64, patch_arguments, options) -> None:
    hold_against_float64(op, patch_arguments(2, 3, 50, 7, 9, signal=torch.float32, options=options))


@pytest.mark.parametrize("kept", ["all", "none"])
def test_all_leads_and_none(hold_against_float64, run, patch_arguments, kept) -> None:
    arguments = patch_arguments(2, 3, 50, 7, 9, signal=torch.float32, options=("bias", "lead", "place"), kept=kept)
    hold_against_float64(op, arguments)
    if kept == "none":
        found = run(op, arguments, "triton")
        assert not any(found[name].any() for name in ("weight_DLP", "lead_LD", "signal_BLT"))
        expected_ND = arguments["bias_D"] + arguments["position_ND"]
        assert torch.equal(found["result"], expected_ND.detach().expand_as(found["result"]))


def test_the_ends_of_int16(hold_against_float64, patch_arguments) -> None:
    arguments = patch_arguments(2, 3, 50, 7, 9, dtype=torch.float16, kept="all")
    ends = torch.tensor([-32768, 32767], dtype=torch.int16, device=arguments["signal_BLT"].device)
    arguments["signal_BLT"] = ends[(arguments["signal_BLT"] % 2).long()]
    for offset in (-32768.0, 32767.0, 0.0):
        hold_against_float64(op, arguments | {"offset_BL": torch.full_like(arguments["offset_BL"], offset)})


@pytest.mark.parametrize("signal", [torch.int16, torch.float32], ids=str)
def test_parts_of_larger_tensors(hold_against_float64, run, patch_arguments, apart, signal) -> None:
    """Rows and leads of the signal may lie anywhere; all else is put in order."""
    arguments = patch_arguments(3, 4, 60, 7, 9, signal=signal)
    plain = run(op, arguments, "triton")
    arguments = apart(arguments)
    hold_against_float64(op, arguments)
    for name, found in run(op, arguments, "triton").items():
        assert torch.equal(found, plain[name]), name
    signal_BLT = arguments["signal_BLT"].detach()[:1, :1].expand(3, 4, 60)
    hold_against_float64(op, arguments | {"signal_BLT": signal_BLT})


@pytest.mark.parametrize("name", ["signal_BLT", "weight_DLP", "bias_D", "lead_LD", "position_ND", "mask_token_D"])
def test_only_one_asks_for_a_gradient(run, patch_arguments, name) -> None:
    arguments = patch_arguments(2, 3, 50, 7, 9, signal=torch.float32)
    every = run(op, arguments, "triton")
    frozen = {key: v.detach() if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
    found = run(op, frozen | {name: arguments[name]}, "triton")
    assert found.keys() == {"result", name}
    assert all(torch.equal(found[key], every[key]) for key in found)


def test_neither_gain_nor_offset_gets_a_gradient(patch_arguments, kernels) -> None:
    arguments = patch_arguments(2, 3, 50, 7, 9)
    for name in ("gain_BL", "offset_BL"):
        arguments[name].requires_grad_()
    op(**arguments).sum().backward()
    assert arguments["gain_BL"].grad is arguments["offset_BL"].grad is None
    assert arguments["bias_D"].grad is not None


def test_no_rows(run, patch_arguments) -> None:
    """Plain PyTorch takes them on, whatever is forced."""
    arguments = patch_arguments(2, 3, 50, 7, 9, signal=torch.float32)
    rows = {"signal_BLT", "gain_BL", "offset_BL", "masked_BN"}
    empty = {name: value[:0].detach() if name in rows else value for name, value in arguments.items()}
    with forced("triton"):
        result = op(**empty | {"lead_draw": None})
    assert result.shape == (0, 7, 9)
    result.sum().backward()
    assert not arguments["weight_DLP"].grad.any()


@settings(max_examples=10)
@given(st.data())
def test_any_shape(hold_against_float64, patch_arguments, data) -> None:
    batch, leads, patch, width = (data.draw(st.integers(1, most)) for most in (3, 6, 20, 20))
    samples = patch * data.draw(st.integers(1, 6)) + data.draw(st.integers(0, patch - 1))
    dtype, signal = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(SIGNALS))
    options, kept = data.draw(st.sets(st.sampled_from(OPTIONS))), data.draw(st.sampled_from(["some", "all", "none"]))
    shape = (batch, leads, samples, patch, width)
    hold_against_float64(op, patch_arguments(*shape, dtype=dtype, signal=signal, options=options, kept=kept))
