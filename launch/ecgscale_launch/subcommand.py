"""What a subcommand of `ecgscale-launch` is: a dataclass whose fields are its options, with ``run``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from inspect import cleandoc
from typing import TypeVar

from ecgscale.commands.command import seen_in, wants_help
from ecgscale.settings import Given, build, from_words, places, take_known
from ecgscale.settings.help import help_text
from ecgscale_launch.launch_config import LaunchConfig

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """One that needs no cluster config."""

    def run(self) -> int:
        """Do it; the exit code."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ClusterSubcommand:
    """One whose further options change the cluster config."""

    def run(self, changes: Given) -> int:
        """Do it; the exit code."""
        raise NotImplementedError


def run_subcommand(name: str, kind: type[Subcommand] | type[ClusterSubcommand], words: list[str]) -> int:
    """Do what a command line says; the exit code. Raises InputError."""
    if wants_help(words, nothing_is_help=False):
        print(help_text(kind, f"ecgscale-launch {name}", cleandoc(kind.__doc__ or ""), short=True))
        return 0
    with seen_in(name, "ecgscale-launch"):
        if not issubclass(kind, ClusterSubcommand):
            run = build(kind, from_words(kind, words)).run
        else:
            command, changes = with_cluster_keys(kind, words)
            run = partial(command.run, changes)
    return run()


def with_cluster_keys(kind: type[Options], words: list[str]) -> tuple[Options, Given]:
    """Options, of which the first word may be the one that has no name, and what changes the cluster config."""
    own, rest = take_known(kind, words)
    if rest and not rest[0].startswith("-"):
        own.put(places(kind)[0].name, rest.pop(0), "")
    return build(kind, own), from_words(LaunchConfig, rest)
