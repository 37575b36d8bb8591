"""`ecgscale reproduce`: methods × tasks × protocols × label fractions × seeds × lead sets, in one table and one plot.

A unit is one pretraining with all that is measured on it, so that units may run side by side, as a job array. Whatever
is finished is not done again.

Shape suffixes: S seeds, R bootstrap resamples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ecgscale.config import FinetuneConfig, PretrainConfig, RunConfig, load
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import file_sha256, write_whole
from ecgscale.downstream.board import show
from ecgscale.downstream.evaluate import evaluate
from ecgscale.downstream.finetune import fit
from ecgscale.downstream.results import Case, Measured, write_results
from ecgscale.errors import InputError
from ecgscale.export import Profile, about_model, write_export
from ecgscale.model.encoder import ECGEncoder
from ecgscale.pretrain import pretrain
from ecgscale.record import chosen_leads, lead_set_name
from ecgscale.run import completed, flat, leave_run, refuse_other_config
from ecgscale.training.ranks import log, start_ranks

RANDOM = "random init"  # the baseline that always stands beside: probed, and trained from scratch
Protocol = Literal["probe", "neighbours", "finetune"]


@dataclass(frozen=True)
class MethodConfig:
    """A way to come by an encoder."""

    name: str
    """As the table names it."""
    pretrain: str = ""
    """YAML config of its pretraining; or else"""
    init: str = ""
    """a run or export that is there already, such as an imported model."""
    overrides: list[str] = field(default_factory=list)
    """Changes of the pretraining config, such as objective.name=cmsc."""


@dataclass(frozen=True)
class TaskPlan:
    """A downstream task."""

    name: str
    """As the table names it."""
    finetune: str
    """YAML config of its fine-tuning."""
    shards: list[str] = field(default_factory=list)
    """Labelled data sets."""
    overrides: list[str] = field(default_factory=list)
    """Changes of the config, such as train.steps=1000."""
    lead_sets: list[str] = field(default_factory=list)
    """Leads that this task is scored with, where they are others than those of all."""


@dataclass(frozen=True)
class ReproduceConfig:
    """What is compared."""

    methods: list[MethodConfig] = field(default_factory=list)
    """The first one is compared with each of the others, and with random weights of its shape."""
    tasks: list[TaskPlan] = field(default_factory=list)
    """Downstream tasks."""
    pretrain_shards: list[str] = field(default_factory=list)
    """Data sets to pretrain on."""
    data_dir: str = ""
    """Folder in which data sets lie that are named by a relative path."""
    protocols: list[Protocol] = field(default_factory=lambda: ["probe", "finetune"])
    """probe, neighbours and finetune, as task.protocol has them."""
    lead_sets: list[str] = field(default_factory=lambda: ["12"])
    """Leads that models are scored with: 12, 6, 4, 3, 2, 1, or a list such as I,II,V5."""
    label_fractions: list[float] = field(default_factory=lambda: [1.0])
    """Shares of the labelled training patients."""
    seeds: int = 3
    """Seeds of fine-tuning, of random weights and of label fractions."""
    pretrain_seeds: int = 1
    """Seeds of pretraining; the seeds of fine-tuning are shared out over them."""
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not (self.methods and self.tasks):
            raise InputError("methods and tasks: give one of each at least")
        names = [RANDOM, *(method.name for method in self.methods)]
        for kind, listed in (("methods", names), ("tasks", [task.name for task in self.tasks])):
            if again := next((name for name in listed if listed.count(name) > 1), None):
                raise InputError(f"{kind}: two are called {again!r}")
            for name in listed:
                if not name or set(name) & set("/\\|\n") or name.startswith("."):
                    raise InputError(f"{kind}: {name!r} cannot name a folder and a row of a table")
        for method in self.methods:
            if bool(method.pretrain) == bool(method.init):
                raise InputError(f"methods: {method.name} needs either pretrain or init")
        if not 1 <= self.pretrain_seeds <= self.seeds:
            raise InputError(
                f"seeds {self.seeds}, pretrain_seeds {self.pretrain_seeds}: give 1 or more, not more of the latter"
            )
        for task in self.tasks:
            self.leads_of(task)

    def leads_of(self, task: TaskPlan) -> list[tuple[str, ...]]:
        """The lead sets that a task is scored with."""
        return [chosen_leads(leads.split(",")) for leads in task.lead_sets or self.lead_sets]

    def encoders(self, method: MethodConfig | None) -> int:
        """How many a method has; random weights are one unit, since each seed draws its own."""
        return 1 if method is None or method.init else self.pretrain_seeds

    def places(self, shards: Sequence[str]) -> list[str]:
        """Data sets where they lie."""
        return [place if "://" in place else str(Path(self.data_dir) / place) for place in shards]


@dataclass(frozen=True)
class Leaf:
    """One fine-tuning or probe."""

    task: TaskPlan
    protocol: Protocol
    fraction: float
    seed: int


@dataclass(frozen=True)
class Unit:
    """One pretraining, or the random weights of all seeds, and what is measured on it."""

    config: ReproduceConfig
    method: MethodConfig | None  # None: random weights
    pretrain_seed: int

    @property
    def name(self) -> str:
        return RANDOM if self.method is None else self.method.name

    @property
    def root(self) -> Path:
        return Path(self.config.run.dir)

    def leaves(self) -> Iterator[Leaf]:
        """Seeds that change nothing are left out: those of a probe on a given encoder with all labels."""
        config = self.config
        encoders = config.encoders(self.method)
        for task in config.tasks:
            for protocol in config.protocols:
                if protocol == "neighbours" and self.task_config(task).task.kind == "identification":
                    continue
                for fraction in config.label_fractions:
                    drawn = self.method is None or protocol == "finetune" or fraction < 1
                    for seed in range(config.seeds):
                        if seed % encoders == self.pretrain_seed and (drawn or seed < encoders):
                            yield Leaf(task, protocol, fraction, seed)

    @property
    def like(self) -> MethodConfig:
        """The method whose shape and preprocessing it has: for random weights, the first one."""
        return self.method or self.config.methods[0]

    @property
    def model(self) -> Path:
        """The run or export that its leaves begin with, if with new weights."""
        if self.like.init:
            return Path(self.like.init)
        return self.root / "pretrain" / f"{_folder_name(self.name)}-seed{self.pretrain_seed}"

    def pretraining(self) -> PretrainConfig:
        """The resolved config of the pretraining."""
        given = ["--config", self.like.pretrain, *_options(self.like.overrides)]
        given += ["--data.shards", ",".join(self.config.places(self.config.pretrain_shards))]
        return load(PretrainConfig, [*given, "--train.seed", str(self.pretrain_seed), "--run.dir", str(self.model)])

    def prepare(self) -> None:
        """Pretrain where that is not done yet."""
        if self.like.init:
            return
        config = self.pretraining()
        if self.method is None:
            self._write_untrained(config)
            return
        refuse_other_config(self.model / "config.yaml", config)
        if _step(self.model / "export") < config.train.steps:
            pretrain(config)

    def _write_untrained(self, config: PretrainConfig) -> None:
        """An export for its shape and preprocessing. Its weights are not used: each seed draws its own."""
        rate_hz = ShardSet.open(config.data.shards, config.data.cache).rate_hz
        about = about_model(config.model, Profile(rate_hz, config.data.segment_s, config.data.normalisation))
        weights = {f"encoder.{name}": tensor for name, tensor in ECGEncoder(config.model).state_dict().items()}
        write_export(self.model, weights, about | {"step": 0})

    def task_config(self, task: TaskPlan, *more: str) -> FinetuneConfig:
        given = ["--config", task.finetune, *_options(task.overrides)]
        given += ["--data.shards", ",".join(self.config.places(task.shards))]
        return load(FinetuneConfig, [*given, *more])

    def folder(self, leaf: Leaf) -> Path:
        share = "" if leaf.fraction == 1 else f"-labels{leaf.fraction:g}"
        name = f"{leaf.protocol}{share}-seed{leaf.seed}"
        return self.root / "tasks" / _folder_name(leaf.task.name) / _folder_name(self.name) / name

    def leaf_config(self, leaf: Leaf) -> FinetuneConfig:
        return self.task_config(
            leaf.task,
            *("--init.model", str(self.model)),
            *("--init.random", str(self.method is None).lower()),
            *("--task.protocol", leaf.protocol),
            *("--task.label_fraction", str(leaf.fraction)),
            *("--train.seed", str(leaf.seed)),
            *("--run.dir", str(self.folder(leaf))),
        )

    def measure(self, leaf: Leaf) -> None:
        """Train and score what is not done yet; raises InputError where another config, model or data made it."""
        config, result = self.leaf_config(leaf), Result(self.folder(leaf))
        made_from = {
            "model": "" if self.method is None else file_sha256(_weights(self.model)),
            "data": ShardSet.open(config.data.shards, config.data.cache).identity,
            "config": asdict(config),
        }
        found = result.read(made_from, config)
        missing = [leads for leads in self.config.leads_of(leaf.task) if lead_set_name(leads) not in found]
        if not missing:
            return
        run = self.folder(leaf)
        if not found:
            fit(config, start_ranks())
        scored = evaluate(run, config.data.shards, "test", missing)
        show(run, config.train.steps, scored)
        figures = {lead_set_name(one.leads): {k: asdict(v) for k, v in one.report.headline.items()} for one in scored}
        samples = {
            f"{lead_set_name(one.leads)}/{name}": sample
            for one in scored
            for name, sample in one.report.samples.items()
        }
        result.write(made_from, found | figures, samples)
        leave_run(run)


class Result:
    """What a leaf has found, in its run folder: result.json and the bootstrap samples in samples.npz."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "result.json"

    def read(self, made_from: dict[str, Any] | None = None, config: FinetuneConfig | None = None) -> dict[str, Any]:
        """Figures by lead set; nothing where it is not done. With ``made_from``, InputError where it differs."""
        if not self.path.exists():
            return {}
        try:
            finished: dict[str, Any] = json.loads(self.path.read_bytes())
            before, figures = finished["made_from"], finished["figures"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{self.path}: damaged; remove {self.run}") from error
        if made_from is not None:
            same = before | {"config": completed(before["config"], config)}
            if same != made_from | {"config": flat(made_from["config"])}:
                raise InputError(
                    f"{self.run}: was made with another config, model or data; remove it or take another run.dir"
                )
        return dict(figures)

    def samples(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """``LEADS/FIGURE`` -> (R,)."""
        path = self.run / "samples.npz"
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def write(self, made_from: dict[str, Any], figures: dict[str, Any], samples: dict[str, Any]) -> None:
        import io

        buffer = io.BytesIO()
        np.savez(buffer, **self.samples() | samples)
        write_whole(self.run / "samples.npz", buffer.getvalue())
        write_whole(self.path, json.dumps({"made_from": made_from, "figures": figures}, indent=1).encode())


def units(config: ReproduceConfig) -> list[Unit]:
    """All units: random weights first, since they take no pretraining."""
    methods = [None, *config.methods]
    return [Unit(config, method, seed) for method in methods for seed in range(config.encoders(method))]


def _checked(found: list[Unit]) -> list[Unit]:
    """Raises InputError for what is wrong with any of their configs, before hours of work."""
    for unit in found:
        if not unit.config.run.dir:
            raise InputError("run.dir is missing; give --run.dir FOLDER")
        if unit.method is not None and unit.method.pretrain:
            unit.pretraining()
        for leaf in unit.leaves():
            unit.leaf_config(leaf)
    return found


def plan(config: ReproduceConfig) -> str:
    """For people: every unit with its runs, and which of them are done."""
    lines = []
    for number, unit in enumerate(_checked(units(config)), 1):
        lines.append(f"unit {number}: {unit.name}, {unit.model}")
        for leaf in unit.leaves():
            folder = unit.folder(leaf)
            lines.append(f"  {'done' if Result(folder).read() else 'to do':<6} {folder}")
    return "\n".join(lines)


def work(config: ReproduceConfig, part: tuple[int, int] = (1, 1)) -> str:
    """Do what is not done yet of the units of ``part`` (number, of how many); returns what to say."""
    number, parts = part
    ranks, mine = start_ranks(), _checked(units(config))[number - 1 :: parts]
    if ranks.world_size > 1:
        raise InputError("reproduce runs as one process; share it out with --part")
    leaves, done = sum(len(list(unit.leaves())) for unit in mine), 0
    for unit in mine:
        unit.prepare()
        for leaf in unit.leaves():
            done += 1
            log(ranks, f"run {done} of {leaves}: {unit.folder(leaf)}")
            unit.measure(leaf)
    return f"{leaves} runs of {len(mine)} encoders are done"


def merge(config: ReproduceConfig) -> str:
    """Write table and plot; returns the table. Raises InputError that names a run which is not finished."""
    measured = []
    for unit in units(config):
        for leaf in unit.leaves():
            result = Result(unit.folder(leaf))
            found, samples = result.read(), result.samples()
            for leads in map(lead_set_name, config.leads_of(leaf.task)):
                if leads not in found:
                    raise InputError(f"{result.run}: is not finished for leads {leads}; run its part first")
                for name, figure in found[leads].items():
                    case = Case(leaf.task.name, leaf.protocol, leaf.fraction, leads, name)
                    sample_R = samples[f"{leads}/{name}"]
                    measured.append(Measured(case, unit.name, leaf.seed, figure["value"], sample_R))
    table = write_results(Path(config.run.dir), measured, config.methods[0].name)
    where = f"table.md, table.csv and plot.png are in {config.run.dir}"
    return f"{table}\n\n{where}\nTensorBoard: tensorboard --logdir {config.run.dir}"


def _options(overrides: Sequence[str]) -> list[str]:
    return [f"--{override.removeprefix('--')}" for override in overrides]


def _folder_name(name: str) -> str:
    return name.replace(" ", "-")


def _weights(model: Path) -> Path:
    return next((p for p in (model / "model.safetensors", model / "export" / "model.safetensors") if p.exists()), model)


def _step(export: Path) -> int:
    try:
        return int(json.loads((export / "config.json").read_bytes())["step"])
    except (OSError, ValueError, KeyError):
        return -1
