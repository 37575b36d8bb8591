"""What `ecgscale finetune` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from ecgscale.choices import Choice
from ecgscale.config import RunConfig
from ecgscale.data.selection import DataConfig
from ecgscale.downstream import DEFAULT, TASKS
from ecgscale.downstream.task import WRITTEN_BEFORE, TaskConfig
from ecgscale.training.engine_config import EngineConfig
from ecgscale.training.train_config import TrainConfig

TASK = Choice(TaskConfig, TASKS, DEFAULT, frozenset(WRITTEN_BEFORE))


@dataclass(frozen=True)
class InitConfig:
    """What fine-tuning begins with."""

    model: str = ""
    """Run folder or export folder of the pretrained model."""
    encoder: str = ""
    """The class of its encoder, package.module:Class, where that is not one of ours: a model's own word imports
    nothing."""
    random: bool = False
    """Keep the model's shape and preprocessing but begin with new weights: the baseline."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything about a fine-tuning run or a linear probe."""

    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    task: TaskConfig = field(default_factory=TASK)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
