"""`ecgscale bench kernel --tune`: each kernel launched in other ways than the one that is chosen for it.

It says what was fastest; whoever wants that writes it into the kernel's file. At run time nothing is ever tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from tqdm import tqdm
from triton.errors import TritonError

import ecgscale_kernels.conv_stem
import ecgscale_kernels.patch_embed
from ecgscale.bench.device import Device
from ecgscale.bench.kernel_ways import BACKWARD, FORWARD, Problem, conv_stem, patch_embed
from ecgscale.bench.measure import Round, Section, interleaved, ratios, spread
from ecgscale_kernels.counts import ConvStemSize, PatchEmbedSize
from ecgscale_kernels.triton_parts import Launch

Table = dict[str, Callable[..., Launch]]  # of each kernel of an op


class Tuned(NamedTuple):
    """A kernel and the launches that are tried for it: all combinations of these values."""

    kernel: str
    mode: str  # in which it runs
    values: Mapping[str, tuple[int, ...]]

    def launches(self) -> list[Launch]:
        return [dict(zip(self.values, chosen, strict=True)) for chosen in product(*self.values.values())]


_WARPS = {"num_warps": (4, 8)}
_SHARES = _WARPS | {"programs": (132, 264)}
_PATCH_EMBED: tuple[Tuned, ...] = (
    Tuned("forward", FORWARD, _WARPS | {"BLOCK_N": (32, 64, 128), "BLOCK_D": (64, 128, 256), "num_stages": (2, 4)}),
    Tuned("weight_grad", BACKWARD, _SHARES | {"BLOCK_N": (64, 128), "BLOCK_D": (128, 256), "BLOCK_K": (64, 128)}),
)
_BLOCK = _WARPS | {"BLOCK_M": (64, 128), "BLOCK_C": (128, 256), "num_stages": (2, 3)}
_FIRST = {"BLOCK_M": (32, 64), "BLOCK_C": (64, 128), "BLOCK_I": (32, 64)}
_CONV_STEM: tuple[Tuned, ...] = (
    Tuned("moments", FORWARD, {"BLOCK_M": (64, 128, 256), "num_warps": (2, 4, 8)}),
    Tuned("first_blocks", FORWARD, _BLOCK | {"BLOCK_I": (16, 32)}),
    Tuned("block", FORWARD, _BLOCK | {"BLOCK_I": (32, 64)}),
    Tuned("input_grad", BACKWARD, _WARPS | {"BLOCK_M": (64, 128), "BLOCK_C": (32, 64), "BLOCK_I": (128, 256)}),
    Tuned("weight_grad", BACKWARD, _SHARES | {"BLOCK_M": (32, 64), "BLOCK_C": (128,), "BLOCK_I": (128, 256)}),
    Tuned("weight_1_grad", BACKWARD, _SHARES | _FIRST),
    Tuned("block_0_grad", BACKWARD, _WARPS | _FIRST),
)


def tuned(size: PatchEmbedSize | ConvStemSize, device: Device, seconds: float) -> Section:
    """The fastest launch of each kernel of an op."""
    if isinstance(size, PatchEmbedSize):
        problem, kernels, table = patch_embed(size, device, False), _PATCH_EMBED, ecgscale_kernels.patch_embed.LAUNCH
    else:
        problem, kernels, table = conv_stem(size, device, False), _CONV_STEM, ecgscale_kernels.conv_stem.LAUNCH
    header = ("kernel", "chosen, ms", "fastest, ms", "times as fast", "fastest", "not runnable")
    section = Section(f"Launches: {problem.title}", header)
    section.rows = [_row(problem, kernel, table, device, seconds) for kernel in kernels]
    section.notes = [
        "Times are those of the whole op, forward or backward, with one kernel's launch replaced. The fastest of the "
        "search is measured again beside the chosen one, in turns, and its results are held against float64."
    ]
    return section


def _row(problem: Problem, kernel: Tuned, table: Table, device: Device, seconds: float) -> tuple[str, ...]:
    call, launches = problem.call(problem.ours, kernel.mode), kernel.launches()
    took: list[tuple[float, Launch]] = []
    for launch in tqdm(launches, desc=f"{problem.title}, {kernel.kernel}", unit="launch", disable=None, leave=False):
        try:
            with replaced(table, kernel.kernel, launch):
                took.append((device.ms([device.round(call, seconds)])[0], launch))
        except (TritonError, RuntimeError):  # too much shared memory, or what the compiler cannot do
            torch.cuda.synchronize()  # raises where the device itself has failed
    failed = f"{len(launches) - len(took)} of {len(launches)}"
    if not took:
        return kernel.kernel, "", "", "", "", failed
    fastest = min(took, key=lambda pair: pair[0])[1]

    def again() -> Round:
        with replaced(table, kernel.kernel, fastest):
            return device.round(call, seconds)

    done = interleaved({"chosen": partial(device.round, call, seconds), "fastest": again}, 5, kernel.kernel)
    with replaced(table, kernel.kernel, fastest):
        errors = problem.errors()
    right = errors[problem.ours] <= problem.bound(errors)
    times = (spread(device.ms(done[which])).text(4) for which in ("chosen", "fastest"))
    faster = ratios(done["fastest"], done["chosen"]).text(3)
    said = ", ".join(f"{name} {value}" for name, value in fastest.items()) if right else "**WRONG**"
    return kernel.kernel, *times, faster, said, failed


@contextmanager
def replaced(table: Table, kernel: str, launch: Launch) -> Iterator[None]:
    """A kernel launched with other values than the chosen ones, while it lasts."""
    chosen = table[kernel]
    table[kernel] = lambda *sizes: {**chosen(*sizes), **launch}
    try:
        yield
    finally:
        table[kernel] = chosen
