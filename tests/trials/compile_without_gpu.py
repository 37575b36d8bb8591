"""Compile the kernels for a GPU that is not there, at a preset's shapes, and print what each takes of it.

    python tests/trials/compile_without_gpu.py 90 bfloat16 tf32    for sm_90; without a type, for all
    PYTHONPATH=OTHER_TRITON:... python ...                          by a Triton of pip install --target OTHER_TRITON

Triton is given a driver that knows its target and nothing else, and each launch becomes a compilation. Ends with an
error where a kernel asks for more shared memory than there is, or has a stack in a type of 16 bits: it has none of its
own, so that what lies there was spilled from registers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from itertools import product
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is unset

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ecgscale.model.presets import PRESETS
from ecgscale_kernels import LeadDraw
from ecgscale_kernels.conv_stem import lead_masked_conv_stem
from ecgscale_kernels.patch_embed import lead_masked_patch_embed

SHARED_BYTES = {  # that a block may have (CUDA C++ Programming Guide)
    80: 163 * 1024,
    90: 227 * 1024,
}
BATCH, LEADS, SAMPLES = 16, 12, 2500
KINDS = {  # dtype, samples of a patch
    "bfloat16": (torch.bfloat16, (16, 25, 50)),
    "float16": (torch.float16, (16, 25, 50)),
    "float32": (torch.float32, (25, 50)),
    "tf32": (torch.float32, (25, 50)),
    "long": (torch.bfloat16, (250,)),
}


class Compiled(NamedTuple):
    """What a kernel takes."""

    name: str
    shared: int  # bytes of a block
    registers: str  # of a thread; ? without cuobjdump
    stack: str  # bytes of a thread


class Target:
    """A driver of no device."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead_of_launch(arch: int) -> list[Compiled]:
    """From now on a launch prints a line, and what the kernel takes is added to the result."""
    driver.set_active(Target(arch))
    launch, done = JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **named):
        begin = time.perf_counter()
        kernel = launch(self, *arguments, grid=grid, warmup=True, **named)
        seconds = time.perf_counter() - begin
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        registers, stack = registers_and_stack(kernel.asm["cubin"])
        done.append(Compiled(name, kernel.metadata.shared, registers, stack))
        figures = f"{kernel.metadata.shared:7} {registers:>8} {stack:>5} {kernel.metadata.num_warps:5} {seconds:7.1f}"
        print(f"{name:33} {figures}", flush=True)
        return kernel

    JITFunction.run = compile_only
    return done


def registers_and_stack(cubin: bytes) -> tuple[str, str]:
    """Registers of a thread, and bytes of its stack; unknown without cuobjdump."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return "?", "?"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":") for field in printed.split() if field.startswith(("REG:", "STACK:")))
    return fields["REG"], fields["STACK"]


def learned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def launch_patch_embed(dtype: torch.dtype, patch: int, width: int) -> None:
    """Every kernel, forward and backward, with all options."""
    row_B = torch.arange(BATCH)
    draw = LeadDraw(1 << 40, 4, 0.5, row_B % 2, row_B)
    patches = SAMPLES // patch
    signal_BLT, one_BL = torch.zeros(BATCH, LEADS, SAMPLES, dtype=torch.int16), torch.ones(BATCH, LEADS)
    token_BND = lead_masked_patch_embed(
        signal_BLT, one_BL, one_BL, learned(width, LEADS, patch, dtype=dtype), learned(width, dtype=dtype),
        lead_draw=draw, lead_LD=learned(LEADS, width, dtype=dtype), mask_token_D=learned(width, dtype=dtype),
        position_ND=learned(patches, width, dtype=dtype), masked_BN=row_B[:, None] > torch.arange(patches),
    )  # fmt: skip
    token_BND.sum().backward()
    no_grad_BND = torch.zeros(BATCH, patches, width, dtype=dtype)
    weight_DLP = torch.zeros(width, LEADS, patch, dtype=dtype)
    torch.ops.ecgscale.patch_embed_signal_grad(signal_BLT.to(dtype), one_BL, None, no_grad_BND, weight_DLP, *draw)


def launch_conv_stem(dtype: torch.dtype, channels: int, blocks: int) -> None:
    """Every kernel, forward and backward."""
    row_B = torch.arange(BATCH)
    draw = LeadDraw(1 << 40, 4, 0.5, row_B % 2, row_B)
    signal_BLT, one_BL = torch.zeros(BATCH, LEADS, SAMPLES, dtype=torch.int16), torch.ones(BATCH, LEADS)
    weights = [learned(channels, channels if block else LEADS, 2, dtype=dtype) for block in range(blocks)]
    bias, *norm = (learned(channels, dtype=dtype) for _ in range(3))
    lead_masked_conv_stem(signal_BLT, one_BL, one_BL, weights, [bias] * blocks, *norm, lead_draw=draw).sum().backward()


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("arch", type=int, choices=SHARED_BYTES)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--blocks", type=int, default=4, help="of the stem; a fourth adds variants, but no kernel")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["base"], help="whose shapes (default base)")
    given = parser.parse_args()
    compiled, spilling = compile_instead_of_launch(given.arch), []
    print(f"{f'sm_{given.arch}':33} {'shared':>7} {'register':>8} {'stack':>5} {'warps':>5} {'seconds':>7}")
    for kind, preset in product(given.kinds, given.preset):
        print(kind if preset == "base" else f"{kind},{preset}")
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        (dtype, patches), before = KINDS[kind], len(compiled)
        launch_conv_stem(dtype, PRESETS[preset].stem_channels, given.blocks)
        for patch in patches:
            launch_patch_embed(dtype, patch, PRESETS[preset].width)
        if dtype != torch.float32:
            spilling += [f"{one.name} {one.stack} bytes" for one in compiled[before:] if one.stack not in ("0", "?")]
    most = max(one.shared for one in compiled)
    if most > SHARED_BYTES[given.arch]:
        sys.exit(f"{most} bytes of shared memory; sm_{given.arch} has {SHARED_BYTES[given.arch]}")
    if spilling:
        sys.exit(f"Triton {triton.__version__} spills in a type of 16 bits: {', '.join(spilling)}")
