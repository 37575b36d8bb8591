"""A device as the benches see it: how long a call takes on it, how much memory, and what it can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecgscale.bench.measure import Round, interleaved

_FLUSH_BYTES = 256 << 20  # well beyond the L2 cache of any GPU
_MOST_CALLS = 200


class Call(NamedTuple):
    """What is timed, and what is made anew before each time without being timed."""

    run: Callable[[Any], object]
    before: Callable[[], Any] = lambda: None


class Memory(NamedTuple):
    """Bytes on the device above what was there before."""

    kept: int  # after the forward: its result and what it keeps for the backward
    peak: int  # most at any time during forward and backward, the gradients included


class Ceilings(NamedTuple):
    """What the device does at most, as measured."""

    bytes_per_s: float  # of a large copy, read and written bytes
    flops_per_s: float  # of a large matrix product in the dtype that is benched
    launch_s: float  # of a call that does next to nothing: what any other takes in addition


class Device:
    """A CPU with one thread, timed by the time that it computes, or a GPU, timed by its own events.

    On a GPU the cache is flushed before each call, by writing: a call has to write back what others left in the cache,
    as in training, and leaves there what it wrote last. The flush is longer than the host needs to launch the call, so
    that no gap between launches is counted: in training the host runs ahead too.
    """

    def __init__(self, name: str) -> None:
        self.cuda = name == "cuda"
        self.torch = torch.device(name)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        if self.cuda:
            self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
            self._flush_s = sorted(self._event_s(lambda: self._flushed.zero_()) for _ in range(20))[10]

    def round(self, call: Call, at_least_s: float) -> Round:
        """Repeat a call until the timed parts last so long."""
        return self._gpu_round(call, at_least_s) if self.cuda else _cpu_round(call, at_least_s)

    def ms(self, rounds: Sequence[Round]) -> list[float]:
        """Milliseconds per call of each round: of computing on a CPU, by the events of a GPU."""
        return [1e3 * one.wall_s / one.units if self.cuda else one.cpu_us / 1e3 for one in rounds]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _gpu_round(self, call: Call, at_least_s: float) -> Round:
        call.run(call.before())
        given = call.before()
        self.wait()
        began = time.perf_counter()
        call.run(given)
        host_s = time.perf_counter() - began
        self.wait()
        calls = max(1, min(_MOST_CALLS, int(at_least_s / (time.perf_counter() - began))))
        flushes = 1 + int(1.5 * host_s / self._flush_s)
        pairs = [_events() for _ in range(calls)]
        for begin, end in pairs:
            given = call.before()
            for _ in range(flushes):
                self._flushed.zero_()
            begin.record()
            call.run(given)
            end.record()
        self.wait()
        return Round(calls, sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3, calls * host_s)

    def _event_s(self, work: Callable[[], object]) -> float:
        begin, end = _events()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def memory(self, forward: Callable[[], Tensor], learned: Sequence[Tensor], grad: Tensor) -> Memory | None:
        """What a forward and a backward need; None on a CPU, which does not count it."""
        kept = 0

        def work() -> None:
            nonlocal kept
            before = torch.cuda.memory_allocated()
            out = forward()
            kept = torch.cuda.memory_allocated() - before
            torch.autograd.grad(out, learned, grad)

        peak = self.peak(work)
        return None if peak is None else Memory(kept, peak)

    def peak(self, work: Callable[[], object]) -> int | None:
        """Most bytes at any time of the work above what was there before; None on a CPU."""
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self, copied_bytes: int, side: int, rounds: int, at_least_s: float) -> Ceilings:
        """From the best rounds of a copy of so many bytes and of a product of square matrices of so many rows."""
        source = torch.randint(0, 127, (copied_bytes,), dtype=torch.int8, device=self.torch)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.torch).to(self.dtype) for _ in range(2))
        out, one = torch.empty_like(a), torch.zeros(1, device=self.torch)
        calls = {
            "copy": Call(lambda _: target.copy_(source)),
            "product": Call(lambda _: torch.mm(a, b, out=out)),
            "launch": Call(lambda _: one.zero_()),
        }
        candidates = {name: partial(self.round, call, at_least_s) for name, call in calls.items()}
        done = interleaved(candidates, rounds, "what the device can do")
        best_s = {name: min(self.ms(each)) / 1e3 for name, each in done.items()}
        return Ceilings(2 * copied_bytes / best_s["copy"], 2 * side**3 / best_s["product"], best_s["launch"])


def _events() -> tuple[Any, Any]:
    """Of a begin and of an end."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return begin, end


def _cpu_round(call: Call, at_least_s: float) -> Round:
    calls, wall_s, cpu_s = 0, 0.0, 0.0
    while not calls or wall_s < at_least_s:
        given = call.before()
        wall, cpu = time.perf_counter(), time.process_time()
        call.run(given)
        wall_s, cpu_s, calls = wall_s + time.perf_counter() - wall, cpu_s + time.process_time() - cpu, calls + 1
    return Round(calls, wall_s, cpu_s)
