"""What a command is: a dataclass whose fields are its options, with ``run``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from inspect import cleandoc
from typing import NoReturn

from ecgscale.errors import InputError
from ecgscale.settings import build, from_words
from ecgscale.settings_help import help_text


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand of `ecgscale`."""

    def run(self) -> None:
        """Do it, and print what came of it."""
        raise NotImplementedError


def as_function(name: str, kind: type[Command]) -> Callable[[list[str]], None]:
    """The command as a function of its words, which carries its docstring."""

    def run(words: list[str]) -> None:
        if wants_help(words, nothing_is_help=False):
            print(help_text(kind, name, cleandoc(kind.__doc__ or ""), short=True))
            return
        try:
            command = build(kind, from_words(kind, words))
        except InputError as error:
            raise InputError(f"{name}: {error}; see `ecgscale {name} --help`") from error
        command.run()

    run.__doc__ = kind.__doc__
    return run


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong as every other error is said: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog.removeprefix('ecgscale ')}: {message}; see `{self.prog} --help`")


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
