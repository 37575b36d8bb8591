"""What a command is: a dataclass whose fields are its options, with ``run``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from ecgscale.errors import InputError
from ecgscale.settings import Given, build, from_words
from ecgscale.settings.help import help_text


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand of `ecgscale`."""

    def run(self) -> None:
        """Do it, and print what came of it."""
        raise NotImplementedError


Values = dict[str, Any]
"""What a command is given, as JSON or YAML can hold it."""


@dataclass(frozen=True)
class Subcommand:
    """One of `ecgscale`: its words become values, once; values, which can be written down, become the work."""

    summary: str
    """What it does, in one line."""
    help: Callable[[], str]
    read: Callable[[list[str]], Values]
    """Words -> values, which are checked. Raises InputError."""
    run: Callable[[Values], None]
    bare_is_help: bool = True
    """Whether its name alone asks for help."""
    config_type: Callable[[], type] | None = None
    """Of the config that describes it, where one does; to call it may import PyTorch."""

    def __call__(self, words: list[str]) -> None:
        """Do what a command line says."""
        if wants_help(words, self.bare_is_help):
            print(self.help())
        else:
            self.run(self.read(words))


def of_options(name: str, kind: type[Command]) -> Subcommand:
    """A command whose options are a dataclass's fields."""
    about = cleandoc(kind.__doc__ or "")

    def read(words: list[str]) -> Values:
        with seen_in(name):
            given = from_words(kind, words)
            build(kind, given)  # defaults are left to the machine that runs it
        return given.tree

    return Subcommand(
        summary=about.splitlines()[0],
        help=lambda: help_text(kind, f"ecgscale {name}", about, short=True),
        read=read,
        run=lambda values: build(kind, Given(values)).run(),
        bare_is_help=False,
    )


@contextmanager
def seen_in(name: str, program: str = "ecgscale") -> Iterator[None]:
    """Errors of a command's options name the command."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}; see `{program} {name} --help`") from error


def wants_help(words: list[str], nothing_is_help: bool = True) -> bool:
    return (not words and nothing_is_help) or "-h" in words or "--help" in words


def first_rank() -> bool:
    """Whether this process is the one of its job that prints."""
    return os.environ.get("RANK", "0") == "0"


def part_of_n(text: str) -> tuple[int, int]:
    """``2/8`` -> (2, 8); raises InputError."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise InputError(f"--part {text!r}: give 1/N to N/N")
    return int(i), int(n)
