"""What a model costs: its parameters, and the FLOPs, bytes and messages of a training step, measured from its modules.

Passes over a few rows without data (`dry_run`), of a model with one and with two layers, determine all others: costs
are linear in layers, and polynomials of second degree in rows.

FLOPs are those of the mathematics, two per multiply-add of each matrix product and convolution. Nothing is counted for
norms, activations and other elementwise work, for layers that are recomputed in the backward pass, or for products that
a kernel does in another way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from operator import mul
from typing import NamedTuple

import torch

from ecgscale import dry_run
from ecgscale.data.batch import SYNTHETIC_RATE_HZ, synthetic_batch
from ecgscale.dry_run import LAYERS, PARTS, Device, Flops, counted_flops
from ecgscale.model import Encoder, EncoderConfig, build_encoder
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives import Objective, ObjectiveConfig, build_objective
from ecgscale.objectives.gather import Sent

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (rows, ranks) at which costs are measured, far apart, so that what grows fastest shows. On one rank, where nothing is
# gathered, they determine a polynomial over 1, rows and rows²; on several over 1, rows, and all ranks' rows and rows².
_ALONE = ((2, 1), (8, 1), (16, 1))
_TOGETHER = ((2, 2), (16, 2), (2, 64), (16, 64))

Numbers = Counter[str]  # of a pass, by name


class Pass(NamedTuple):
    """What is measured: FLOPs, or bytes on a device."""

    layers: int = 1
    recomputed: int = 0
    device: Device | None = None  # None: FLOPs, which depend on none
    precision: str = "fp32"


@dataclass(frozen=True)
class Kept:
    """Bytes of a rank's micro-step beside its batch, weights and gradients."""

    parts: dict[str, int]
    """Kept for the backward pass when the forward pass ends, by part of the model."""
    forward_peak: int
    """Most at any time of the forward pass."""
    backward_peak: int
    """Most at any time of the backward pass, until the layers are through."""
    last_peak: int
    """The same behind them, when most gradients are there, which are not counted."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Costs:
    """Of a rank's micro-step of a model with segments of ``samples``, for any number of rows and ranks.

    ``rows`` are the segments of one rank, ``ranks`` those that contrast theirs with each other. What was measured once
    is known; the first question of a kind takes a second or two.
    """

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig, samples: int) -> None:
        self.model, self.objective, self.samples = model, objective, samples
        self._known: dict[tuple[Pass, bool], dict[str, list[int]]] = {}
        self._sent: list[Sent] = []

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter that is trained."""
        return tuple(parameters(self.model, self.objective, trained=True).values())

    @cached_property
    def frozen(self) -> tuple[int, ...]:
        """Elements of each parameter that is not."""
        return tuple(parameters(self.model, self.objective, trained=False).values())

    def flops(self, rows: int, ranks: int = 1) -> dict[str, Flops]:
        """By part of the model."""
        one, two = (self._at(rows, ranks, Pass(layers)) for layers in (1, 2))
        counts = {name: one[name] + (self.model.depth - 1) * (two[name] - one[name]) for name in one}
        parts = {part: Flops(counts.get(f"{part} forward", 0), counts.get(f"{part} backward", 0)) for part in PARTS}
        return {part: count for part, count in parts.items() if count.total}

    def kept(self, device: Device, precision: str, rows: int, ranks: int = 1, recomputed: int = 0) -> Kept:
        """On a device in fp32 or bf16, where the backward pass recomputes so many layers."""
        one = self._at(rows, ranks, Pass(1, 0, device, precision))
        two = self._at(rows, ranks, Pass(2, 0, device, precision))
        again = self._at(rows, ranks, Pass(1, 1, device, precision))
        depth, recomputed = self.model.depth, min(recomputed, self.model.depth)
        layer = two[LAYERS] - one[LAYERS]
        given = layer + sum(again[part] - one[part] for part in PARTS)  # a layer that is recomputed keeps its input
        parts = {part: one[part] for part in PARTS if one[part]}
        parts[LAYERS] += (depth - 1 - recomputed) * layer + recomputed * given
        peaks = []
        for phase in dry_run.PHASES:
            outside, inside = one[f"peak {phase}"], again[f"peak {phase}"]
            if phase in dry_run.WITH_LAYERS:  # what other layers keep is there too; those above are done, or not begun
                outside += (depth - 1 - recomputed) * layer + recomputed * given
                inside += (recomputed - 1) * given
            peaks.append(outside if recomputed < depth else inside)
            if recomputed and phase == dry_run.BACK_IN_LAYERS:
                peaks.append(inside)
        split = dry_run.BACK_TO_LAYERS
        return Kept(parts, max(sum(parts.values()), *peaks[:split]), max(peaks[split:-1]), peaks[-1])

    def sent(self, rows: int, ranks: int) -> list[Sent]:
        """What the objective sends in a micro-step; nothing on one rank."""
        sizes = self._at(rows, ranks, Pass(1, 0, "cuda"))
        return [Sent(one.kind, sizes[f"sent {number}"]) for number, one in enumerate(self._sent) if ranks > 1]

    def _at(self, rows: int, ranks: int, asked: Pass) -> Numbers:
        known = self._known.get((asked, ranks > 1))
        if known is None:
            points = _TOGETHER if ranks > 1 else _ALONE
            measured = [self._measured(*point, asked) for point in points]
            names = dict.fromkeys(name for numbers in measured for name in numbers)
            terms = [_terms(*point) for point in points]
            known = {name: _solved(terms, [numbers[name] for numbers in measured]) for name in names}
            self._known[asked, ranks > 1] = known
        here = _terms(rows, ranks)
        numbers = Numbers()
        for name, factors in known.items():
            numbers[name] = sum(map(mul, factors[:-1], here)) // factors[-1]
        return numbers

    def _measured(self, rows: int, ranks: int, asked: Pass) -> Numbers:
        model = replace(self.model, depth=asked.layers)

        def build() -> Objective:
            return build_objective(model, self.objective, 0, SYNTHETIC_RATE_HZ, asked.recomputed)

        numbers = Numbers()
        if asked.device is None:
            for part, count in dry_run.flops_of(build, rows, self.samples, ranks).items():
                numbers |= {f"{part} forward": count.forward, f"{part} backward": count.backward}
            return numbers
        held = dry_run.held_by(build, _TYPES[asked.precision], asked.device, rows, self.samples, ranks)
        self._sent = held.sent or self._sent
        numbers |= held.kept
        numbers |= {f"peak {phase}": size for phase, size in enumerate(held.peaks)}
        numbers |= {f"sent {number}": one.bytes for number, one in enumerate(held.sent)}
        return numbers


