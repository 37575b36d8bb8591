"""Positional convolution: where tokens stand, learnt from their neighbours (wav2vec 2.0; Baevski et al. 2020).

Shape suffixes: B rows, N tokens, D width, G groups, I and O channels in and out of a group, K kernel, F frequencies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FFT_KERNEL = 16  # from which on a CPU is faster by Fourier transforms, forward and backward, as measured


class PositionalConvolution(nn.Module):
    """Grouped convolution over tokens with weight norm over the kernel axis: relative positions.

    Owns direction ``v`` and magnitude ``g``, since ``torch.nn.utils.weight_norm`` fails under ZeRO stage 3.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.v = nn.Parameter(torch.empty(width, width // groups, kernel))
        nn.init.normal_(self.v, std=(4 / (kernel * width)) ** 0.5)
        self.g = nn.Parameter(self.v.detach().norm(dim=(0, 1)))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        v32 = self.v.float()
        weight_DIK = v32 * (self.g.float() / v32.norm(dim=(0, 1)))
        convolve = convolve_by_fft if self._by_fft(x_BND) else convolve_directly
        return F.gelu(convolve(x_BND, weight_DIK, self.bias, self.groups))

    def _by_fft(self, x_BND: Tensor) -> bool:
        """On a GPU neither was measured; a traced graph, such as an ONNX file, has no complex numbers."""
        fast = x_BND.device.type == "cpu" and self.kernel >= FFT_KERNEL
        return fast and not torch.compiler.is_compiling() and x_BND.shape[0] > 0


def convolve_directly(x_BND: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """The framework's grouped convolution, (B, N, D) -> (B, N, D): the truth that the other way is held against."""
    kernel = weight_DIK.shape[-1]
    weight_DIK = weight_DIK.to(x_BND.dtype)
    y_BDN = F.conv1d(x_BND.transpose(1, 2), weight_DIK, bias_D, padding=kernel // 2, groups=groups)
    return y_BDN[..., : x_BND.shape[1]].transpose(1, 2)  # an even kernel gives one sample too many


def convolve_by_fft(x_BND: Tensor, weight_DIK: Tensor, bias_D: Tensor, groups: int) -> Tensor:
    """The same as one small product per frequency, in float32 or wider, rounded once at the end.

    The circle of the transform holds the tokens and one margin of zeros: what runs over its end falls into the margin.
    """
    rows, tokens, width = x_BND.shape
    kernel = weight_DIK.shape[-1]
    margin = kernel // 2
    length = fast_length(max(tokens + margin, kernel))
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    x_BDF = torch.fft.rfft(F.pad(x_BND.to(wide).transpose(1, 2), (margin, 0)), length)
    weight_DIF = torch.fft.rfft(weight_DIK.to(wide), length).conj()
    x_GFBI = x_BDF.view(rows, groups, width // groups, -1).permute(1, 3, 0, 2)
    weight_GFIO = weight_DIF.view(groups, width // groups, width // groups, -1).permute(0, 3, 2, 1)
    y_BGOF = (x_GFBI @ weight_GFIO).permute(2, 0, 3, 1)
    y_BND: Tensor = torch.fft.irfft(y_BGOF.reshape(rows, width, -1), length)[..., :tokens].transpose(1, 2)
    y_BND = y_BND + bias_D.to(wide)
    return y_BND.to(x_BND.dtype)


def fast_length(least: int) -> int:
    """The smallest even length from ``least`` on without prime factors above 7."""
    length = least + least % 2
    while True:
        rest = length
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2
