"""Where the time of training steps goes: a clock that divides all of it among named parts and never makes anyone wait.

On a CPU it reads the processor's clock at each change of part. On a GPU it puts an event into the device's queue, which
is read at the next log line: what it divides is the device's time, and a part in which only the host is busy counts
as far as the device stood idle meanwhile. The parts add up to the whole by construction.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroup, Work
from torch.profiler import record_function

PARTS = ("loader_wait", "transfer", "forward", "backward", "optimizer", "communication", "other")
_PAUSED = "paused"
_KEPT_EVENTS = 4096  # of a GPU that are read late; then those are read that are done

# What all collectives of PyTorch 2.10 to 2.13 come down to, whoever calls them by whatever name.
_COLLECTIVES = (
    "_allgather_base", "_end_coalescing", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced",
    "all_to_all_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce",
    "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv",
    "recv_anysource", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip


class StepClock:
    """``with clock("forward"):`` counts what follows as a part; what is in no part is "other"."""

    def __init__(self, device: torch.device) -> None:
        self.annotates = False
        """Whether parts are marked in the trace of a profiler."""
        self._collectives = 0
        self._part = "other"
        self._seconds = dict.fromkeys((*PARTS, _PAUSED), 0.0)
        self._events = _Events(device) if device.type == "cuda" else None
        self._since = time.perf_counter()
        self._change("other")

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what is done inside as this part, and what was before as it again afterwards."""
        before = self._change(part)
        try:
            if self.annotates:
                with record_function(part):
                    yield
            else:
                yield
        finally:
            self._change(before)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what is no training, collectives too."""
        with self(_PAUSED):
            yield

    def take(self) -> tuple[dict[str, float], int]:
        """Seconds of each part, and how many collectives were called, since this was asked last.

        On a GPU it waits until the device has come to here: for log lines, not for steps.
        """
        self._change(self._part)
        if self._events is not None:
            self._events.wait()
            self._events.read_into(self._seconds)
        taken = {part: self._seconds[part] for part in PARTS}
        collectives, self._collectives = self._collectives, 0
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return taken, collectives

    def _change(self, part: str) -> str:
        """A part begins; which one ended."""
        before, self._part = self._part, part
        if self._events is None:
            now = time.perf_counter()
            self._seconds[before] += now - self._since
            self._since = now
        elif self._events.record(before) > _KEPT_EVENTS:
            self._events.read_into(self._seconds)
        return before

    @contextmanager
    def timing_collectives(self) -> Iterator[None]:
        """Count the time inside collectives of torch.distributed as communication, and not as the part around them.

        Waiting for slower ranks is inside. What is exchanged on another stream of a GPU beside the computation is not
        counted, but the wait for its end is.
        """
        places: list[tuple[Any, str]] = [(ProcessGroup, name) for name in _COLLECTIVES if hasattr(ProcessGroup, name)]
        before = [(owner, name, vars(owner)[name]) for owner, name in [*places, (Work, "wait")]]
        for owner, name, _ in before:
            setattr(owner, name, self._timed(getattr(owner, name), counts=owner is ProcessGroup))
        try:
            yield
        finally:
            for owner, name, method in before:
                setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._part in ("communication", _PAUSED):
                return method(*arguments, **named)
            self._collectives += counts
            if self._events is not None and self._events.elsewhere:
                return method(*arguments, **named)
            with self("communication"):
                return method(*arguments, **named)

        return timed


class _Events:
    """Events of a GPU's stream, each with the part that it ends; not measured without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._recorded: deque[tuple[str, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []

    @property
    def elsewhere(self) -> bool:
        """Whether what is called now goes to another stream, beside the computation."""
        return torch.cuda.current_stream(self._stream.device) != self._stream

    def record(self, part: str) -> int:
        """A part ends here in the device's queue; how many events wait to be read."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._recorded.append((part, event))
        return len(self._recorded)

    def wait(self) -> None:
        self._recorded[-1][1].synchronize()

    def read_into(self, seconds: dict[str, float]) -> None:
        """Add what lies between events that the device has passed; the last of them is kept as a begin."""
        while len(self._recorded) > 1 and self._recorded[1][1].query():  # type: ignore[no-untyped-call]
            _, begin = self._recorded.popleft()
            part, end = self._recorded[0]
            seconds[part] += begin.elapsed_time(end) / 1e3
            self._free.append(begin)
