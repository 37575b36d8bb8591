"""What measuring costs: the share of a training step that the clock, the counters and the log lines take. By hand:

python tests/training/overhead.py --preset tiny --batch 4 --steps 40

Steps with and without measuring take turns, so that both meet the same machine, and neighbours are compared. Their
difference is smaller than the noise of most machines; so the same calls are also timed alone, without a step, and both
by the time that this process computes, which other processes do not change.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ecgscale.data.batch import synthetic_batch
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import build_objective, objective_config
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.metrics import Work
from ecgscale.training.monitor import Monitor
from ecgscale.training.ranks import start_ranks

SAMPLES = 2500
LOG_EVERY = 10  # train.log_every
PHASES = ("loader_wait", "transfer", "forward", "backward", "optimizer")
ALONE = 2000  # empty steps


def collective_us(monitor: Monitor) -> float:
    """What timing adds to a collective: the median over blocks of calls with and without."""
    x = torch.ones(8, device=monitor.ranks.device)
    added = []
    for _ in range(20):
        taken = []
        for timing in (nullcontext(), monitor.clock.timing_collectives()):
            with timing:
                began = time.perf_counter()
                for _ in range(200):
                    dist.all_reduce(x)
                taken.append((time.perf_counter() - began) / 200)
        added.append(taken[1] - taken[0])
    return 1e6 * statistics.median(added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--batch", type=int, default=4, help="recordings")
    parser.add_argument("--steps", type=int, default=40, help="of each kind")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    os.environ.pop("RANK", None)
    ranks = start_ranks()
    objective = build_objective(PRESETS[options.preset], objective_config(), seed=0, rate_hz=500.0)
    engine = Engine(objective, EngineConfig(precision=options.precision), ranks, 1, options.batch)
    cpu_batch = synthetic_batch(2 * options.batch, SAMPLES)
    cpu_batch = cpu_batch.pin_memory() if ranks.device.type == "cuda" else cpu_batch

    def step(monitor: Monitor | None) -> dict[str, Tensor]:
        clock = monitor.clock if monitor else lambda part: nullcontext()
        with clock("loader_wait"):
            batch = cpu_batch
        with clock("transfer"):
            batch = engine.put(batch)
        with clock("forward"):
            loss, parts = engine.forward(batch, step=0)
        with clock("backward"):
            engine.backward(loss)
        with clock("optimizer"):
            engine.step(1e-5)
        return parts

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        work = Work(options.batch, 2 * options.batch, 2 * options.batch * 156, flops=1e9, peak_flops=1e12)
        monitor = Monitor(Path(folder), ranks, 0, 10**6, "overhead", "", work)
        computed_s: list[float] = []
        done: dict[bool, list[float]] = {False: [], True: []}
        for number in tqdm(range(2 * options.steps + 4), file=sys.__stderr__, desc=f"{options.preset}, {ranks.device}"):
            measured = number % 4 in (1, 2)  # without, with, with, without
            began, computed = time.perf_counter(), time.process_time()
            parts = step(monitor if measured else None)
            if measured:
                monitor.count()
            if measured and len(done[True]) % LOG_EVERY == LOG_EVERY - 1:
                monitor.log(number, [parts], {"train/learning_rate": 1e-5}, {"data/skipped_shards": 0.0})
            elif ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 4:
                done[measured].append(time.perf_counter() - began)
                computed_s.append(time.process_time() - computed)
        monitor.count()
        monitor.log(10**5, [parts], {}, {})
        computed = time.process_time()
        for number in range(ALONE):
            for phase in PHASES:
                with monitor.clock(phase):
                    pass
            monitor.count()
            if number % LOG_EVERY == LOG_EVERY - 1:
                monitor.log(number, [parts], {"train/learning_rate": 1e-5}, {"data/skipped_shards": 0.0})
        alone_s = (time.process_time() - computed) / ALONE
        collective = collective_us(monitor)
        monitor.close()
    plain_ms = 1e3 * statistics.median(done[False])
    ratios = [with_s / without_s for without_s, with_s in zip(done[False], done[True], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5  # of the median, if ratios were normal
    print(f"step without measuring {plain_ms:.2f} ms; with it {middle - 1:+.2%} ± {error:.2%} in the median of "
          f"{len(ratios)} pairs (quartiles {low - 1:+.2%} to {high - 1:+.2%})")  # fmt: skip
    share = alone_s / statistics.median(computed_s)
    print(f"measuring alone, a log line every {LOG_EVERY} steps: {1e6 * alone_s:.0f} µs of computing per step, "
          f"{share:.3%} of one; each collective {collective:.1f} µs more")  # fmt: skip


if __name__ == "__main__":
    main()
