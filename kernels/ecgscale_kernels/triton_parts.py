"""Pieces that the Triton kernels share, and what they ask of the host."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgscale_kernels.lead_draw import LeadDraw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Launch = dict[str, int]  # how a kernel is cut into programs: block sizes, num_warps, num_stages
PROGRAMS = 132  # that a weight's gradient is cut into, about; a device has so many multiprocessors


class Draw(NamedTuple):
    """A LeadDraw as arguments of a custom op or a kernel: numbers and tensors only."""

    seed: int
    purpose: int
    probability: float
    segment_B: Tensor | None
    position_B: Tensor | None

    @staticmethod
    def of(draw: LeadDraw | None) -> Draw:
        if draw is None:
            return Draw(0, 0, 0.0, None, None)
        seed = draw.seed & (1 << 64) - 1
        signed = seed - (1 << 64) if seed >> 63 else seed  # a custom op's int has 64 bits with a sign
        return Draw(signed, draw.purpose, draw.probability, draw.segment_B.contiguous(), draw.position_B.contiguous())

    def lead_draw(self) -> LeadDraw | None:
        if self.segment_B is None or self.position_B is None:
            return None
        return LeadDraw(self.seed, self.purpose, self.probability, self.segment_B, self.position_B)

    def arguments(self) -> dict[str, Any]:
        """Of a kernel."""
        return {
            "seed": self.seed,
            "purpose": self.purpose,
            "probability": self.probability,
            "segment_ptr": self.segment_B,
            "position_ptr": self.position_B,
            "HAS_DRAW": self.segment_B is not None,
        }


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The type of a matrix product's operands and its precision, as arguments of a kernel.

    The interpreter computes on the bits of bfloat16 as if they were whole numbers, so there the operands stay float32.
    """
    operands = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    if INTERPRETED and dtype == torch.bfloat16:
        operands = tl.float32
    tensor_cores = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"DOT": operands, "PRECISION": "tf32" if tensor_cores else "ieee"}


@triton.jit
def kept_gain(gain_ptr, lead_K, there_K, row, leads, seed, purpose, probability, segment_ptr, position_ptr, HAS_DRAW):
    """Gains of some leads of a row; zero where the draw masks them, the same bits as ``LeadDraw.keep_BL``."""
    gain_K = tl.load(gain_ptr + row * leads + lead_K, mask=there_K, other=0.0).to(tl.float32)
    if HAS_DRAW:
        element_K = (lead_K // 4).to(tl.uint32)
        zero_K = element_K * 0
        position = tl.load(position_ptr + row)
        stream_K = zero_K + (2 * purpose + tl.load(segment_ptr + row)).to(tl.uint32)
        low_K, high_K = zero_K + position.to(tl.uint32), zero_K + (position >> 32).to(tl.uint32)
        a_K, b_K, c_K, d_K = tl.philox(seed, element_K, stream_K, low_K, high_K)
        turn_K = lead_K % 4
        word_K = tl.where(turn_K == 0, a_K, tl.where(turn_K == 1, b_K, tl.where(turn_K == 2, c_K, d_K)))
        uniform_K = ((word_K >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
        gain_K = tl.where(uniform_K >= probability, gain_K, 0.0)
    return gain_K


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int, least: int = 16) -> int:
    """The least power of two that holds ``size``; a matrix product takes 16 or more."""
    return max(least, 1 << (size - 1).bit_length())
