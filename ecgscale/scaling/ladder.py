"""`ecgscale scaling-law`: a ladder of sizes × tokens, each cell a pretraining run of its own with its own schedule.

A run that is stopped on its way to more tokens would not do instead: its learning rate has not come down yet, and its
loss is too high (Hoffmann et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ecgscale import progress
from ecgscale.config import PretrainConfig, RunConfig
from ecgscale.cost import parameters, step_flops
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import Diverged, InputError
from ecgscale.json_lines import read_json_lines
from ecgscale.model import EncoderConfig, build_encoder
from ecgscale.objectives import OBJECTIVES
from ecgscale.pretrain import pretrain
from ecgscale.run_folder import EVENTS, leave_run
from ecgscale.studies import (
    STUDY,
    check_pretraining,
    config_of,
    folder_name,
    is_pretrained,
    places,
    read_result,
    refuse_names,
    refuse_twice,
    write_result,
)
from ecgscale.training.ranks import Ranks, first_rank, log, start_ranks

# The recordings that are scored define L.
LADDER = replace(STUDY, strict=STUDY.strict | {"train.validation_recordings"})
_DECIDED = ("train.steps", "train.warmup_steps", "train.seed")
DIVERGED: dict[str, float | None] = {"loss": None}  # the validation loss of a run that did not come to its end


@dataclass(frozen=True)
class SizeConfig:
    """A size of the model."""

    name: str
    """As the table names it."""
    overrides: list[str] = field(default_factory=list)
    """Its shape, and what goes with it: model.preset=small, engine.learning_rate=1e-3."""


@dataclass(frozen=True)
class ScalingConfig:
    """What is run, and what is asked of the law."""

    pretrain: str = ""
    """YAML config of the pretraining that all cells share."""
    overrides: list[str] = field(default_factory=list)
    """Changes of it for all cells, such as train.global_batch=64."""
    shards: list[str] = field(default_factory=list)
    """Data sets to pretrain on; the loss is that of their validation recordings."""
    data_dir: str = ""
    """Folder in which data sets lie that are named by a relative path."""
    sizes: list[SizeConfig] = field(default_factory=list)
    """Each is {name: NAME, overrides: [KEY=VALUE]}."""
    tokens: list[float] = field(default_factory=list)
    """Tokens that a run sees, each for every size; rounded to whole steps."""
    learning_rate_factors: list[float] = field(default_factory=lambda: [1.0])
    """Factors on each size's engine.learning_rate. With several, each cell is run with each, and the best counts."""
    warmup_share: float = 0.1
    """Share of each run's steps over which the learning rate rises, in place of train.warmup_steps."""
    seeds: int = 1
    """Seeds of each cell."""
    loss: str = "local"
    """The part of the validation loss that is L. local: InfoNCE of the masked tokens, in nats; its targets are learnt
    too, so that it is no fair measure of short runs. cmsc: the global part, which depends on the contrast batch. Either
    compares only for equal temperatures, negatives and masks; so does the sum, in which penalties are added."""
    predict: list[SizeConfig] = field(default_factory=list)
    """Sizes that are not run but predicted, as in sizes; none: the ratio of the two largest sizes once more."""
    budgets: list[float] = field(default_factory=list)
    """Training FLOPs to be spent best; none: those of the dearest cell, ten and a hundred times as many."""
    resamples: int = 300
    """Bootstrap resamples of the intervals."""
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        refuse_names("sizes and predict", [size.name for size in [*self.sizes, *self.predict]])
        refuse_twice("tokens", self.tokens)
        refuse_twice("learning_rate_factors", self.learning_rate_factors)
        if not (self.pretrain and self.sizes):
            raise InputError("pretrain and sizes: give a config of the pretraining and one size at least")
        if not self.run.dir:
            raise InputError("run.dir is missing; give --run.dir FOLDER")
        for name in ("tokens", "learning_rate_factors", "budgets"):
            if (least := min(getattr(self, name), default=1)) <= 0:
                raise InputError(f"{name} {least:g}: give positive numbers")
        if not 0 <= self.warmup_share < 1:
            raise InputError(f"warmup_share {self.warmup_share:g}: give a share below 1")
        given = [*self.overrides, *(override for size in self.sizes for override in size.overrides)]
        if decided := next((one for one in given if one.partition("=")[0].strip() in _DECIDED), None):
            raise InputError(f"overrides, {decided}: tokens, warmup_share and seeds decide this; leave it out")
        if self.seeds < 1:
            raise InputError(f"seeds {self.seeds}: give 1 or more")
        if self.resamples < 20:
            raise InputError(f"resamples {self.resamples}: give 20 or more")

    def resolved(self, size: SizeConfig) -> PretrainConfig:
        """The pretraining of a size, but for what a cell adds."""
        values = {"data.shards": places(self.shards, self.data_dir)}
        changes = [*self.overrides, *size.overrides]
        return config_of(PretrainConfig, self.pretrain, changes, values, f"sizes, {size.name}")


