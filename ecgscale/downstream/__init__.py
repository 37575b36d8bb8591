"""Downstream tasks: what a model is fine-tuned for, or probed, and scored by.

To add one: a file with a subclass of Task, its ``Config`` in it, and its name here. One of your own needs no name here:
``task.kind: package.module:Class``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ecgscale.registry import Registry

if TYPE_CHECKING:
    from ecgscale.downstream.task import Task, TaskConfig

__all__ = ["DEFAULT", "TASKS", "build_task", "task_config"]


TASKS: Registry[Task] = Registry(
    "task.kind",
    "ecgscale.downstream.task:Task",
    {
        "multilabel": "ecgscale.downstream.classification:MultiLabel",
        "singlelabel": "ecgscale.downstream.classification:SingleLabel",
        "identification": "ecgscale.downstream.identification_task:IdentificationTask",
    },
    by="evaluate --task NAME",
)
DEFAULT = "multilabel"


def task_config(kind: str = DEFAULT, **keys: Any) -> TaskConfig:
    """The config of a named task. Raises InputError for an unknown one and for values out of range."""
    return TASKS.find(kind).Config(kind=kind, **keys)


def build_task(config: TaskConfig) -> Task:
    """The task that ``config.kind`` names. Raises InputError where it has not the protocol."""
    return TASKS.find(config.kind)(config)
