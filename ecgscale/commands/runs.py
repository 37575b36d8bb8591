"""`ecgscale pretrain`, `finetune`, `reproduce`, `scaling-law`, `plan` and `bench`: what a config describes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import TypeVar

from ecgscale.commands.command import OneLineParser, first_rank, part_of_n, wants_help

Config = TypeVar("Config")


def _helped(argv: list[str], config_type: type, command: str, *more: str) -> bool:
    """Print the help of a command that a config describes, and these lines, where it is wanted."""
    from ecgscale import config

    if not wants_help(argv):
        return False
    print(config.help_text(config_type, command))
    print("\n".join(more))
    return True


def pretrain(argv: list[str]) -> None:
    """Pretrain an encoder without labels; goes on by itself where the run folder holds a checkpoint."""
    from ecgscale import config

    short = "--init FOLDER is short for --init.model FOLDER. Shape, segments and normalisation are the model's."
    if _helped(argv, config.PretrainConfig, "pretrain", short):
        return
    chosen = config.load(config.PretrainConfig, argv)
    from ecgscale.pretrain import pretrain as run

    export_folder = run(chosen)
    if first_rank():
        print(f"export: {export_folder}")


def finetune(argv: list[str]) -> None:
    """Fine-tune a pretrained encoder on a downstream task, or fit a probe; scored on the test split."""
    from ecgscale import config
    from ecgscale.downstream.finetune_config import FinetuneConfig

    short = "--init FOLDER is short for --init.model FOLDER. Segments and normalisation are those of the model."
    if _helped(argv, FinetuneConfig, "finetune", short):
        return
    chosen = config.load(FinetuneConfig, argv)
    from ecgscale.downstream.evaluate import table
    from ecgscale.downstream.finetune import finetune as run

    scored = run(chosen)
    if scored is not None:  # the first rank's
        print(table(scored))


def reproduce(argv: list[str]) -> None:
    """Compare pretraining methods: methods x tasks x protocols x label fractions x seeds x lead sets, in one table.

    CONFIG.yaml says which; random weights always stand beside. What is finished is not done again. Over many jobs:
    --part 1/N to N/N side by side, then the same command with --merge.
    """
    from ecgscale.downstream.comparison import ReproduceConfig
    from ecgscale.downstream.reproduce import merge, plan, work

    _study("reproduce", argv, ReproduceConfig, plan, work, merge)


def scaling_law(argv: list[str]) -> None:
    """Pretrain a ladder of sizes x tokens, fit L = E + A/N^alpha + B/D^beta, predict the next size.

    CONFIG.yaml says which. What is finished is not done again. Over many jobs: --part 1/N to N/N side by side, then the
    same command with --merge.
    """
    from ecgscale.scaling.ladder import ScalingConfig, plan, work
    from ecgscale.scaling.report import merge

    _study("scaling-law", argv, ScalingConfig, plan, work, merge)


def _study(
    command: str,
    argv: list[str],
    config_type: type[Config],
    plan: Callable[[Config], str],
    work: Callable[[Config, tuple[int, int]], str],
    merge: Callable[[Config], str],
) -> None:
    """A command that does many runs: all of them or a part, then its table."""
    from ecgscale import config

    parser = OneLineParser(prog=f"ecgscale {command}", add_help=False, allow_abbrev=False)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--part", type=part_of_n, default=(1, 1))
    how.add_argument("--merge", action="store_true")
    how.add_argument("--dry-run", action="store_true")
    more = (
        "  CONFIG.yaml is short for --config CONFIG.yaml",
        "  --part I/N   do only part I of N, and write no table",
        "  --merge      write the table, when all parts are done",
        "  --dry-run    only list what is to be done",
    )
    if _helped(argv, config_type, command, *more):
        return
    options, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        rest = ["--config", *rest]
    chosen = config.load(config_type, rest)
    if options.dry_run:
        print(plan(chosen))
        return
    outcome = "" if options.merge else work(chosen, options.part)
    if not first_rank():
        return
    if outcome:
        print(outcome)
    if options.merge or options.part[1] == 1:
        print(merge(chosen))


def plan(argv: list[str]) -> None:
    """Say what a pretraining run needs and how long it takes: memory, time, energy, failures; recommend a config."""
    from ecgscale import config
    from ecgscale.plan.command import check, run
    from ecgscale.plan.config import PlanConfig

    more = (
        "  --out FILE.yaml  write the recommended config, for `ecgscale pretrain --config`",
        "  --json           for programs: seconds, bytes, FLOP/s",
        "  --measure        plan for this machine, with rates that are measured in half a minute",
        "  --check          hold predictions against real steps on this machine, in minutes; takes no other key",
    )
    if _helped(argv, PlanConfig, "plan", *more):
        return
    parser = OneLineParser(prog="ecgscale plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    for name in ("json", "measure", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    options, rest = parser.parse_known_args(argv)
    if options.check:
        unwanted = [f"--{name}" for name in ("out", "measure") if getattr(options, name)]
        print(check([*unwanted, *rest], options.json))
        return
    print(run(config.load(PlanConfig, rest), options.out, options.json, options.measure))


def bench(argv: list[str]) -> None:
    """Measure steps of training, scaling, the stream and kernels beside honest baselines, and report on results."""
    from ecgscale.bench.command import add_parts

    parser = OneLineParser(
        prog="ecgscale bench",
        description=cleandoc(bench.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_parts(parser.add_subparsers(dest="part", required=True, metavar="PART"))
    options, keys = parser.parse_known_args(argv)
    options.run(options, keys)
