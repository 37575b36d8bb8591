"""The ranks of a way as processes of this machine, which take steps when they are asked to.

Each way has processes of its own: their memory can be told apart, and one that runs out of it takes no other along.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, SpawnContext
from types import TracebackType
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from ecgscale.bench.measure import Round, interleaved
from ecgscale.bench.step_case import Case
from ecgscale.bench.step_ways import SHARDS, Equality, equality, prepare
from ecgscale.errors import InputError
from ecgscale.process import memory_bytes
from ecgscale.training.ranks import start_ranks

_EQUALITY = "equality"
_WATCH_S = 0.1  # between two looks at the memory of ranks that must not exceed a limit
_LAST_WORD_S = 2.0  # for all ranks to end once one has


class FailedError(Exception):
    """A way cannot take its steps."""


class TooLargeError(FailedError):
    """The case does not fit into memory."""


class Turn(NamedTuple):
    """What a rank did in one turn."""

    wall_s: float
    cpu_s: float
    peak_bytes: int  # of the device; on a CPU of the process, since it began


class _Failed(NamedTuple):
    """What a rank says before it ends."""

    message: str
    too_large: bool


class Group:
    """All ranks of one way of a case. Use it as a context: its processes end with it."""

    def __init__(self, case: Case, way: str, limit_bytes: int = 0) -> None:
        """Started, but not ready yet; on a CPU ``limit_bytes`` is what all processes together may hold, 0: anything."""
        self.case, self.way = case, way
        self._limit_bytes = limit_bytes if case.device == "cpu" else 0
        self.turns: list[list[Turn]] = []  # of each turn, of each rank
        context = _context(case.device)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ends: list[connection.Connection] = []
        self._ranks = []
        for rank in range(case.ranks):
            end, theirs = context.Pipe()
            process = context.Process(target=_run_rank, args=(case, way, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(end)
            self._ranks.append(process)

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, steps: int, untimed: int = 0) -> Round:
        """Some steps by all ranks together, as recordings of all ranks and the time of the slowest.

        Raises TooLargeError where memory runs out, FailedError for all else that goes wrong.
        """
        turns: list[Turn] = self._ask((steps, untimed))
        self.turns.append(turns)
        units = steps * self.case.batch * self.case.ranks
        return Round(units, max(turn.wall_s for turn in turns), sum(turn.cpu_s for turn in turns))

    def equality(self) -> Equality:
        """Of a group that was made for it, see ``equality_of``."""
        found: Equality = self._ask(None)[0]
        return found

    @property
    def peak_bytes(self) -> list[int]:
        """Most memory of each rank so far."""
        return [max(turn.peak_bytes for turn in rank) for rank in zip(*self.turns, strict=True)]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            with suppress(OSError):
                end.send("end")
        for rank in self._ranks:
            rank.join(timeout=2)
            if rank.is_alive():
                rank.kill()
                rank.join()
            rank.close()
        for end in self._ends:
            end.close()
        self._ranks, self._ends = [], []

    def _ask(self, what: object) -> list[Any]:
        """What each rank answers."""
        answers: dict[int, object] = {}
        for end in self._ends:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, and may have said why
                end.send(what)
        while len(answers) < len(self._ends):
            missing = [i for i in range(len(self._ends)) if i not in answers]
            wait_s = _WATCH_S if self._limit_bytes else None
            ready = connection.wait([self._ends[i] for i in missing], wait_s)
            for i in missing:
                if self._ends[i] in ready:
                    answers[i] = self._answer(i)
            self._watch()
        return [answers[i] for i in range(len(self._ends))]

    def _answer(self, rank: int) -> object:
        try:
            answer = self._ends[rank].recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._gone() from error
        if not isinstance(answer, _Failed):
            return answer
        raise (TooLargeError if answer.too_large else FailedError)(answer.message)

    def _gone(self) -> Exception:
        """A process that ends without a word was killed, by the system where memory ran out, or had an error.

        The one whose pipe breaks first may only have lost another, so all of them are looked at.
        """
        until_s = time.monotonic() + _LAST_WORD_S
        for process in self._ranks:
            process.join(timeout=max(0.0, until_s - time.monotonic()))
        codes = [process.exitcode for process in self._ranks]
        if -signal.SIGKILL in codes:
            return TooLargeError("killed by the system, which does that where memory runs out")
        ended = [f"rank {rank} ended with code {code}" for rank, code in enumerate(codes) if code is not None]
        return FailedError(f"{ended[0] if ended else 'a rank ended'}; what it said stands above")

    def _watch(self) -> None:
        if not self._limit_bytes:
            return
        held = 0
        for rank in self._ranks:
            with suppress(psutil.NoSuchProcess):
                held += psutil.Process(rank.pid).memory_info().rss
        if held > self._limit_bytes:
            for rank in self._ranks:
                rank.kill()
            raise TooLargeError(f"needs more than {self._limit_bytes / 1e9:g} GB")


def equality_of(case: Case) -> Equality:
    """How far ecgscale and the straightforward way are apart for a small batch of a case, in a process of its own."""
    with Group(case, _EQUALITY) as group:
        return group.equality()


def _context(device: str) -> SpawnContext | ForkServerContext:
    """On a CPU processes are forked from one that has imported torch; CUDA does not survive a fork."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _run_rank(case: Case, way: str, rank: int, port: int, end: connection.Connection) -> None:
    """What a process does: steps whenever it is asked for some, until it is told to end."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no result
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the bench, which ends its ranks
    if case.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(case.threads)
    try:
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the bench has gone
            _serve(case, way, end)
    except InputError as error:
        end.send(_Failed(str(error), too_large=False))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not tells_of_memory(error):
            raise
        end.send(_Failed(f"out of memory: {_shortened(error)}", too_large=True))


def _serve(case: Case, way: str, end: connection.Connection) -> None:
    ranks = start_ranks()
    if way == _EQUALITY:
        end.recv()
        end.send(equality(case, ranks))
        return
    step = prepare(way, case, ranks)
    while (asked := end.recv()) != "end":
        steps, untimed = asked
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(untimed):
            step()
        _meet(case)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        if case.device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - wall, time.process_time() - cpu
        end.send(Turn(*took, _peak_bytes(case)))
        if case.device == "cuda":
            torch.cuda.empty_cache()  # other ways need the memory meanwhile; their untimed steps take it again


def tells_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. CUDA's libraries and the CPU's allocator say so by RuntimeErrors only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(
        re.search(r"can't allocate memory|out of memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    )


def _shortened(error: BaseException) -> str:
    """``tried to allocate 20.00 GiB`` of torch's paragraph."""
    told = re.search(r"tried to allocate [\d.]+ ?\w+", str(error), re.IGNORECASE)
    return told.group().lower() if told else str(error).splitlines()[0]


