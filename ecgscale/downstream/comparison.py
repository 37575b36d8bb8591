"""What `ecgscale reproduce` compares: methods × tasks × protocols × label fractions × seeds × lead sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ecgscale.config import RunConfig
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.errors import InputError
from ecgscale.lead_names import chosen_leads, lead_set_name
from ecgscale.studies import config_of, places, refuse_names, refuse_twice

RANDOM = "random init"  # the baseline that always stands beside
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
    encoder: str = ""
    """With init, the class of its encoder, package.module:Class, where that is not one of ours."""
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
    label_fractions: list[float] = field(default_factory=list)
    """Label fractions of this task, where they are others than those of all."""


@dataclass(frozen=True)
class ReproduceConfig:
    """What is compared."""

    methods: list[MethodConfig] = field(default_factory=list)
    """Each is {name: NAME, pretrain: CONFIG.yaml, overrides: [KEY=VALUE]} or {name: NAME, init: RUN_OR_EXPORT}. The
    first one is compared with each of the others, and with random weights of its shape."""
    tasks: list[TaskPlan] = field(default_factory=list)
    """Each is {name: NAME, finetune: CONFIG.yaml, shards: [DATASET], overrides: [KEY=VALUE], lead_sets: [SET],
    label_fractions: [SHARE]}; all but the first three may be left out."""
    pretrain_shards: list[str] = field(default_factory=list)
    """Data sets to pretrain on."""
    data_dir: str = ""
    """Folder in which data sets lie that are named by a relative path."""
    protocols: list[Protocol] = field(default_factory=lambda: ["probe", "finetune"])
    """probe, neighbours and finetune, as task.protocol has them. Random weights are fine-tuned from scratch."""
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
        refuse_names("methods", [RANDOM, *(method.name for method in self.methods)])
        refuse_names("tasks", [task.name for task in self.tasks])
        refuse_twice("protocols", self.protocols)
        for method in self.methods:
            if bool(method.pretrain) == bool(method.init):
                raise InputError(f"methods: {method.name} needs either pretrain or init")
        if not 1 <= self.pretrain_seeds <= self.seeds:
            raise InputError(
                f"seeds {self.seeds}, pretrain_seeds {self.pretrain_seeds}: give 1 or more, not more of the latter"
            )
        for task in self.tasks:
            refuse_twice("lead_sets", [lead_set_name(leads) for leads in self.leads_of(task)])
            refuse_twice("label_fractions", self.fractions_of(task))

    def leads_of(self, task: TaskPlan) -> list[tuple[str, ...]]:
        """The lead sets that a task is scored with."""
        return [chosen_leads(leads.split(",")) for leads in task.lead_sets or self.lead_sets]

    def fractions_of(self, task: TaskPlan) -> list[float]:
        """The label fractions that a task is measured with."""
        return task.label_fractions or self.label_fractions

    def encoders(self, method: MethodConfig | None) -> int:
        """How many a method has; random weights (None) are one unit, since each seed draws its own."""
        return 1 if method is None or method.init else self.pretrain_seeds

    def places(self, shards: Sequence[str]) -> list[str]:
        """Data sets where they lie."""
        return places(shards, self.data_dir)

    def task_config(self, task: TaskPlan, values: Mapping[str, Any]) -> FinetuneConfig:
        """The resolved config of a task's fine-tuning, with these values of dotted keys."""
        values = {"data.shards": self.places(task.shards)} | dict(values)
        return config_of(FinetuneConfig, task.finetune, task.overrides, values, f"tasks, {task.name}")
