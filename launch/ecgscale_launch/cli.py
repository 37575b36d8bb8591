"""The `ecgscale-launch` command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from ecgscale.cli import COMMANDS as OF_ECGSCALE
from ecgscale.cli import run_as_command
from ecgscale.errors import InputError
from ecgscale.settings import option

USAGE = """\
usage: ecgscale-launch CLUSTER.yaml [--key VALUE ...] -- COMMAND ... [-- COMMAND ...]
       ecgscale-launch --local N -- COMMAND ...
       ecgscale-launch {commands} ... --help

Run `ecgscale COMMAND ...` on a SLURM cluster, or here as N processes, so that it survives preemption, time limits,
crashes and hangs. Several commands form a chain: each begins when the one before has succeeded.

{options}

Keys of CLUSTER.yaml, which --key VALUE overrides:
"""

SUBCOMMANDS = {  # name: its module and class
    "status": "watch:Status",
    "logs": "watch:Logs",
    "cancel": "watch:Cancel",
    "resume": "watch:Resume",
    "results": "sweep_table:Results",
    "doctor": "doctor:Doctor",
    "devcluster": "devcluster:DevClusterCommand",
}


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 and one line for what the user got wrong."""
    return run_as_command("ecgscale-launch", _main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if argv and argv[0] in SUBCOMMANDS:
        return subcommand(argv[0], argv[1:])
    head, commands = _split(argv)
    if head and not commands and not head[0].startswith("-") and "--help" not in head:
        near = get_close_matches(head[0], SUBCOMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "no command after it; write -- before one, like -- pretrain"
        raise InputError(f"{head[0]}: {hint}")
    if (not head and not commands) or "--help" in head or "-h" in head:
        print(_help())
        return 0
    return launch(head, commands)


def subcommand(name: str, words: list[str]) -> int:
    """Run a subcommand; its exit code. Raises InputError."""
    from ecgscale_launch.subcommand import run_subcommand

    module, _, kind = SUBCOMMANDS[name].partition(":")
    return run_subcommand(name, getattr(import_module(f"ecgscale_launch.{module}"), kind), words)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How it is run."""

    cluster: Path | None = option(None, positional=True)
    """YAML file of the cluster."""
    local: int | None = option(None, metavar="N")
    """Run on this machine as N processes, now; CLUSTER.yaml may be left out."""
    dry_run: bool = False
    """Check and show all: scripts, configs, the ranks' environment; write and start nothing."""
    run: str = option("", metavar="FOLDER")
    """Run folder of a command that has no run.dir; by default runs/COMMAND-TIME."""
    after: list[str] = option(default_factory=list, repeated=True, whole=True, metavar="JOB_OR_RUN")
    """Begin when that job has succeeded (a job's number or a run folder; may be repeated)."""
    sweep: list[list[str]] = option(default_factory=list, several=True, repeated=True, metavar="KEY VALUE ...")
    """One run for each value of a config key, in RUN/KEY=VALUE; repeated: for each combination."""
    parts: int = option(0, metavar="N")
    """Split ingest, reproduce or scaling-law over N jobs, and merge."""
    at_once: int = option(0, metavar="N")
    """Jobs of an array that run at the same time; 0: all."""

    def __post_init__(self) -> None:
        if self.cluster is None and self.local is None:
            raise InputError("give CLUSTER.yaml, or --local N to run here; `ecgscale-launch --help` tells more")
        if self.local is not None and self.local < 1:
            raise InputError(f"--local {self.local}: give 1 or more processes")
        if bare := next((key for key, *values in self.sweep if not values), None):
            raise InputError(f"--sweep {bare}: give its values too, like --sweep train.seed 0 1 2")


def launch(head: list[str], commands: list[list[str]]) -> int:
    """Submit, or run here, what stands behind ``--``, as what stands before it says."""
    from ecgscale_launch.dry_run import dry_run
    from ecgscale_launch.launch_config import load_cluster
    from ecgscale_launch.launching import run_here, submit_all, with_processes
    from ecgscale_launch.stages import Wanted
    from ecgscale_launch.subcommand import with_cluster_keys

    options, changes = with_cluster_keys(Launch, head)
    _check(commands)
    cluster = load_cluster(options.cluster, changes)
    sweeps = tuple((key, tuple(values)) for key, *values in options.sweep)
    wanted = Wanted(commands, options.run, sweeps, options.parts, tuple(options.after), options.at_once)
    if options.local is not None:
        cluster = with_processes(cluster, options.local)
    if options.dry_run:
        print(dry_run(wanted, cluster, "slurm" if options.local is None else "local"))
        return 0
    if options.local is not None:
        return run_here(wanted, cluster)
    for stage, numbers in submit_all(wanted, cluster):
        shown = numbers[0] if len(numbers) == 1 else f"{numbers[0].partition('_')[0]}, an array of {len(numbers)}"
        print(f"job {shown}: {stage.run}")
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[list[str]]]:
    """What stands before the first ``--``, and each command behind one."""
    parts: list[list[str]] = [[]]
    for argument in argv:
        if argument == "--":
            parts.append([])
        else:
            parts[-1].append(argument)
    return parts[0], parts[1:]


def _check(commands: list[list[str]]) -> None:
    if not commands or not commands[0]:
        raise InputError(f"no command after --; give one of ecgscale's: {', '.join(OF_ECGSCALE)}")
    for command in commands:
        if not command or command[0] not in OF_ECGSCALE:
            given = repr(command[0]) if command else "nothing"
            raise InputError(f"{given} after --: no command of ecgscale; known are {', '.join(OF_ECGSCALE)}")


def _help() -> str:
    from ecgscale.settings.help import help_text, own_options
    from ecgscale_launch.launch_config import LaunchConfig

    title = "What a job asks"
    keys = f"\n{title}{help_text(LaunchConfig, 'ecgscale-launch').split(title)[-1]}"
    return USAGE.format(commands="|".join(SUBCOMMANDS), options=own_options(Launch)) + keys


if __name__ == "__main__":
    sys.exit(main())