@dataclass(frozen=True)
class Cell:
    """One run."""

    size: str
    factor: float
    seed: int
    pretraining: PretrainConfig
    tokens_per_step: int
    samples: int  # of a segment

    @property
    def folder(self) -> Path:
        return Path(self.pretraining.run.dir)

    @property
    def parameters(self) -> int:
        """N: those of the encoder. The objective's heads are left out, which end with pretraining."""
        return encoder_parameters(self.pretraining.model)

    @property
    def tokens(self) -> int:
        """D: what the encoder reads, of both segments of each recording, masked or not, as often as they come."""
        return self.pretraining.train.steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """Of the whole training, forward and backward, with the heads."""
        return self.pretraining.train.steps * step_cost(self.pretraining, self.samples)

    def result(self) -> dict[str, Any]:
        """Parts of the validation loss; nothing where it is not done. Raises InputError for what others have made."""
        shards = check_pretraining(self.pretraining, LADDER)
        found = read_result(self.folder / "result.json")
        if found and found.get("data") != shards.identity:
            raise InputError(f"{self.folder}: was pretrained on other data; remove it or take another run.dir")
        return dict(found.get("validation", {}))

    def do(self, ranks: Ranks) -> None:
        """Pretrain, or go on with it, and note the loss, or that there is none: the ladder goes on beyond a run that
        diverges. All ranks call it together."""
        steps = self.pretraining.train.steps
        try:
            if not is_pretrained(self.pretraining) or not validation_at(self.folder, steps):
                pretrain(self.pretraining)
        except Diverged as error:
            log(ranks, str(error))
            progress.at(steps, "")
            leave_run(self.folder)
            first_rank(ranks, lambda: self._note(DIVERGED))
        else:
            first_rank(ranks, lambda: self._note(validation_at(self.folder, steps)))

    def _note(self, validation: dict[str, float | None]) -> None:
        if not validation:
            raise InputError(f"{self.folder / EVENTS}: tells of no validation at the last step; remove the folder")
        data = self.pretraining.data
        found = {"validation": validation, "data": ShardSet.open(data.shards, data.cache).identity}
        write_result(self.folder / "result.json", found)


def validation_at(run: Path, step: int) -> dict[str, float | None]:
    """Parts of the loss on held-out recordings at a step, as the run has written them down; null where not finite."""
    parts: dict[str, float | None] = {}
    for event in read_json_lines(run / EVENTS):
        validated = {key.partition("/")[2]: value for key, value in event.items() if key.startswith("validation/")}
        if event.get("step") == step and validated:
            parts = validated
    return parts


@cache
def encoder_parameters(model: EncoderConfig) -> int:
    """Parameters of an encoder, without allocating any."""
    return sum(parameters(model).values())


def step_cost(config: PretrainConfig, samples: int) -> int:
    """FLOPs of one step over all ranks."""
    rows = config.train.contrast * OBJECTIVES.find(config.objective.name).segments
    return config.train.accumulation * step_flops(config.model, config.objective, rows, samples)