def _meet(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
    if case.ranks > 1:
        dist.barrier()


def _peak_bytes(case: Case) -> int:
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return memory_bytes("VmHWM")


# -- turns -----------------------------------------------------------------------------------------------------------

_MADE_AHEAD = 4  # batches


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int  # of every way, after one that is thrown away
    steps: int  # of a way in a round
    untimed: int  # before them
    warm_up: int  # before everything
    quick: bool = False  # only to show that everything runs: no bound is held against the numbers

    @staticmethod
    def usual(cuda: bool) -> Effort:
        """Steps of a GPU are short, and there the memory that others had meanwhile is taken anew first."""
        return Effort(9, 10, 2, 3) if cuda else Effort(7, 1, 0, 2)

    @staticmethod
    def least() -> Effort:
        """Shows that everything runs; the numbers are worth nothing, so no bound is held against them."""
        return Effort(1, 1, 0, 1, quick=True)


@dataclass
class Taken:
    """What each way did, by its name."""

    rounds: dict[str, list[Round]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)  # of the rank that needs most
    failed: dict[str, str] = field(default_factory=dict)  # why


def take_turns(wanted: Mapping[str, tuple[Case, str]], effort: Effort, title: str) -> Taken:
    """Interleaved steps of ways of cases. A way that fails is noted, and the others go on."""
    taken = Taken()
    with ExitStack() as stack:
        groups = {name: stack.enter_context(Group(case, way)) for name, (case, way) in wanted.items()}

        def turn(name: str, steps: int, untimed: int) -> Round:
            try:
                return groups[name].take(steps, untimed)
            except FailedError as error:
                taken.failed[name] = str(error)
                groups.pop(name).close()
                raise

        # While others have their turn, the stream makes batches ahead of need: those do not count.
        untimed = {n: effort.untimed + (_MADE_AHEAD if way == SHARDS else 0) for n, (_, way) in wanted.items()}
        for name in wanted:
            print(f"warming up {title}: {name}", file=sys.stderr, flush=True)
            try:
                turn(name, effort.warm_up, 0)
            except FailedError:
                continue
        while groups and not taken.rounds:
            calls = {name: partial(turn, name, effort.steps, untimed[name]) for name in groups}
            try:
                taken.rounds = interleaved(calls, effort.rounds, title)
            except FailedError:
                continue
        taken.peak_bytes = {name: max(group.peak_bytes) for name, group in groups.items()}
    return taken
