"""What a run writes down while it runs: TensorBoard, events.jsonl and the progress line.

Only rank 0 writes; every rank takes part in averaging the loss parts.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ecgscale.training.ranks import Ranks

Item = TypeVar("Item")


class Monitor:
    """Counts recordings, tokens and waiting between two log lines, and writes them with the loss parts."""

    def __init__(self, run: Path, ranks: Ranks, first_step: int, steps: int, name: str, resolved_config: str) -> None:
        self.ranks = ranks
        self._waited_s = 0.0
        self._since = time.perf_counter()
        self._recordings = self._tokens = 0
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter  # imports slowly

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
            self._board.add_text("config", f"```yaml\n{resolved_config}\n```", first_step)
            self._events = (run / "events.jsonl").open("a")
            self._bar = tqdm(total=steps, initial=first_step, desc=name, unit="step", disable=None)

    def waiting(self, items: Iterator[Item]) -> Item:
        """The next item, with the time that it took counted as waiting for the loader."""
        began = time.perf_counter()
        item = next(items)
        self._waited_s += time.perf_counter() - began
        return item

    def count(self, recordings: int, tokens: int) -> None:
        """What one step of all ranks has worked through."""
        self._recordings += recordings
        self._tokens += tokens
        if self.ranks.first:
            self._bar.update()

    def log(self, step: int, parts: list[dict[str, Tensor]], scalars: dict[str, float]) -> None:
        """Write loss parts, scalars, throughput and memory. All ranks call it together.

        ``parts`` are those of each micro-step; they are averaged over micro-steps and ranks.
        """
        averaged = average_over_ranks({name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]})
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        values = {f"train/{name}": value for name, value in averaged.items()} | scalars
        values |= {
            "throughput/ecg_per_s": self._recordings / elapsed,
            "throughput/tokens_per_s": self._tokens / elapsed,
            "throughput/loader_wait_share": self._waited_s / elapsed,
            "memory/host_rss_gb": psutil.Process().memory_info().rss / 1e9,
        }
        if self.ranks.device.type == "cuda":
            values["memory/device_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._recordings = self._tokens = 0
        self._waited_s = 0.0
        self.write(step, values)
        if self.ranks.first:
            said = f"loss {averaged['loss']:.3f}, {values['throughput/ecg_per_s']:.0f} ECG/s"
            self._bar.set_postfix_str(said)
            if self._bar.disable:  # no terminal: a log wants lines
                print(f"step {step} of {self._bar.total}: {said}", file=sys.stderr, flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of events.jsonl and one point per scalar."""
        if not self.ranks.first:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self.event("step", step=step, **values)

    def event(self, kind: str, **values: Any) -> None:
        """Something that happened: a step, a save, a skipped step. JSON knows no NaN: what is not finite is null."""
        if self.ranks.first:
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._events.write(json.dumps({"event": kind, "time": time.time()} | known, allow_nan=False) + "\n")
            self._events.flush()

    def say(self, line: str) -> None:
        """A line for the person at the terminal, above the progress bar."""
        if self.ranks.first:
            tqdm.write(line, file=sys.stderr)

    def figure(self, name: str, figure: Any, step: int) -> None:
        if self.ranks.first:
            self._board.add_figure(name, figure, step)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out of the throughput what is no training: validation, saving."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def close(self) -> None:
        if self.ranks.first:
            self._bar.close()
            self._board.close()
            self._events.close()


def project(board: Any, name: str, embedding_RD: npt.NDArray[np.float32], label_R: Sequence[str], step: int) -> None:
    """Recordings' embeddings for TensorBoard's projector, with what each of them is; once for each name and step."""
    if not (Path(board.log_dir) / str(step).zfill(5) / name).exists():
        board.add_embedding(embedding_RD, list(label_R), global_step=step, tag=name)


def sum_over_ranks(counts: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Sums over ranks of what each has counted."""
    mean = average_over_ranks({name: torch.tensor(count, device=ranks.device) for name, count in counts.items()})
    return {name: value * ranks.world_size for name, value in mean.items()}


def average_over_ranks(parts: dict[str, Tensor]) -> dict[str, float]:
    """Means over ranks of scalars, in one all-reduce and one transfer."""
    stacked = torch.stack([part.detach().float() for part in parts.values()])
    dist.all_reduce(stacked)
    return dict(zip(parts, (stacked / dist.get_world_size()).tolist(), strict=True))