def cells(config: ScalingConfig) -> list[Cell]:
    """All cells, the cheapest first. Raises InputError for what none of them could be run with."""
    found = []
    for size in config.sizes:
        base = config.resolved(size)
        objective = base.objective.name
        if config.loss not in (losses := ("loss", *OBJECTIVES.find(objective).named_losses)):
            raise InputError(f"loss {config.loss!r}: {objective} has {', '.join(losses)}")
        try:
            with torch.device("meta"):
                build_encoder(base.model, base.engine.activation_checkpointing)
        except InputError as error:
            raise InputError(f"sizes, {size.name}: {error}") from error
        samples, per_step = _step_of(base)
        refuse_twice(f"tokens, in steps of {size.name}", [_steps(tokens, per_step) for tokens in config.tokens])
        for tokens in config.tokens:
            steps = _steps(tokens, per_step)
            for factor in config.learning_rate_factors:
                for seed in range(config.seeds):
                    more = "" if factor == 1 else f"-rate{factor:g}"
                    folder = Path(config.run.dir) / "cells" / folder_name(size.name) / f"{tokens:g}{more}-seed{seed}"
                    chosen = replace(
                        base,
                        engine=replace(base.engine, learning_rate=base.engine.learning_rate * factor),
                        train=replace(
                            base.train, steps=steps, warmup_steps=round(config.warmup_share * steps), seed=seed
                        ),
                        run=RunConfig(str(folder)),
                    )
                    found.append(Cell(size.name, factor, seed, chosen, per_step, samples))
    return sorted(found, key=lambda cell: cell.flops)


def _steps(tokens: float, per_step: int) -> int:
    return max(1, round(tokens / per_step))


def _step_of(config: PretrainConfig) -> tuple[int, int]:
    """Samples of a segment, and tokens of a step."""
    samples = round(config.data.segment_s * ShardSet.open(config.data.shards, config.data.cache).rate_hz)
    segments = config.train.global_batch * OBJECTIVES.find(config.objective.name).segments
    return samples, segments * (samples // config.model.patch_samples)


def next_sizes(config: ScalingConfig) -> list[tuple[str, int, float]]:
    """Name, parameters and training FLOPs per token of the sizes that are to be predicted."""
    found = []
    for size in config.predict:
        base = config.resolved(size)
        samples, per_step = _step_of(base)
        found.append((size.name, encoder_parameters(base.model), step_cost(base, samples) / per_step))
    return found


def plan(config: ScalingConfig) -> str:
    """For people: every cell with its cost, which of them are done, and what stands in the way of the others."""
    found = cells(config)
    total = sum(cell.flops for cell in found)
    lines = []
    for number, cell in enumerate(found, 1):
        what = f"{cell.parameters:,} parameters, {cell.tokens:,} tokens in {cell.pretraining.train.steps} steps"
        cost = f"{cell.flops:.2g} FLOPs, {cell.flops / total:.0%}"
        lines.append(f"cell {number}: {_state(cell)}  {cell.size}: {what}, {cost}, {cell.folder}")
    lines.append(f"{len(found)} cells, {total:.3g} FLOPs")
    try:
        _check(found, world_size=1)
    except InputError as error:
        lines.append(f"cannot start yet: {error}")
    return "\n".join(lines)


def _state(cell: Cell) -> str:
    try:
        return "done " if cell.result() else "to do"
    except InputError:
        return "other"  # made from something else: `_check` says from what


def work(config: ScalingConfig, part: tuple[int, int] = (1, 1)) -> str:
    """Do what is not done yet of the cells of ``part`` (number, of how many); returns what to say."""
    number, parts = part
    ranks, mine = start_ranks(), cells(config)[number - 1 :: parts]
    _check(mine, ranks.world_size)
    for done, cell in enumerate(mine, 1):
        log(ranks, f"cell {done} of {len(mine)}: {cell.folder}")
        if not cell.result():
            cell.do(ranks)
    return f"{len(mine)} cells are done"


def _check(mine: list[Cell], world_size: int) -> None:
    """Raises InputError for whatever would come up after hours of work: shapes, data, batches, what lies there."""
    for cell in mine:
        cell.result()
        config = cell.pretraining
        shards = ShardSet.open(config.data.shards, config.data.cache)
        config.train.order(Selection(shards, config.data, "train"), world_size)
        Selection(shards, config.data, "validation").refuse_empty()


def epochs(cell: Cell) -> float:
    """How often a cell reads each training recording. Beyond about four, tokens count for less than new ones
    (Muennighoff et al. 2023)."""
    config = cell.pretraining
    shards = ShardSet.open(config.data.shards, config.data.cache)
    recordings = len(Selection(shards, config.data, "train"))
    return config.train.steps * config.train.global_batch / recordings
