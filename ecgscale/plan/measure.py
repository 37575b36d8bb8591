"""Rates of this machine, from a few short steps: `--measure`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from ecgscale.cost import Costs, costs_of
from ecgscale.data.batch import SYNTHETIC_RATE_HZ, synthetic_batch
from ecgscale.dry_run import LAYERS, LOSS, POSITION, REST, STEM
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.objectives import ObjectiveConfig, build_objective
from ecgscale.plan.speed import KERNELS_OF_LAYER, Rates, width_of
from ecgscale.plan.trial import Times, Trial, now_s, timed
from ecgscale.training.engine import EngineConfig

WIDTHS = (64, 128, 256, 512, 768, 1024)
_TOKENS = 2048  # rows of the matrices that are multiplied
_LEAST_S = 0.1  # of each measurement
_HARDLY_LESS = 0.95  # of the time of a row, with twice as many
_MOST_ROWS = 4096


def measure_rates(
    model: ModelConfig, objective: ObjectiveConfig, engine: EngineConfig, samples: int = 2500, rows: int = 8
) -> Rates:
    """Rates by matrix products of several widths and by steps of this model with one and with two layers.

    What a part takes beyond its products is put down to the bytes that it keeps. It counts in full, so that a product
    that is slower than others of its width (a grouped convolution) is part of it. On a GPU, steps of two rows only tell
    how fast kernels begin; the other rates are those of as many rows as it takes to keep it busy.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    # At stage 0, DeepSpeed reads each bf16 gradient back; see `candidates.usual_stage`.
    engine = replace(engine, zero_stage=1 if engine.precision == "bf16" else 0, activation_checkpointing=False)
    total = None if device.type == "cuda" else len(WIDTHS) + 4  # there, as many as it takes
    with tqdm(total=total, desc="measure", unit="rate", disable=None, leave=False) as bar:
        products = {}
        for width in WIDTHS:
            products[width] = _products(width, dtype, device)
            bar.update()
        one, two = (replace(model, depth=depth) for depth in (1, 2))

        def step(shape: ModelConfig, rows: int) -> Times:
            bar.update()
            return timed(Trial(shape, engine, rows, samples, steps=5, objective=objective))

        kernel_s = 0.0
        if device.type == "cuda":
            few = step(two, 2).forward_backward - step(one, 2).forward_backward
            kernel_s = max(0.0, few) / KERNELS_OF_LAYER
            rows = enough_rows(lambda rows: step(two, rows).forward_backward, rows)
        times = {depth: step(shape, rows) for depth, shape in ((1, one), (2, two))}
        alone = {part: _alone(part, one, objective, dtype, device, rows, samples) for part in (STEM, POSITION)}
        bar.update(2)
    layer = max(0.0, times[2].forward_backward - times[1].forward_backward)
    seconds = {LAYERS: layer, **alone}
    seconds[REST] = max(0.0, times[1].forward_backward - sum(seconds.values()))
    costs = costs_of(one, objective, samples)
    update = times[2].update / sum(costs_of(two, objective, samples).sizes)
    rates = rates_of(costs, device.type, engine.precision, rows, products, seconds)
    return replace(rates, update_s_per_parameter=update, kernel_s=kernel_s)


def enough_rows(seconds: Callable[[int], float], rows: int) -> int:
    """Doubled until with twice as many a row takes hardly less, or no memory is left."""
    each = seconds(rows) / rows
    while rows < _MOST_ROWS:
        try:
            twice = seconds(2 * rows) / (2 * rows)
        except torch.OutOfMemoryError:
            break
        if twice > _HARDLY_LESS * each:
            break
        rows, each = 2 * rows, twice
    return rows


def rates_of(
    costs: Costs, device: str, precision: str, rows: int, products: dict[int, float], seconds: dict[str, float]
) -> Rates:
    """Seconds per kept byte from those of each part of a model with one layer; where products are slower than measured
    alone, how much slower. What the objective does outside of modules is measured with the rest."""
    by_width = Rates("", products, {}, 0.0)
    flops = costs.flops(rows)
    kept = costs.kept("cuda" if device == "cuda" else "cpu", precision, rows).parts
    per_byte, slower = {}, {}
    for part, took_s in seconds.items():
        names = (REST, LOSS) if part == REST else (part,)
        product_s = sum(
            flops[name].total / by_width.products(width_of(costs.model, name)) for name in names if name in flops
        )
        size = sum(kept.get(name, 0) for name in names)
        beyond = took_s - product_s
        for name in names:
            per_byte[name] = max(0.0, beyond) / size
            slower[name] = 1.0 if beyond >= 0 else took_s / product_s
    where = torch.cuda.get_device_name() if device == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    source = f"measured on {where} by {rows} segments of {costs.model.preset} with one and two layers"
    return Rates(source, products, per_byte, 0.0, slower=slower)


def _products(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of (tokens, width) by (width, 4 width) with both of its backward passes."""
    x, weight = torch.randn(_TOKENS, width), torch.randn(width, 4 * width)
    x, weight, grad = (one.to(device, dtype) for one in (x, weight, x @ weight))

    def once() -> None:
        torch.mm(x, weight)
        torch.mm(grad, weight.T)
        torch.mm(x.T, grad)

    return 3 * 2 * _TOKENS * width * 4 * width / _seconds(once, device)


def _alone(
    part: str,
    model: ModelConfig,
    objective: ObjectiveConfig,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    samples: int,
) -> float:
    """Seconds of the stem or of the positional convolution, forward and backward."""
    encoder = build_objective(model, objective, 0, SYNTHETIC_RATE_HZ).to(device, dtype).encoder
    assert isinstance(encoder, ECGEncoder)
    batch = synthetic_batch(rows, samples).to(device)
    tokens = samples // model.patch_samples
    given = torch.randn(rows, tokens, model.width, device=device).to(dtype).requires_grad_()

    def once() -> None:
        out: Tensor = encoder.stem(batch) if part == STEM else encoder.position(given)
        torch.autograd.backward(out.sum())

    return _seconds(once, device)


def _seconds(once: Callable[[], None], device: torch.device) -> float:
    """Median of several, after one that is not timed. What is short is done often between two looks at the clock, since
    a GPU is waited for at each."""
    once()
    often = 1
    taken: list[float] = []
    while len(taken) < 3 or often * sum(taken) < _LEAST_S:
        began = now_s(device)
        for _ in range(often):
            once()
        took = now_s(device) - began
        if took < _LEAST_S / 10:
            often *= 2
        else:
            taken.append(took / often)
    return median(taken)
