"""`ecgscale pretrain`, `finetune`, `reproduce`, `scaling-law`, `plan` and `bench`: what a config describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ecgscale.commands.command import Subcommand, Values, first_rank, of_options, part_of_n, seen_in, wants_help
from ecgscale.errors import InputError
from ecgscale.settings import Given, build, from_tree, option, take_known


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """No options but the keys of the config."""


def _of_config(
    name: str,
    summary: str,
    config_type: Callable[[], type],
    work: Callable[[Any, Any], None],
    options: type = NoOptions,
    *more: str,
) -> Subcommand:
    """A command that a config describes, and perhaps options beside it; both stand in its values.

    ``config_type`` imports PyTorch, and is called when it is needed; ``work`` takes the config and the options;
    ``more`` are lines of the help.
    """

    def helped() -> str:
        from ecgscale import config
        from ecgscale.settings.help import own_options

        own = [own_options(options)] if fields(options) else []
        return "\n\n".join([config.help_text(config_type(), name), *own, *more])

    def read(words: list[str]) -> Values:
        from ecgscale import config

        with seen_in(name):
            own, rest = take_known(options, words)
            build(options, own)
        if fields(options) and rest and not rest[0].startswith("-"):
            rest = ["--config", *rest]
        return asdict(config.load(config_type(), rest)) | own.tree

    def run(values: Values) -> None:
        from ecgscale import config
        from ecgscale.choices import current

        names = {member.name for member in fields(options)}
        own: Any = from_tree(options, {key: value for key, value in values.items() if key in names})
        keys = {key: value for key, value in values.items() if key not in names}
        work(config.build(config_type(), current(config_type(), keys)), own)

    return Subcommand(summary, helped, read, run, config_type=config_type)


# -- pretrain and finetune -------------------------------------------------------------------------------------------


def _pretrain_config() -> type:
    from ecgscale.config import PretrainConfig

    return PretrainConfig


def _pretrain(config: Any, _: NoOptions) -> None:
    from ecgscale.pretrain import pretrain

    export_folder = pretrain(config)
    if first_rank():
        print(f"export: {export_folder}")


def _finetune_config() -> type:
    from ecgscale.downstream.finetune_config import FinetuneConfig

    return FinetuneConfig


def _finetune(config: Any, _: NoOptions) -> None:
    from ecgscale.downstream.evaluate import table
    from ecgscale.downstream.finetune import finetune

    scored = finetune(config)
    if scored is not None:  # the first rank's
        print(table(scored))


PRETRAIN = _of_config(
    "pretrain",
    "Pretrain an encoder without labels; goes on by itself where the run folder holds a checkpoint.",
    _pretrain_config,
    _pretrain,
    NoOptions,
    "--init FOLDER is short for --init.model FOLDER. Shape, segments and normalisation are the model's.",
)
FINETUNE = _of_config(
    "finetune",
    "Fine-tune a pretrained encoder on a downstream task, or fit a probe; scored on the test split.",
    _finetune_config,
    _finetune,
    NoOptions,
    "--init FOLDER is short for --init.model FOLDER. Segments and normalisation are those of the model.",
)


# -- reproduce and scaling-law ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of it is done."""

    part: str = option("", metavar="I/N")
    """Do only part I of N, and write no table. Over many jobs: 1/N to N/N side by side, then --merge."""
    merge: bool = False
    """Write the table, when all parts are done."""
    dry_run: bool = False
    """Only list what is to be done."""

    def __post_init__(self) -> None:
        if self.part:
            part_of_n(self.part)
        if bool(self.part) + self.merge + self.dry_run > 1:
            raise InputError("--part, --merge and --dry-run: give one of them")


def _reproduce_config() -> type:
    from ecgscale.downstream.comparison import ReproduceConfig

    return ReproduceConfig


def _reproduce(config: Any, share: Share) -> None:
    from ecgscale.downstream.reproduce import merge, plan, work

    _study(config, share, plan, work, merge)


def _scaling_config() -> type:
    from ecgscale.scaling.ladder import ScalingConfig

    return ScalingConfig


def _scaling_law(config: Any, share: Share) -> None:
    from ecgscale.scaling.ladder import plan, work
    from ecgscale.scaling.report import merge

    _study(config, share, plan, work, merge)


