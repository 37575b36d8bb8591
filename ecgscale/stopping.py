"""Stopping when asked: a signal sets a flag, the ranks agree at a step boundary, save together and leave.

SIGTERM and SIGUSR2 ask (a scheduler sends them ahead of a time limit or a preemption), and so does Ctrl-C while a
run trains. Nothing is saved inside a handler: a collective there would deadlock.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from what was saved


class Stopped(Exception):  # noqa: N818  (no error: the run did what it was asked to)
    """The run was asked to stop, and everything is saved. The message says where."""


_asked = False


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _asked


def listen() -> None:
    """From now on SIGTERM and SIGUSR2 ask this process to stop, and child processes that are forked ignore them.

    Called before the slow imports, so that a signal during start-up is not lost.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _ask)
    os.register_at_fork(after_in_child=_ignore)


def leave_when_asked() -> None:
    """From now on SIGTERM and SIGUSR2 end a command that knows no steps, which the same command begins again or goes on
    with: by raising Stopped in the main thread."""

    def leave(_: int, __: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        raise Stopped("stopped as asked")

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, leave)
    os.register_at_fork(after_in_child=_ignore)


@contextmanager
def listening() -> Iterator[None]:
    """While a run trains, Ctrl-C asks too; the second one interrupts at once."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.signal(number, _ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(number: int, _: FrameType | None) -> None:
    global _asked
    if number == signal.SIGINT:
        if _asked:
            raise KeyboardInterrupt
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nstopping after this step; Ctrl-C again to interrupt\n"
        )
    _asked = True


def _ignore() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