def _terms(rows: int, ranks: int) -> list[int]:
    """Of the polynomial that a cost is."""
    return [1, rows, rows**2] if ranks == 1 else [1, rows, rows * ranks, (rows * ranks) ** 2]


def _solved(terms: Sequence[Sequence[int]], values: Sequence[int]) -> list[int]:
    """Factors of the terms that give the values, exactly, by elimination; and by what their sum is divided."""
    table = [[*map(Fraction, row), Fraction(value)] for row, value in zip(terms, values, strict=True)]
    for column in range(len(table)):
        table[column] = [number / table[column][column] for number in table[column]]
        for row in range(len(table)):
            if row != column:
                factor = table[row][column]
                table[row] = [a - factor * b for a, b in zip(table[row], table[column], strict=True)]
    divisor = lcm(*(row[-1].denominator for row in table))
    return [*(int(row[-1] * divisor) for row in table), divisor]


_costs: dict[str, Costs] = {}


def costs_of(model: ModelConfig, objective: ObjectiveConfig, samples: int) -> Costs:
    """The same for the same shapes, so that nothing is measured twice."""
    key = repr((model, objective, samples))
    if key not in _costs:
        _costs[key] = Costs(model, objective, samples)
    return _costs[key]


def step_flops(
    model: EncoderConfig, objective: ObjectiveConfig, rows: int, samples: int, contrast_rows: int | None = None
) -> int:
    """Forward and backward pass of one rank's micro-step.

    Args:
        rows: segments that the rank works through.
        samples: of a segment.
        contrast_rows: segments of all ranks, among which the objective contrasts; the rank's own by default.
    """
    ranks = (contrast_rows or rows) // rows
    if isinstance(model, ModelConfig):
        return sum(count.total for count in costs_of(model, objective, samples).flops(rows, ranks).values())
    # Whose layers are all alike, one cannot know of other encoders: they are measured as they are.
    counts = dry_run.flops_of(lambda: build_objective(model, objective, 0, SYNTHETIC_RATE_HZ), rows, samples, ranks)
    return sum(count.total for count in counts.values())


def encoder_flops(encoder: Encoder, rows: int, samples: int) -> int:
    """Forward and backward pass of an encoder by itself; what it does not learn has no gradient."""
    with torch.device("meta"):
        twin = build_encoder(encoder.config)
    for own, given in zip(twin.parameters(), encoder.parameters(), strict=True):
        own.requires_grad_(given.requires_grad)
    with torch.random.fork_rng(devices=[]):
        batch = synthetic_batch(rows, samples).to(torch.device("meta"))
    return sum(count.total for count in counted_flops(twin, lambda: twin(batch)[0]).values())


def parameters(
    model: EncoderConfig, objective: ObjectiveConfig | None = None, trained: bool | None = None
) -> dict[str, int]:
    """Elements of each parameter of an encoder, or of an objective with its heads, by name. Nothing is allocated.

    ``trained`` asks for those alone that are trained, or that are frozen.
    """
    with torch.device("meta"):
        module = build_objective(model, objective, 0, SYNTHETIC_RATE_HZ) if objective else build_encoder(model)
    return {name: p.numel() for name, p in module.named_parameters() if trained in (None, p.requires_grad)}
