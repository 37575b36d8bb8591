"""`ecgscale bench kernel`: the fused ops beside eager and compiled PyTorch, and in a step of pretraining.

The floor of an op is the larger of the time for its bytes at the rate of a large copy and the time for its FLOPs at the
rate of a large matrix product, both measured in the same run; ecgscale_kernels/counts.py says what is counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ecgscale.bench.device import Ceilings, Device
from ecgscale.bench.kernel_measure import Costs, Measured, measure, share_of_floor, write_rates, written
from ecgscale.bench.kernel_ways import BOTH, CONV, FORWARD, REFERENCE, conv_stem, patch_embed
from ecgscale.bench.measure import (
    Check,
    Meaning,
    Report,
    Section,
    interleaved,
    one_core,
    ratios,
    reporting,
    spread,
    timed,
)
from ecgscale.data.batch import synthetic_batch
from ecgscale.errors import InputError
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import build_objective, objective_config
from ecgscale_kernels import Backend, counts, forced
from ecgscale_kernels.counts import ConvStemSize, PatchEmbedSize

PARTS = ("patches", "stems", "steps")  # fields of Effort
_KEPT = 6  # of 12 leads, the mean of random lead masking
_NOT_SLOWER = 0.97  # so far from 1 lies what one code measures against itself


@dataclass(frozen=True)
class Effort:
    """How much is measured. ``seconds`` are those of one way in one mode in one round."""

    seconds: float
    rounds: int
    patches: tuple[tuple[int, int, int], ...]  # rows, samples of a patch, width
    stems: tuple[tuple[int, int], ...]  # rows, channels
    steps: tuple[tuple[str, int], ...]  # preset, rows
    copied_bytes: int
    product_side: int
    samples: int = 2500
    compiled: int = 3  # for so many of the first patches and stems torch.compile runs: up to two minutes each
    quick: bool = False  # only to show that everything runs: no bound is held against the numbers

    @staticmethod
    def usual(cuda: bool) -> Effort:
        """Shapes of real models. On a GPU the bounds hold for the first two patches and the first stem."""
        if not cuda:
            patches = ((32, 16, 768), (32, 25, 768), (32, 50, 768))
            return Effort(0.15, 9, patches, ((8, 256),), (("tiny", 16),), 1 << 28, 2048)
        held = ((512, 16, 768), (512, 50, 768))
        others = ((512, 25, 768), (256, 16, 768), (64, 16, 768), (512, 16, 256), (512, 16, 1024))
        stems, steps = ((256, 256), (64, 256)), (("base", 64),)
        return Effort(0.03, 9, held + others, stems, steps, 1 << 30, 8192)

    @staticmethod
    def least() -> Effort:
        """Shows that everything runs; the numbers are worth nothing, so no bound is held against them."""
        patches, stems = ((2, 16, 64), (2, 50, 64)), ((2, 32),)
        return Effort(0.0, 2, patches, stems, (("tiny", 4),), 1 << 20, 128, samples=1000, quick=True)

    def only(self, parts: Sequence[str]) -> Effort:
        """Nothing but some of PARTS."""
        left_out: dict[str, Any] = {part: () for part in PARTS if part not in parts}
        return replace(self, **left_out)


def bench_kernel(out: Path, device_name: str, effort: Effort) -> Report:
    """Measure and write to ``out``; what was measured before an error is written too.

    Raises InputError where there is no GPU but one is asked for.
    """
    cuda = device_name == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("bench kernel: --device cuda, but PyTorch sees no GPU; leave it out to measure on the CPU")
    title = "Kernels on a CPU: plain PyTorch alone; the Triton kernels are not measured here, `make gpu` does that"
    title = f"Kernels on {torch.cuda.get_device_name()}" if cuda else title
    with reporting("kernel", title, out, effort.quick) as report, nullcontext() if cuda else one_core():
        for section in _sections(Device(device_name), effort):
            report.sections.append(section)
    return report


def _sections(device: Device, effort: Effort) -> Iterator[Section]:
    torch.manual_seed(0)
    ceilings = device.ceilings(effort.copied_bytes, effort.product_side, effort.rounds, effort.seconds)
    yield _ceilings(device, ceilings, effort)
    yield from (_patch_embed(shape, device, ceilings, effort) for shape in effort.patches)
    yield from (_conv_stem(shape, device, ceilings, effort) for shape in effort.stems)
    yield from (_step(preset, rows, device, effort) for preset, rows in effort.steps)


def _ceilings(device: Device, ceilings: Ceilings, effort: Effort) -> Section:
    dtype = str(device.dtype).removeprefix("torch.")
    found = {
        f"copy of {effort.copied_bytes / 1e6:,.0f} MB, read and written, GB/s": ceilings.bytes_per_s / 1e9,
        f"product of {effort.product_side:,}² matrices, {dtype}, TFLOP/s": ceilings.flops_per_s / 1e12,
        "smallest launch, µs": 1e6 * ceilings.launch_s,
    }
    section = Section("The device", ("what", "best round"), [(what, f"{value:,.4g}") for what, value in found.items()])
    labels = {"copy_gb_per_s": "GB/s", "product_tflop_per_s": "TFLOP/s", "launch_us": "µs"}
    for (label, unit), value in zip(labels.items(), found.values(), strict=True):
        section.scalar(f"device/{label}", value, Meaning(unit, ours=False))
    section.notes = [
        "The GPU's events around each call, after its cache was flushed for longer than the host needs to launch the "
        "call: gaps between launches do not count, as in training, where the host runs ahead. The smallest launch does."
        if device.cuda
        else "One core, torch has one thread; times are CPU time, since others use the machine too. Its speed changes "
        "from minute to minute, so shares of the floor are rough here; ratios within rounds are not.",
        f"Segments are 12 × {effort.samples:,} int16 samples with {_KEPT} leads kept; arithmetic is {dtype}. Every way "
        "begins from int16 and ends with contiguous (B, N, D), but for the one that says so.",
        "Before it is timed, each way's result and gradients are held against float64.",
    ]
    return section


# -- ops -------------------------------------------------------------------------------------------------------------


def _patch_size(shape: tuple[int, int, int], device: Device, effort: Effort) -> PatchEmbedSize:
    rows, patch, width = shape
    return PatchEmbedSize(rows, _KEPT, patch, width, samples=effort.samples, item=device.dtype.itemsize)


def _stem_size(shape: tuple[int, int], device: Device, effort: Effort) -> ConvStemSize:
    rows, channels = shape
    return ConvStemSize(rows, _KEPT, channels, samples=effort.samples, item=device.dtype.itemsize)


def _patch_embed(shape: tuple[int, int, int], device: Device, ceilings: Ceilings, effort: Effort) -> Section:
    size = _patch_size(shape, device, effort)
    fused = Costs(counts.patch_embed_forward(size), counts.patch_embed_backward(size))
    plain = Costs(counts.plain_patch_embed_forward(size), counts.plain_patch_embed_backward(size))
    problem = patch_embed(size, device, effort.patches.index(shape) < _compiled(device, effort))
    found = measure(problem, device, effort.rounds, effort.seconds)
    section = written(found)
    write_rates(section, found, ceilings, fused, plain)
    if effort.quick or problem.ours not in found.right:
        return section
    if not device.cuda:
        section.checks += _not_slower(found)
    elif shape in effort.patches[:2]:
        for mode, bound in ((FORWARD, 0.8), (BOTH, 0.65)):
            share = share_of_floor(found, problem.ours, mode, ceilings, fused)
            section.checks.append(Check(f"{mode}, share of the floor", share, bound))
        section.checks.append(_faster(found, FORWARD, 1.2 if size.patch == 16 else 1.6))
    return section


def _conv_stem(shape: tuple[int, int], device: Device, ceilings: Ceilings, effort: Effort) -> Section:
    size = _stem_size(shape, device, effort)
    fused = Costs(counts.conv_stem_forward(size), counts.conv_stem_backward(size))
    plain = Costs(counts.plain_conv_stem_forward(size), counts.plain_conv_stem_backward(size))
    problem = conv_stem(size, device, effort.stems.index(shape) < _compiled(device, effort))
    found = measure(problem, device, effort.rounds, effort.seconds)
    section = written(found)
    write_rates(section, found, ceilings, fused, plain)
    if effort.quick or problem.ours not in found.right:
        return section
    ours, eager = found.memory[problem.ours], found.memory[CONV]
    if ours is None or eager is None:
        section.checks += _not_slower(found)
    elif shape == effort.stems[0]:
        section.checks += [_faster(found, FORWARD, 1.5), _faster(found, BOTH, 1.3)]
        section.checks.append(Check(f"peak memory / {CONV}'s", ours.peak / eager.peak, 0.35, at_least=False))
    return section


def _compiled(device: Device, effort: Effort) -> int:
    """On a CPU torch.compile needs a C++ compiler."""
    return effort.compiled if device.cuda or shutil.which("g++") else 0


def _faster(found: Measured, mode: str, bound: float) -> Check:
    best = found.best_other(mode)
    return Check(f"{mode}, times as fast as {best}", found.ratio(mode, found.problem.ours, best).median, bound)


def _not_slower(found: Measured) -> list[Check]:
    """Slower would be what is slower in three of four rounds."""
    return [
        Check(f"{mode}, times as fast as {CONV}", found.ratio(mode, REFERENCE, CONV).median, _NOT_SLOWER)
        for mode in (FORWARD, BOTH)
    ]


# -- a step ----------------------------------------------------------------------------------------------------------


def _step(preset: str, rows: int, device: Device, effort: Effort) -> Section:
    """Forward and backward of the whole objective, launches included."""
    section = Section(
        f"Pretraining, preset {preset}, {rows} segments",
        ("kernels", "forward + backward, ms", "segments/s", "peak, MB"),
    )
    objective = build_objective(PRESETS[preset], objective_config(), seed=0, rate_hz=500)
    objective.to(device.torch, device.dtype)
    batch = synthetic_batch(rows, effort.samples).to(device.torch)
    backends: tuple[Backend, ...] = ("triton", "reference") if device.cuda else ("reference",)

    def work(backend: Backend) -> int:
        objective.zero_grad()
        with forced(backend):
            loss, _ = objective(batch, share=False)
        loss.backward()
        device.wait()
        return 1

    works: dict[str, Callable[[], int]] = {backend: partial(work, backend) for backend in backends}
    candidates = {name: partial(timed, one, effort.seconds) for name, one in works.items()}
    done = interleaved(candidates, effort.rounds, section.title)
    for name, rounds in done.items():
        took_ms = spread([1e3 * one.wall_s / one.units for one in rounds])
        objective.zero_grad()  # those of the rounds are no part of what is held before
        peak = device.peak(works[name])
        memory = "not counted" if peak is None else f"{peak / 1e6:,.0f}"
        section.rows.append((name, took_ms.text(1), f"{1e3 * rows / took_ms.median:,.0f}", memory))
        section.scalar(f"step/{name}/ms", took_ms.median, Meaning("ms", "lower"))
        if peak is not None:
            section.scalar(f"step/{name}/peak_mb", peak / 1e6, Meaning("MB", "lower"))
    section.keep(done)
    if device.cuda:
        faster = ratios(done["triton"], done["reference"])
        section.notes.append(f"With Triton {faster.text(3)} times as fast as with the reference.")
    section.notes.append("By the wall's clock. No optimizer, no exchange between ranks, no loader.")
    return section
