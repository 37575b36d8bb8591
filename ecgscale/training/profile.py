"""Profiles of chosen steps: a trace for Perfetto or TensorBoard, and the operations that cost most."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ecgscale.errors import file_error
from ecgscale.run_folder import PROFILE
from ecgscale.training.monitor import Monitor
from ecgscale.training.ranks import Ranks

_WARM_STEPS = 3  # after a start, before the first profiled step
_RANKS = 8  # the first so many write a trace: of thousands, nobody reads all
_COSTLIEST = 10
_NAME_WIDTH = 60


class StepProfiler:
    """Records steps ``first`` to ``last`` as they are trained; results are the same as without."""

    def __init__(self, run: Path, ranks: Ranks, monitor: Monitor, first: int, last: int) -> None:
        self._folder, self._ranks, self._monitor = run / PROFILE, ranks, monitor
        self._first, self._last = first, last
        self._profile: profile | None = None
        self._step = ExitStack()

    def begin(self, step: int) -> None:
        """Step number ``step`` is about to be done."""
        if not self._first <= step <= self._last:
            return
        traced = self._ranks.rank < _RANKS
        if step == self._first:
            with self._monitor.clock.pause():
                if traced:
                    self._profile = _started(self._ranks.device)
                dist.barrier()  # so that nobody waits for the others in the step
            self._monitor.clock.annotates = traced
        if traced:
            self._step.enter_context(record_function(f"ProfilerStep#{step}"))  # what TensorBoard's plugin looks for

    def end(self, step: int) -> None:
        """Step number ``step`` is done; after the last one, the trace is written."""
        self._step.close()
        if step == self._last:
            with self._monitor.clock.pause():
                if self._profile is not None:
                    self._profile.stop()
                    self._write(self._profile)
                dist.barrier()
            self._profile, self._monitor.clock.annotates = None, False

    def close(self) -> None:
        """The run ends, by an error or because it was asked to; steps that were recorded so far are dropped."""
        self._step.close()
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profiled: profile) -> None:
        """The trace, whole or not at all: a full disk is no reason to end a run."""
        name = f"rank-{self._ranks.rank}.steps-{self._first}-{self._last}"
        trace, partial = (self._folder / f"{name}.{end}.json.gz" for end in ("pt.trace", "partial"))
        try:
            self._folder.mkdir(exist_ok=True)
            profiled.export_chrome_trace(str(partial))
            partial.replace(trace)
            if self._ranks.first:
                table = costliest(profiled, self._last - self._first + 1)
                (self._folder / f"{name}.txt").write_text(f"{table}\n")
                self._monitor.say(f"{table}\ntrace: {trace} (ui.perfetto.dev opens it)")
        except OSError as error:
            partial.unlink(missing_ok=True)
            reason = file_error(trace, "no trace", error)
            print(f"rank {self._ranks.rank}: {reason}", file=sys.stderr, flush=True)


def steps_to_profile(begun: int, steps: int, first: int, count: int) -> tuple[int, int]:
    """The first and last of ``count`` profiled steps of a start that goes from ``begun`` to ``steps``.

    ``first`` 0: as soon as the start is warm. Nothing is profiled where last < first.
    """
    if not count:
        return 0, -1
    if not first:
        first = max(begun + 1, min(begun + 1 + _WARM_STEPS, steps - count + 1))
    return max(first, begun + 1), min(first + count - 1, steps)


def costliest(profiled: profile, steps: int) -> str:
    """The ten operations with the most time of their own, without that of operations inside them, as a table."""
    averages = [operation for operation in profiled.key_averages() if not operation.is_user_annotation]
    operations = [operation for operation in averages if operation.device_type == DeviceType.CPU]
    kernels = [operation for operation in averages if operation.device_type != DeviceType.CPU]
    kernels_us = sum(kernel.self_device_time_total for kernel in kernels)
    device = "device" if kernels_us else "cpu"
    own_us, calls = Counter[str](), Counter[str]()
    for operation in operations:
        own_us[operation.key] += getattr(operation, f"self_{device}_time_total")
        calls[operation.key] += operation.count
    total_us = kernels_us or own_us.total()
    lines = [f"{'operation':{_NAME_WIDTH}} {device + ' ms/step':>14} {'share':>6} {'calls/step':>10}"]
    named = own_us.most_common(_COSTLIEST)
    lines += [_line(key, us / steps, us / total_us, f"{calls[key] / steps:.1f}") for key, us in named]
    rest_us = total_us - sum(us for _, us in named)
    return "\n".join([*lines, _line("all others", rest_us / steps, rest_us / total_us, "")])


def _line(name: str, own_us: float, share: float, calls: str) -> str:
    return f"{name[:_NAME_WIDTH]:{_NAME_WIDTH}} {own_us / 1e3:14.3f} {share:6.1%} {calls:>10}"


def _started(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities):  # the first one on a GPU takes seconds to come up
            torch.cuda.synchronize(device)
    started = profile(activities=activities, record_shapes=True)
    started.start()
    return started
