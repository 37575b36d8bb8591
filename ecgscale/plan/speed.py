"""How long a micro-step computes: matrix products at the rate that they reach, everything else by the bytes it moves.

seconds = floating-point operations / rate of products + bytes kept for the backward pass · seconds per byte,
          at least kernels · time between two of them.

The bytes that a part keeps (`ecgscale.cost`) measure its elementwise work too: what is kept is written once and read
again, and as much again passes as gradients. `Rates.of_device` takes all of it from data sheets and stated
efficiencies; `measure` has it from this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ecgscale.cost import Costs
from ecgscale.dry_run import LAYERS, LOSS, PARTS, REST, STEM
from ecgscale.model.encoder import ModelConfig
from ecgscale.plan.memory import Parallel, share

PASSES = 6.0
"""How often a kept byte passes through memory: written, read by what follows, read again in the backward pass, where
its gradient is written and read, and once more for what is not kept. Assumed; measured rates do not use it."""
KERNELS_OF_LAYER = 60
"""Kernels of a layer of the transformer, both passes, and about those of all other parts together. Assumed."""
READ_S = 30e-6
"""Of a GPU, to find out whether a gradient is finite and to tell the host: some six kernels and a wait. Assumed. At
stage 0 in bf16, DeepSpeed 0.19.8 does it for each parameter."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and where that is from."""

    source: str
    products_flops_per_s: Mapping[int, float]
    """Rate of matrix products by the width of their matrices; between two widths by the logarithm."""
    seconds_per_byte: Mapping[str, float]
    """By part of the model: seconds beside its products, for each byte that it keeps for the backward pass."""
    update_s_per_parameter: float
    """AdamW, for each element that a rank updates."""
    kernel_s: float = 0.0
    """Least time between the begins of two kernels."""
    slower: Mapping[str, float] = field(default_factory=dict)
    """Parts whose products take so many times as long as others; 1 where nothing is said."""

    @staticmethod
    def of_device(
        name: str,
        peak_flops: float,
        efficiency: float,
        memory_bytes_per_s: float,
        kernel_s: float,
        bf16: bool,
        fp32_slower: float = 1.0,
    ) -> Rates:
        """By data sheets: ``peak_flops`` times ``efficiency``, and the bandwidth that elementwise kernels reach.

        The loss is computed in fp32 always, ``fp32_slower`` times as slow as the run's precision.
        """
        moved_per_parameter = 28 + (2 + 2 + 4 if bf16 else 0)  # p, g, m, v read, p, m, v written; and the bf16 copies
        return Rates(
            f"data sheet of {name}, {efficiency:.0%} of the peak in products: not measured",
            {1024: peak_flops * efficiency},
            dict.fromkeys(PARTS, PASSES / memory_bytes_per_s),
            moved_per_parameter / memory_bytes_per_s,
            kernel_s,
            {LOSS: fp32_slower},
        )

    def products(self, width: int) -> float:
        """FLOP/s of products of matrices of this width."""
        known = sorted(self.products_flops_per_s)
        rates = [self.products_flops_per_s[one] for one in known]
        return float(np.interp(np.log(width), np.log(known), rates))


@dataclass(frozen=True)
class Compute:
    """Seconds of one micro-step on one rank, without communication."""

    parts: dict[str, float]
    recompute: float
    """Forward passes of checkpointed layers, done again."""
    flops: int
    """Model FLOPs, without those that are done again."""

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.recompute


def micro_step(costs: Costs, parallel: Parallel, rates: Rates, rows: int, recomputed: int = 0) -> Compute:
    """Forward and backward pass of ``rows`` segments on one rank, with so many layers recomputed."""
    flops = costs.flops(rows, parallel.world_size)
    kept = costs.kept(parallel.device, parallel.precision, rows, parallel.world_size).parts
    depth, parts = costs.model.depth, {}
    for part in [part for part in PARTS if part in flops or part in kept]:
        counted = flops[part].total if part in flops else 0
        products = counted / rates.products(width_of(costs.model, part)) * rates.slower.get(part, 1.0)
        kernels = KERNELS_OF_LAYER * (depth if part == LAYERS else 1 / (len(PARTS) - 1))
        busy = products + kept.get(part, 0) * rates.seconds_per_byte.get(part, 0.0)
        parts[part] = max(busy, kernels * rates.kernel_s)
    again = min(recomputed, depth) / depth * flops[LAYERS].forward / flops[LAYERS].total
    return Compute(parts, again * parts[LAYERS], sum(count.total for count in flops.values()))


def width_of(model: ModelConfig, part: str) -> int:
    """Of a part's matrices."""
    return model.stem_channels if part in (STEM, REST) else model.width


def update_s(sizes: tuple[int, ...], parallel: Parallel, rates: Rates) -> float:
    """Seconds of AdamW on a rank's share of parameters of these sizes, and of what DeepSpeed reads back before."""
    own = share(sizes, parallel.zero_stage, parallel.world_size)
    reads = len(sizes) if (parallel.zero_stage, parallel.precision, parallel.device) == (0, "bf16", "cuda") else 0
    return own * rates.update_s_per_parameter + reads * READ_S
