"""Both ways of the positional convolution: as right as the framework's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ecgscale.model import position
from ecgscale.model.position import PositionalConvolution, convolve_by_fft, convolve_directly

SHAPES = [  # rows, tokens, width, kernel, groups
    (2, 156, 32, 128, 4),
    (2, 155, 32, 127, 4),
    (3, 62, 24, 16, 1),
    (1, 5, 16, 31, 16),
    (2, 1, 16, 128, 4),
    (2, 9, 8, 1, 2),
]


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    rows, tokens, width, kernel, groups = shape
    torch.manual_seed(0)
    weight_DIK = torch.randn(width, width // groups, kernel) * (4 / (kernel * width)) ** 0.5
    values = torch.randn(rows, tokens, width).to(dtype), weight_DIK, torch.randn(width).to(dtype)
    return [value.requires_grad_() for value in values]


def results(convolve, values: list[Tensor], groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients in float64, computed in the types that are given."""
    y_BND = convolve(*values, groups)
    torch.manual_seed(1)
    gradients = torch.autograd.grad(y_BND, values, torch.randn(y_BND.shape).to(dtype).to(y_BND.dtype))
    return [result.detach().double() for result in (y_BND, *gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fourier_transforms_err_no_more_than_the_framework(shape, dtype) -> None:
    values, groups = arguments(shape, dtype), shape[-1]
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = results(convolve_directly, exact, groups, dtype)
    plain = results(convolve_directly, values, groups, dtype)
    ours = results(convolve_by_fft, values, groups, dtype)
    for right, theirs, mine in zip(truth, plain, ours, strict=True):
        assert mine.shape == right.shape
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + 5e-7 * right.norm()


def test_float64_stays_float64() -> None:
    values = [value.detach().double() for value in arguments((2, 40, 16, 24, 4), torch.float32)]
    torch.testing.assert_close(convolve_by_fft(*values, 4), convolve_directly(*values, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [15, 16, 33])
def test_the_module_gives_the_same_by_either_way(monkeypatch, kernel) -> None:
    torch.manual_seed(0)
    module, x_BND = PositionalConvolution(32, kernel, 4), torch.randn(3, 50, 32)
    found = []
    for least in (1, 1000):
        monkeypatch.setattr(position, "FFT_KERNEL", least)
        module.zero_grad()
        y_BND = module(x_BND)
        y_BND.square().sum().backward()
        found.append([y_BND.detach(), *(parameter.grad for parameter in module.parameters())])
    for by_fft, direct in zip(*found, strict=True):
        assert (by_fft - direct).norm() <= 1e-6 * direct.norm()


def test_no_rows_give_no_rows() -> None:
    assert PositionalConvolution(32, 16, 4)(torch.zeros(0, 9, 32)).shape == (0, 9, 32)