def _study(
    config: Any,
    share: Share,
    plan: Callable[[Any], str],
    work: Callable[[Any, tuple[int, int]], str],
    merge: Callable[[Any], str],
) -> None:
    """Many runs, all of them or a part, and then their table."""
    if share.dry_run:
        print(plan(config))
        return
    outcome = "" if share.merge else work(config, part_of_n(share.part or "1/1"))
    if not first_rank():
        return
    if outcome:
        print(outcome)
    if not share.part:
        print(merge(config))


REPRODUCE = _of_config(
    "reproduce",
    "Compare pretraining methods: methods x tasks x protocols x label fractions x seeds x lead sets, in one table.",
    _reproduce_config,
    _reproduce,
    Share,
    "CONFIG.yaml is short for --config CONFIG.yaml. Random weights always stand beside. What is finished is not done "
    "again.",
)
SCALING_LAW = _of_config(
    "scaling-law",
    "Pretrain a ladder of sizes x tokens, fit L = E + A/N^alpha + B/D^beta, predict the next size.",
    _scaling_config,
    _scaling_law,
    Share,
    "CONFIG.yaml is short for --config CONFIG.yaml. What is finished is not done again.",
)


# -- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How a plan is made and told."""

    out: Path | None = option(None, metavar="FILE.yaml")
    """Write the recommended config, for `ecgscale pretrain --config`."""
    json: bool = False
    """For programs: seconds, bytes, FLOP/s."""
    measure: bool = False
    """Plan for this machine, with rates that are measured in half a minute."""
    check: bool = False
    """Hold predictions against real steps on this machine, in minutes; takes --json alone beside it."""


def _plan_config() -> type:
    from ecgscale.plan.config import PlanConfig

    return PlanConfig


def _plan(config: Any, how: Planning) -> None:
    from ecgscale.plan.command import check, run

    print(check(how.json) if how.check else run(config, how.out, how.json, how.measure))


def _read_plan(words: list[str]) -> Values:
    own, others = take_known(Planning, words)
    if own.get("check"):
        unwanted = [*others, *(f"--{name}" for name in ("out", "measure") if name in own.tree)]
        if unwanted:
            raise InputError(f"plan --check: unexpected {unwanted[0]!r}; it takes --json only")
    return _USUAL_PLAN.read(words)


_USUAL_PLAN = _of_config(
    "plan",
    "Say what a pretraining run needs and how long it takes: memory, time, energy, failures; recommend a config.",
    _plan_config,
    _plan,
    Planning,
)
PLAN = replace(_USUAL_PLAN, read=_read_plan)


# -- bench -----------------------------------------------------------------------------------------------------------


def _bench_help() -> str:
    from ecgscale.commands.bench import PARTS

    lines = ["usage: ecgscale bench PART [--option VALUE ...]", "", BENCH.summary, ""]
    lines += [f"  {name:<10} {(part.__doc__ or '').splitlines()[0]}" for name, part in PARTS.items()]
    return "\n".join([*lines, "", "`ecgscale bench PART --help` tells more."])


def _read_bench(words: list[str]) -> Values:
    """The part, and its options by the names of its fields."""
    from ecgscale import config
    from ecgscale.commands.bench import PARTS, Steps

    part, *rest = words
    if part not in PARTS:
        raise InputError(f"bench: unknown part {part!r}; known are {', '.join(PARTS)}")
    if not issubclass(PARTS[part], Steps):
        return {"part": part} | of_options(f"bench {part}", PARTS[part]).read(rest)
    from ecgscale.bench.step_case import StepConfig

    with seen_in(f"bench {part}"):
        given, keys = take_known(PARTS[part], rest)
        build(PARTS[part], given)
    return {"part": part} | given.tree | {"keys": config.read_words(StepConfig, keys).dotted()}


def _bench(values: Values) -> None:
    from ecgscale.commands.bench import PARTS

    part = values["part"]
    build(PARTS[part], Given({name: value for name, value in values.items() if name != "part"})).run()


@dataclass(frozen=True)
class _Bench(Subcommand):
    """Each part has its own help."""

    def __call__(self, words: list[str]) -> None:
        from ecgscale.commands.bench import PARTS

        if words and words[0] in PARTS and wants_help(words):
            print(of_options(f"bench {words[0]}", PARTS[words[0]]).help())
        else:
            super().__call__(words)


BENCH = _Bench(
    "Measure steps of training, scaling, the stream and kernels beside honest baselines, and report on results.",
    _bench_help,
    _read_bench,
    _bench,
)
