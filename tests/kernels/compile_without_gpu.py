"""Compile the kernels for a GPU that is not there, at the model's shapes, and print what each takes of it.

python tests/kernels/compile_without_gpu.py 90 bfloat16 tf32    for sm_90; without a type, for all four

Triton is given a driver that knows its target and nothing else, and each launch becomes a compilation. Ends with an
error where a kernel asks for more shared memory than there is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is unset

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ecgscale_kernels import LeadDraw
from ecgscale_kernels.conv_stem import lead_masked_conv_stem
from ecgscale_kernels.patch_embed import lead_masked_patch_embed

SHARED_BYTES = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # that a block may have (CUDA C++ Programming Guide)
BATCH, LEADS, SAMPLES, CHANNELS = 16, 12, 2500, 256
TYPES = {  # dtype, samples of a patch, width
    "bfloat16": (torch.bfloat16, 25, 768),
    "float16": (torch.float16, 16, 256),
    "float32": (torch.float32, 50, 1024),
    "tf32": (torch.float32, 25, 256),
    "long": (torch.bfloat16, 250, 768),  # patches
}


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


def compile_instead_of_launch(arch: int) -> list[int]:
    """From now on a launch prints a line, and the shared memory that it wants is added to the result."""
    driver.set_active(Target(arch))
    launch, wanted = JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **named):
        begin = time.perf_counter()
        kernel = launch(self, *arguments, grid=grid, warmup=True, **named)
        seconds = time.perf_counter() - begin
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        wanted.append(kernel.metadata.shared)
        used = registers_and_stack(kernel.asm["cubin"])
        print(f"{name:33} {wanted[-1]:7} {used:>14} {kernel.metadata.num_warps:5} {seconds:7.1f}", flush=True)
        return kernel

    JITFunction.run = compile_only
    return wanted


def registers_and_stack(cubin: bytes) -> str:
    """Registers of a thread, and bytes of the stack that it spills to; unknown without cuobjdump."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        return "? ?"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(field.split(":") for field in said.split() if field.startswith(("REG:", "STACK:")))
    return f"{found['REG']} {found['STACK']}"


def learned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def launch_all(dtype: torch.dtype, patch: int, width: int, blocks: int) -> None:
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
    weights = [learned(CHANNELS, CHANNELS if block else LEADS, 2, dtype=dtype) for block in range(blocks)]
    bias, *norm = (learned(CHANNELS, dtype=dtype) for _ in range(3))
    lead_masked_conv_stem(signal_BLT, one_BL, one_BL, weights, [bias] * blocks, *norm, lead_draw=draw).sum().backward()


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("arch", type=int, choices=SHARED_BYTES)
    parser.add_argument("kinds", nargs="*", default=list(TYPES))
    parser.add_argument("--blocks", type=int, default=4, help="of the stem; a fourth adds variants, but no kernel")
    given = parser.parse_args()
    wanted = compile_instead_of_launch(given.arch)
    print(f"{f'sm_{given.arch}':33} {'shared':>7} {'register stack':>14} {'warps':>5} {'seconds':>7}")
    for kind in given.kinds:
        print(kind)
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        launch_all(*TYPES[kind], given.blocks)
    if max(wanted) > SHARED_BYTES[given.arch]:
        sys.exit(f"{max(wanted)} bytes of shared memory; sm_{given.arch} has {SHARED_BYTES[given.arch]}")
