"""One problem of the kernel bench, measured and written down: a table with a row for each way."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import partial

from ecgscale.bench.device import Ceilings, Device, Memory
from ecgscale.bench.kernel_ways import BACKWARD, BOTH, FORWARD, MODES, REFERENCE, TRITON, Problem
from ecgscale.bench.measure import Check, Meaning, Round, Section, Spread, interleaved, ratios, spread
from ecgscale_kernels.counts import Cost

_MODE_LABELS = {FORWARD: "forward", BACKWARD: "backward", BOTH: "both"}


@dataclass(frozen=True)
class Costs:
    """Least bytes and FLOPs of a forward and of a backward."""

    forward: Cost
    backward: Cost

    def of(self, mode: str) -> Cost:
        return {FORWARD: self.forward, BACKWARD: self.backward, BOTH: self.forward + self.backward}[mode]


@dataclass(frozen=True)
class Measured:
    """All ways of a problem in all modes. A way that gave a wrong result is not timed."""

    problem: Problem
    device: Device
    errors: dict[str, float]
    bound: float  # of an error
    rounds: dict[str, dict[str, list[Round]]]  # of each mode and way
    memory: dict[str, Memory | None]  # of each way

    @property
    def right(self) -> list[str]:
        return [way for way, error in self.errors.items() if error <= self.bound]

    def ms(self, way: str, mode: str) -> Spread:
        return spread(self.device.ms(self.rounds[mode][way]))

    def ratio(self, mode: str, way: str, other: str) -> Spread:
        """How many times as fast a way is as another."""
        return ratios(self.rounds[mode][way], self.rounds[mode][other], cpu=not self.device.cuda)

    def best_other(self, mode: str) -> str:
        """The fastest way that is not ours."""
        others = [way for way in self.right if way != self.problem.ours]
        return min(others, key=lambda way: self.ms(way, mode).median)


def measure(problem: Problem, device: Device, rounds: int, seconds: float) -> Measured:
    """``seconds`` are those of one way in one mode in one round."""
    print(f"checking the results of: {problem.title}", file=sys.stderr, flush=True)  # torch.compile takes minutes
    errors = problem.errors()
    found = Measured(problem, device, errors, problem.bound(errors), {}, {})
    for mode in MODES:
        calls = {way: partial(device.round, problem.call(way, mode), seconds) for way in found.right}
        found.rounds[mode] = interleaved(calls, rounds, f"{problem.title}, {mode}")
    for way in found.right:
        forward = partial(problem.ways[way], *problem.learned)
        found.memory[way] = device.memory(forward, problem.learned, problem.grad)
    return found


def written(found: Measured) -> Section:
    """Times, memory and ratios."""
    problem = found.problem
    header = ("way", *(f"{mode}, ms" for mode in MODES))
    section = Section(problem.title, (*header, "kept, MB", "peak, MB", "host, µs") if found.device.cuda else header)
    section.checks = [
        Check(f"relative error of {problem.ours}", found.errors[problem.ours], found.bound, at_least=False)
    ]
    for way, error in found.errors.items():
        if way in found.right:
            section.rows.append((way, *(found.ms(way, mode).text(3) for mode in MODES), *_memory_cells(found, way)))
        else:
            section.rows.append((way, f"**WRONG** by {error:.1e}", *[""] * (len(section.header) - 2)))
    for mode, rounds in found.rounds.items():
        section.keep(rounds, f"{mode}, ")
        for way in rounds:
            meaning = Meaning("ms", "lower", _is_ours(way))
            section.scalar(f"{_label(found, way)}/{_MODE_LABELS[mode]}_ms", found.ms(way, mode).median, meaning)
    for way, memory in found.memory.items():
        if memory is not None:
            meaning = Meaning("MB", "lower", _is_ours(way))
            section.scalar(f"{_label(found, way)}/kept_mb", memory.kept / 1e6, meaning)
            section.scalar(f"{_label(found, way)}/peak_mb", memory.peak / 1e6, meaning)
    _write_ratios(section, found)
    return section


def _memory_cells(found: Measured, way: str) -> tuple[str, ...]:
    """Beside it what the host is busy for, launching a forward and a backward."""
    memory = found.memory[way]
    if memory is None:
        return ()
    host_us = spread([one.cpu_us for one in found.rounds[BOTH][way]]).median
    return f"{memory.kept / 1e6:,.1f}", f"{memory.peak / 1e6:,.1f}", f"{host_us:,.0f}"


def _write_ratios(section: Section, found: Measured) -> None:
    ours = found.problem.ours
    if ours not in found.right:
        return
    for mode in MODES:
        each = {way: found.ratio(mode, ours, way) for way in found.right if way != ours}
        said = "; ".join(f"{way} {ratio.text(2)}" for way, ratio in each.items())
        section.notes.append(f"{ours}, {mode}, times as fast as: {said}.")
        for way, ratio in each.items():
            meaning = Meaning("times as long as ours", "higher")
            section.scalar(f"{_label(found, way)}/{_MODE_LABELS[mode]}_over_ours", ratio.median, meaning)


def write_rates(section: Section, found: Measured, ceilings: Ceilings, fused: Costs, plain: Costs) -> None:
    """Columns beside the times: how near to the floor, and the rates of what a way cannot do without."""
    modes = (FORWARD, BOTH)
    columns = [f"{what}, {mode}" for mode in modes for what in ("of the floor", "GB/s", "TFLOP/s")]
    section.header = (*section.header, *columns)
    for number, row in enumerate(section.rows):
        way, cells = row[0], [""] * len(columns)
        if way in found.right:
            cells = []
            for mode in modes:
                took_s, cost = found.ms(way, mode).median / 1e3, (fused if way == TRITON else plain).of(mode)
                share = share_of_floor(found, way, mode, ceilings, fused)
                cells += [f"{share:.0%}", _digits(cost.moved / took_s / 1e9), _digits(cost.flops / took_s / 1e12)]
                meaning = Meaning("share", "higher", _is_ours(way))
                section.scalar(f"{_label(found, way)}/{_MODE_LABELS[mode]}_of_floor", share, meaning)
        section.rows[number] = (*row, *cells)
    floors = (f"{mode} {1e3 * fused.of(mode).floor_s(*ceilings[:2]):.4f}" for mode in MODES)
    section.notes.append(f"The floor, ms: {', '.join(floors)}.")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share_of_floor(found: Measured, way: str, mode: str, ceilings: Ceilings, fused: Costs) -> float:
    floor_s = fused.of(mode).floor_s(ceilings.bytes_per_s, ceilings.flops_per_s)
    return floor_s / (found.ms(way, mode).median / 1e3)


def _is_ours(way: str) -> bool:
    return way in (TRITON, REFERENCE)


def _label(found: Measured, way: str) -> str:
    """Of scalars: patch_embed/B512_P16_D768/ecgscale_triton."""
    return f"{found.problem.name}/{re.sub('[^a-z0-9]+', '_', way.lower()).strip('_')}"
