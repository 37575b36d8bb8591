"""What the checks of shared cases have in common: a registry, and the command line run as a user would.

A case of ``$ECGSCALE_SHARED/cases/data`` is a folder with a README that says what is right. Its check stands in a
``checks_*.py`` beside this file and is a function of (case folder, empty folder) that returns one line on what it saw
and raises AssertionError where that is not right.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ecgscale.cli import main

Check = Callable[[Path, Path], str]
CHECKS: dict[str, Check] = {}


def case(name: str) -> Callable[[Check], Check]:
    """Register the check of the case folder ``name``."""

    def register(check: Check) -> Check:
        assert name not in CHECKS, name
        CHECKS[name] = check
        return check

    return register


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def ecgscale(*arguments: object) -> Said:
    """Run an `ecgscale` command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())
