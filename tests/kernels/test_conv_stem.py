"""The convolutional stem in Triton against float64: result and every gradient."""

from __future__ import annotations

import pytest
import torch

from ecgscale_kernels import forced
from ecgscale_kernels import lead_masked_conv_stem as op

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGNALS = [torch.int16, *DTYPES]
SHAPES = {  # B, L, T and the channels of each block
    "12 leads, four blocks": (2, 12, 203, (16, 16, 16, 16)),
    "T=1003": (1, 2, 1003, (6, 4)),
    "two blocks": (2, 3, 101, (5, 7)),
    "three blocks, one lead": (2, 1, 101, (6, 5, 7)),
    "one row of one lead": (1, 1, 40, (4, 4)),
    "C=1": (2, 2, 64, (1, 1, 1)),
    "one token": (3, 2, 16, (3, 4, 5, 6)),
    "one token, a tail of 15": (3, 2, 31, (3, 4, 5, 6)),
    "more than one tile of everything": (1, 9, 523, (70, 65, 67)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(hold_against_float64, stem_arguments, shape, dtype) -> None:
    *rows, channels = shape
    hold_against_float64(op, stem_arguments(*rows, channels=channels, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signal", SIGNALS, ids=str)
def test_dtypes_of_the_signal(hold_against_float64, stem_arguments, signal, dtype) -> None:
    hold_against_float64(op, stem_arguments(2, 3, 53, dtype=dtype, signal=signal))


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("biased", [(0, 0, 0), (1, 1, 1), (0, 1, 0)])
def test_options(hold_against_float64, stem_arguments, biased, draw) -> None:
    hold_against_float64(op, stem_arguments(2, 3, 53, biased=biased, draw=draw))


@pytest.mark.parametrize("kept", ["all", "none"])
def test_all_leads_and_none(hold_against_float64, stem_arguments, kept) -> None:
    hold_against_float64(op, stem_arguments(2, 3, 53, draw=False, kept=kept))


def test_the_ends_of_int16(hold_against_float64, stem_arguments) -> None:
    arguments = stem_arguments(2, 3, 53, kept="all")
    ends = torch.tensor([-32768, 32767], dtype=torch.int16, device=arguments["signal_BLT"].device)
    arguments["signal_BLT"] = ends[(arguments["signal_BLT"] % 2).long()]
    hold_against_float64(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_large_constant_costs_no_digits(stem_arguments, run, dtype) -> None:
    """The norm takes it out: the kernels subtract it from the counts, where that is exact."""
    arguments = stem_arguments(2, 3, 53, dtype=dtype)
    near_BLT = (arguments["signal_BLT"] - arguments["offset_BL"][..., None]).short()
    near, far = (run(op, arguments | {"signal_BLT": near_BLT + shift}, "triton") for shift in (0, 25000))
    unit = max(1e-5, 2 * torch.finfo(dtype).eps)  # 25 and a little more in float16 would be off by ten times as much
    for name, found in near.items():
        torch.testing.assert_close(far[name], found, rtol=0, atol=unit * found.abs().max().item(), msg=name)


@pytest.mark.parametrize("blocks", [2, 3])
def test_parts_of_larger_tensors(hold_against_float64, run, stem_arguments, apart, blocks) -> None:
    arguments = stem_arguments(3, 4, 60, channels=(6, 5, 7)[:blocks], biased=(1, 1, 1))
    plain = run(op, arguments, "triton")
    arguments = apart(arguments)
    hold_against_float64(op, arguments)
    for name, found in run(op, arguments, "triton").items():
        assert torch.equal(found, plain[name]), name
    signal_BLT = arguments["signal_BLT"][:1, :1].expand(3, 4, 60)
    hold_against_float64(op, arguments | {"signal_BLT": signal_BLT})


def test_taps_first_in_memory(hold_against_float64, stem_arguments) -> None:
    """Weights that lie (C, 2, I), every second row of a larger one: no copy would be needed, but for the gaps."""
    arguments = stem_arguments(2, 3, 60)
    for block, weight in enumerate(arguments["weights"]):
        spread = weight.detach().transpose(1, 2).repeat_interleave(2, dim=0)
        arguments["weights"][block] = spread[::2].transpose(1, 2).requires_grad_()
    hold_against_float64(op, arguments)


@pytest.mark.parametrize("name", ["weights", "biases", "norm_weight_C", "norm_bias_C"])
def test_only_some_ask_for_a_gradient(run, stem_arguments, name) -> None:
    arguments = stem_arguments(2, 3, 53)
    every = run(op, arguments, "triton")

    def frozen(value):
        if isinstance(value, list):
            return [frozen(one) for one in value]
        return value.detach() if isinstance(value, torch.Tensor) else value

    found = run(op, {key: frozen(value) for key, value in arguments.items()} | {name: arguments[name]}, "triton")
    assert found.keys() == {"result", *(key for key in every if key.startswith(name))}
    assert all(torch.equal(found[key], every[key]) for key in found)


def test_without_gradients_the_same_bits(run, stem_arguments) -> None:
    """Then the values before GELU of the last block are not even written."""
    arguments = stem_arguments(2, 3, 53)
    expected = run(op, arguments, "triton")["result"]
    with torch.no_grad(), forced("triton"):
        assert torch.equal(op(**arguments), expected)


def test_plain_pytorch_takes_the_rest_on(run, stem_arguments) -> None:
    """One block, no rows, float64, and a signal that asks for a gradient, whatever is forced."""
    one_block = stem_arguments(2, 3, 53, channels=(5,))
    asks = stem_arguments(2, 3, 53, signal=torch.float32)
    asks["signal_BLT"].requires_grad_()
    wide = stem_arguments(2, 3, 53, signal=torch.float64, dtype=torch.float64)
    for arguments in (one_block, asks, wide):
        expected = run(op, arguments, "reference")
        with forced("triton"):
            assert torch.equal(op(**arguments), expected["result"])
    assert run(op, asks, "reference")["signal_BLT"].any()
    for name in ("signal_BLT", "gain_BL", "offset_BL"):
        one_block[name] = one_block[name][:0]
    with forced("triton"):
        result = op(**one_block | {"lead_draw": None})
    assert result.shape == (0, 26, 5)
    result.sum().backward()
    assert not one_block["weights"][0].grad.any()
