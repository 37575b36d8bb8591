"""`ecgscale reproduce`: does what a comparison needs and is not done yet, then writes one table and one plot.

A unit is one encoder with all that is measured on it, so that units may run side by side, as a job array.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ecgscale.config import PretrainConfig
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream import TASKS, build_task
from ecgscale.downstream.board import show
from ecgscale.downstream.comparison import (
    RANDOM,
    MethodConfig,
    Protocol,
    ReproduceConfig,
    TaskPlan,
)
from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.evaluate import evaluate
from ecgscale.downstream.finetune import fit
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.downstream.method_table import Case, Measured, write_results
from ecgscale.errors import InputError, unreadable
from ecgscale.export import Profile, about_model, described, is_export, read_about, weights_sha256, write_export
from ecgscale.files import write_whole
from ecgscale.lead_names import lead_set_name
from ecgscale.model import EncoderConfig, build_encoder
from ecgscale.pretrain import pretrain
from ecgscale.registry import is_code
from ecgscale.run import first_difference
from ecgscale.run_folder import leave_run, lock_run
from ecgscale.studies import (
    STUDY,
    check_pretraining,
    config_of,
    folder_name,
    is_pretrained,
    read_result,
    write_result,
)
from ecgscale.training.ranks import log, start_ranks

Figures = dict[str, dict[str, dict[str, float | None]]]  # lead set -> name -> value, low, high
Samples = dict[str, Any]  # float64 arrays: LEADS/NAME -> bootstrap samples


@dataclass(frozen=True)
class Leaf:
    """One fine-tuning or probe."""

    task: TaskPlan
    protocol: Protocol
    fraction: float
    seed: int

    @property
    def values(self) -> dict[str, Any]:
        """What it is called by, as keys of its fine-tuning."""
        fraction = float(self.fraction)  # a config may say 1
        return {"task.protocol": self.protocol, "task.label_fraction": fraction, "train.seed": self.seed}


@dataclass(frozen=True)
class Unit:
    """One encoder, or the random weights of all seeds, and what is measured on it."""

    config: ReproduceConfig
    method: MethodConfig | None  # None: random weights
    pretrain_seed: int

    @property
    def name(self) -> str:
        return RANDOM if self.method is None else self.method.name

    @property
    def like(self) -> MethodConfig:
        """The method whose shape and preprocessing it has: for random weights, the first one."""
        return self.method or self.config.methods[0]

    @property
    def model(self) -> Path:
        """The run or export that its leaves begin with, if with new weights."""
        if self.like.init:
            return Path(self.like.init)
        return Path(self.config.run.dir) / "pretrain" / f"{folder_name(self.name)}-seed{self.pretrain_seed}"

    def leaves(self) -> Iterator[Leaf]:
        """Seeds and fractions that change nothing are left out, such as those of a probe of a given encoder."""
        config, encoders = self.config, self.config.encoders(self.method)
        for task in config.tasks:
            kind = TASKS.find(config.task_config(task, {}).task.kind)
            for protocol in config.protocols:
                if protocol not in kind.protocols:
                    continue
                for fraction in [1.0] if protocol in kind.untrained else config.fractions_of(task):
                    drawn = self.method is None or protocol == "finetune" or fraction < 1
                    for seed in range(config.seeds):
                        if seed % encoders == self.pretrain_seed and (drawn or seed < encoders):
                            yield Leaf(task, protocol, fraction, seed)

    def pretraining(self) -> PretrainConfig:
        """The resolved config of the pretraining."""
        values = {
            "data.shards": self.config.places(self.config.pretrain_shards),
            "train.seed": self.pretrain_seed,
            "run.dir": str(self.model),
        }
        method = self.like
        return config_of(PretrainConfig, method.pretrain, method.overrides, values, f"methods, {method.name}")

    def check(self) -> None:
        """Raises InputError where its encoder does not go with the tasks, or with what was done before."""
        pretrained_on = None
        if self.like.init:
            _, profile = described(*read_about(self.model), self.own_encoder)
            rate_hz = profile.rate_hz
        else:
            config = self.pretraining()
            pretrained_on = check_pretraining(config)
            rate_hz = pretrained_on.rate_hz
        for task in self.config.tasks:
            shards = ShardSet.open(self.config.places(task.shards))
            if shards.rate_hz != rate_hz:
                raise InputError(f"{task.name} has {shards.rate_hz:g} Hz, {self.name} takes {rate_hz:g} Hz")
            if pretrained_on is not None:
                _refuse_leak(pretrained_on, shards, task.name)
        if self.method is None or self.prepared():
            for leaf in self.leaves():
                self.figures(leaf)

    def prepare(self) -> None:
        """Pretrain where that is not done yet; for random weights, an export that says their shape."""
        if self.prepared():
            return
        if self.method is not None:
            pretrain(self.pretraining())
            return
        model, profile = self._shape()
        weights = {f"encoder.{name}": tensor for name, tensor in build_encoder(model).state_dict().items()}
        write_export(self.model, weights, about_model(model, profile, step=0))

    def prepared(self) -> bool:
        """Whether there is nothing to pretrain, or it is done."""
        if self.like.init:
            return True
        if self.method is None:
            return is_export(self.model) and described(*read_about(self.model), self.own_encoder) == self._shape()
        return is_pretrained(self.pretraining())

    def _shape(self) -> tuple[EncoderConfig, Profile]:
        """Shape and preprocessing of random weights. Each seed draws its own."""
        if self.like.init:
            return described(*read_about(self.model), self.own_encoder)
        config = self.pretraining()
        rate_hz = ShardSet.open(config.data.shards, config.data.cache).rate_hz
        return config.model, Profile(rate_hz, config.data.segment_s, config.data.normalisation)

    def folder(self, leaf: Leaf) -> Path:
        share = "" if leaf.fraction == 1 else f"-labels{leaf.fraction:g}"
        name = f"{leaf.protocol}{share}-seed{leaf.seed}"
        return Path(self.config.run.dir) / "tasks" / folder_name(leaf.task.name) / folder_name(self.name) / name

    @cached_property
    def own_encoder(self) -> str:
        """The class of the encoder where it is not one of ours."""
        if self.like.init:
            return self.like.encoder
        encoder = self.pretraining().model.encoder
        return encoder if is_code(encoder) else ""

    def leaf_config(self, leaf: Leaf) -> FinetuneConfig:
        values = {
            "init.model": str(self.model),
            "init.encoder": self.own_encoder,
            "init.random": self.method is None,
            "run.dir": str(self.folder(leaf)),
        }
        return self.config.task_config(leaf.task, leaf.values | values)

    @cached_property
    def encoder_identity(self) -> str:
        """Its weights; of random ones, their shape and preprocessing. To be asked for when it is prepared."""
        if self.method is not None:
            return weights_sha256(self.model)
        return sha256(json.dumps([asdict(part) for part in self._shape()], sort_keys=True).encode()).hexdigest()

    def figures(self, leaf: Leaf) -> Figures:
        """What a leaf has found so far. Raises InputError where another config, encoder or data made it."""
        folder = self.folder(leaf)
        made_from = read_result(folder / "made_from.json")
        if not made_from:
            return {}
        config = self.leaf_config(leaf)
        now = self._made_from(config)
        differs = next((name for name in ("encoder", "data") if made_from.get(name) != now[name]), None)
        if differs is None and (other := first_difference(made_from.get("config", {}), config, STUDY)):
            differs = other[0]
        if differs:
            raise InputError(f"{folder}: was made with another {differs}; remove it or take another run.dir")
        return read_result(folder / "result.json")

    def missing(self, leaf: Leaf, figures: Figures) -> list[tuple[str, ...]]:
        """Lead sets that a leaf still has to be scored with."""
        return [leads for leads in self.config.leads_of(leaf.task) if lead_set_name(leads) not in figures]

    def _made_from(self, config: FinetuneConfig) -> dict[str, Any]:
        identity = ShardSet.open(config.data.shards, config.data.cache).identity
        return {"encoder": self.encoder_identity, "data": identity, "config": asdict(config)}

    def measure(self, leaf: Leaf) -> None:
        """Train and score what is not done yet."""
        folder = self.folder(leaf)
        folder.mkdir(parents=True, exist_ok=True)
        lock_run(folder)
        try:
            figures = self.figures(leaf)
            if missing := self.missing(leaf, figures):
                self._score(leaf, figures, missing)
        finally:
            leave_run(folder)

    def _score(self, leaf: Leaf, figures: Figures, missing: list[tuple[str, ...]]) -> None:
        """Score with the ``missing`` lead sets, after training where nothing is ``found`` yet."""
        folder, config = self.folder(leaf), self.leaf_config(leaf)
        if not figures:
            write_result(folder / "made_from.json", self._made_from(config))
            fit(config, start_ranks())
        samples = _read_samples(folder) if figures else {}
        coverages = read_result(folder / "coverage.json") if figures else {}
        encoder, kind = config.init.encoder, config.task.kind
        for scored in evaluate(folder, config.data.shards, "test", missing, encoder=encoder, task=kind):
            report = scored.outcome.report
            name = lead_set_name(scored.leads)
            figures[name] = {figure: asdict(value) for figure, value in report.headline.items()}
            coverages[name] = scored.coverage.to_dict()
            samples |= {f"{name}/{figure}": sample for figure, sample in report.samples.items()}
            show(folder, config.train.steps, [scored])
        buffer = io.BytesIO()
        np.savez(buffer, **samples)
        write_whole(folder / "samples.npz", buffer.getvalue())
        write_result(folder / "coverage.json", coverages)
        write_result(folder / "result.json", figures)


def units(config: ReproduceConfig) -> list[Unit]:
    """All units: random weights first, since they take no pretraining. Raises InputError where there is no leaf."""
    if not config.run.dir:
        raise InputError("run.dir is missing; give --run.dir FOLDER")
    methods = [None, *config.methods]
    every = [Unit(config, method, seed) for method in methods for seed in range(config.encoders(method))]
    if not any(True for unit in every for _ in unit.leaves()):
        protocols = ", ".join(config.protocols)
        raise InputError(f"protocols {protocols}: nothing to measure, since no task has them")
    return every


def plan(config: ReproduceConfig) -> str:
    """For people: every unit with its runs, which of them are done, and what stands in the way of the others."""
    lines, every = [], units(config)
    for number, unit in enumerate(every, 1):
        if not unit.like.init:
            unit.pretraining()
        lines.append(f"unit {number}: {unit.name}, {unit.model}")
        for leaf in unit.leaves():
            unit.leaf_config(leaf)
            lines.append(f"  {_state(unit, leaf)}  {unit.folder(leaf)}")
    try:
        _check(every)
    except InputError as error:
        lines.append(f"cannot start yet: {error}")
    return "\n".join(lines)


def _state(unit: Unit, leaf: Leaf) -> str:
    try:
        return "to do" if unit.missing(leaf, unit.figures(leaf)) else "done "
    except InputError:
        return "other"  # made from something else: `_check` says from what


def work(config: ReproduceConfig, part: tuple[int, int] = (1, 1)) -> str:
    """Do what is not done yet of the units of ``part`` (number, of how many); returns what to say."""
    number, parts = part
    ranks, mine = start_ranks(), units(config)[number - 1 :: parts]
    if ranks.world_size > 1:
        raise InputError("reproduce runs as one process; share it out with --part")
    _check(mine)
    leaves, done = sum(len(list(unit.leaves())) for unit in mine), 0
    for unit in mine:
        unit.prepare()
        for leaf in unit.leaves():
            done += 1
            log(ranks, f"run {done} of {leaves}: {unit.folder(leaf)}")
            unit.measure(leaf)
    return f"{leaves} runs of {len(mine)} encoders are done"


def _check(mine: list[Unit]) -> None:
    """Raises InputError for whatever would come up after hours of work: encoders, data, labels, batches."""
    for unit in mine:
        unit.check()
    checked = set()
    for leaf in (leaf for unit in mine for leaf in unit.leaves()):
        key = (leaf.task.name, leaf.fraction, leaf.seed if leaf.fraction < 1 else 0)
        if (leaf.protocol != "finetune" and "finetune" in mine[0].config.protocols) or key in checked:
            continue
        checked.add(key)
        chosen = mine[0].config.task_config(leaf.task, leaf.values)
        shards = ShardSet.open(chosen.data.shards, chosen.data.cache)
        labelled_R = build_task(chosen.task).label(shards, seed=leaf.seed).labelled_R
        Selection(shards, chosen.data, "train", labelled_R).refuse_empty()
        if leaf.protocol == "finetune":
            chosen.train.order(Selection(shards, chosen.data, "train", labelled_R), 1)


def merge(config: ReproduceConfig) -> str:
    """Write table and plot; returns the table. Raises InputError that names a run which is not finished."""
    measured = []
    for unit in units(config):
        for leaf in unit.leaves():
            folder, figures = unit.folder(leaf), unit.figures(leaf)
            if missing := unit.missing(leaf, figures):
                names = ", ".join(map(lead_set_name, missing))
                raise InputError(f"{folder}: is not finished for leads {names}; run its part first")
            samples, coverages = _read_samples(folder), read_result(folder / "coverage.json")
            for leads in map(lead_set_name, config.leads_of(leaf.task)):
                coverage = Coverage.from_dict(coverages[leads]) if leads in coverages else None
                for name, figure in figures[leads].items():
                    case = Case(leaf.task.name, leaf.protocol, leaf.fraction, leads, name)
                    sample_R = samples[f"{leads}/{name}"]
                    measured.append(Measured(case, unit.name, leaf.seed, figure["value"], sample_R, coverage))
    table = write_results(Path(config.run.dir), measured, config.methods[0].name)
    where = f"table.md, table.csv and plot.png are in {config.run.dir}"
    return f"{table}\n\n{where}\nTensorBoard: tensorboard --logdir {config.run.dir}"


def _refuse_leak(pretrained_on: ShardSet, shards: ShardSet, task: str) -> None:
    """Raises InputError where a test patient is a training patient of the pretraining data."""
    trained, tested = (
        data_set.column("patient")[data_set.column("split") == SPLITS.index(split)]
        for data_set, split in ((pretrained_on, "train"), (shards, "test"))
    )
    both = np.intersect1d(trained, tested)
    if both.size:
        raise InputError(
            f"{task}: {both.size} of its test patients are training patients of pretrain_shards; "
            "ingest both with the same splits"
        )


def _read_samples(folder: Path) -> Samples:
    try:
        # Opened here, since numpy leaves a file open that it cannot read.
        with (folder / "samples.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise unreadable(folder / "samples.npz", f"missing or damaged; remove {folder}", error) from error
