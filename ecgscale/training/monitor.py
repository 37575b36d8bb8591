"""What a run writes down while it runs: TensorBoard, events.jsonl and the progress line.

Only rank 0 writes; every rank takes part in what is gathered for it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError, MachineError, naming_file
from ecgscale.files import finite
from ecgscale.json_lines import JsonLines
from ecgscale.run_folder import EVENTS, TENSORBOARD
from ecgscale.training.clock import PARTS, StepClock
from ecgscale.training.metrics import Straggler, Work, gather_over_ranks, memory, shares, straggler, throughput
from ecgscale.training.ranks import Ranks

Item = TypeVar("Item")

_SLOW = 1.2  # times the median rank's own time: the progress line names who is slower


class Monitor:
    """Counts steps and their time between two log lines, and writes what comes of it with the loss parts."""

    def __init__(
        self, run: Path, ranks: Ranks, first_step: int, steps: int, name: str, resolved_config: str, work: Work
    ) -> None:
        self.ranks, self._work = ranks, work
        self._open = ExitStack()
        self._steps, self._waited_s = 0, 0.0
        if ranks.first:
            from torch.utils.tensorboard import SummaryWriter  # imports slowly

            self._events = JsonLines(run / EVENTS)
            self._folder = run / TENSORBOARD
            self._open.enter_context(_quiet_tensorboard())
            with self._on_board():
                self._board: Any = SummaryWriter(str(self._folder), purge_step=first_step + 1)
                self._board.add_text("config", f"```yaml\n{resolved_config}\n```", first_step)
            self._bar = tqdm(total=steps, initial=first_step, desc=name, unit="step", disable=None)
        self.clock = StepClock(ranks.device)
        if ranks.world_size > 1:
            self._open.enter_context(self.clock.timing_collectives())

    def waiting(self, items: Iterator[Item]) -> Item:
        """The next item, with the time that it took counted as waiting for the loader."""
        began = time.perf_counter()
        with self.clock("loader_wait"):
            item = next(items)
        self._waited_s += time.perf_counter() - began
        return item

    def count(self) -> None:
        """One more step is done."""
        self._steps += 1
        if self.ranks.first:
            self._bar.update()

    def log(
        self, step: int, parts: list[dict[str, Tensor]], scalars: dict[str, float], own_counts: dict[str, float]
    ) -> None:
        """Write loss parts, scalars and what was measured since the last line. All ranks call it together.

        ``parts`` are those of each micro-step of this rank, which are averaged over micro-steps and ranks;
        ``own_counts`` are summed over ranks.
        """
        of_part, collectives = self.clock.take()
        losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        held, waited = memory(self.ranks.device), {"host_wait": self._waited_s}
        of_ranks = gather_over_ranks(losses, of_part | waited | held | own_counts, self.ranks)
        if self.ranks.first:
            elapsed_s = sum(float(of_ranks[part].mean()) for part in PARTS)
            values = {f"train/{name}": float(of_ranks[name].mean()) for name in losses} | scalars
            values |= {name: float(of_ranks[name].sum()) for name in own_counts}
            values |= throughput(self._work, self._steps, elapsed_s, self.ranks.world_size) | shares(of_ranks)
            values |= {"step/seconds": elapsed_s / self._steps, "step/collectives": collectives / self._steps}
            values["throughput/loader_wait_share"] = float(of_ranks["host_wait"].mean()) / elapsed_s
            values |= {name: float(of_ranks[name].max()) for name in held}
            slow = None
            if self.ranks.world_size > 1:
                slow, of_straggler = straggler(of_ranks, self._steps)
                values |= of_straggler
            self.write("step", step, values)
            self._say(step, values, slow)
        self._steps, self._waited_s = 0, 0.0

    def _say(self, step: int, values: dict[str, float], slow: Straggler | None) -> None:
        figures = [f"loss {values['train/loss']:.3f}", f"{values['throughput/ecg_per_s']:.0f} ECG/s"]
        if "throughput/mfu" in values:
            figures.append(f"MFU {values['throughput/mfu']:.1%}")
        if slow is not None and slow.slowdown >= _SLOW:
            figures.append(f"rank {slow.rank} is {slow.slowdown:.1f} times slower ({slow.part})")
        self._bar.set_postfix_str(", ".join(figures))
        if self._bar.disable:  # no terminal: a log wants lines
            print(f"step {step} of {self._bar.total}: {', '.join(figures)}", file=sys.stderr, flush=True)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of events.jsonl and one point per scalar."""
        if not self.ranks.first:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._on_board():
            # add_scalar takes half a millisecond for each
            self._board.file_writer.add_summary(Summary(value=points), step)
        self.event(kind, step=step, **values)

    def event(self, kind: str, **values: Any) -> None:
        """Something that happened: a step, a save, a skipped step. JSON knows no NaN: what is not finite is null."""
        if self.ranks.first:
            self._events.write({"event": kind, "time": time.time()} | finite(values))

    def say(self, line: str) -> None:
        """A line for the person at the terminal, above the progress bar."""
        if self.ranks.first:
            tqdm.write(line, file=sys.stderr)

    def figure(self, name: str, figure: Any, step: int) -> None:
        if self.ranks.first:
            with self._on_board():
                self._board.add_figure(name, figure, step)

    def _on_board(self) -> AbstractContextManager[None]:
        """TensorBoard's writer, which a thread of its own lets fail, says what failed at a later call."""
        return naming_file(self._folder, "cannot write")

    def close(self) -> None:
        with self._open:
            if self.ranks.first:
                self._bar.close()
                self._events.close()
                with self._on_board():
                    self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (InputError, MachineError):
            if error is None:  # else what failed first, which a full disk lets follow, is to be told
                raise


@contextmanager
def _quiet_tensorboard() -> Iterator[None]:
    """Its writing thread hands an error on to the next caller: its traceback as well would stand amid our one line."""
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard.")):
            before(told)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def board_of(folder: Path) -> Iterator[Any]:
    """TensorBoard's writer into a folder, for what is shown at once. Errors of the system name the folder."""
    from torch.utils.tensorboard import SummaryWriter  # imports slowly

    with _quiet_tensorboard(), naming_file(folder, "cannot write"), SummaryWriter(str(folder)) as board:
        yield board


class RecordingsLog:
    """Which recordings a rank has seen, a line per micro-step, to hold a run against another or against its plan."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._lines = JsonLines(folder / f"rank-{rank}.jsonl")

    def write(self, step: int, micro_step: int, batch: ECGBatch) -> None:
        once = batch.segment_B == 0
        line = {"step": step + 1, "micro_step": micro_step, "first_position": int(batch.position_B[0])}
        self._lines.write(line | {"recordings": batch.record_B[once].tolist()})

    def close(self) -> None:
        self._lines.close()


def project(board: Any, name: str, embedding_RD: npt.NDArray[np.float32], label_R: Sequence[str], step: int) -> None:
    """Recordings' embeddings for TensorBoard's projector, with what each of them is; once for each name and step."""
    if not (Path(board.log_dir) / str(step).zfill(5) / name).exists():
        board.add_embedding(embedding_RD, list(label_R), global_step=step, tag=name)


def average_over_ranks(parts: dict[str, Tensor]) -> dict[str, float]:
    """Means over ranks of scalars, in one all-reduce and one transfer."""
    stacked = torch.stack([part.detach().float() for part in parts.values()])
    dist.all_reduce(stacked)
    return dict(zip(parts, (stacked / dist.get_world_size()).tolist(), strict=True))
