"""The `ecgscale-launch` command."""

from __future__ import annotations

import argparse
import sys

from ecgscale.cli import OneLineParser, run_as_command
from ecgscale.errors import InputError
from ecgscale_launch.local import run_local

_OF_SEVERAL = ("pretrain", "finetune")  # the commands that know ranks


def main(argv: list[str] | None = None) -> int:
    """Run any `ecgscale` subcommand as several processes; exit code 2 and one line for what the user got wrong."""
    return run_as_command("ecgscale-launch", _main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    parser = OneLineParser(
        prog="ecgscale-launch",
        description="Run an ecgscale job as several processes on this machine.",
        epilog="example: ecgscale-launch --local 2 -- pretrain --config FILE --data.shards SHARDS --run.dir RUN",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--local", type=int, required=True, metavar="N", help="processes on this machine, one per GPU or core"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and pretrain or finetune with its arguments")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or command[0] not in _OF_SEVERAL:
        given = f"{command[0]!r} does not run as several processes" if command else "no command after --"
        raise InputError(f"{given}; give {' or '.join(_OF_SEVERAL)}")
    if options.local < 1:
        raise InputError(f"--local {options.local}: give 1 or more processes")
    return run_local(options.local, command)


if __name__ == "__main__":
    sys.exit(main())
