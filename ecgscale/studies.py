"""What commands that do many runs share: names of runs, changes of their configs, and what is done of them already."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ecgscale.config import PretrainConfig
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError
from ecgscale.export import is_export
from ecgscale.objectives import objective_named
from ecgscale.run import MAY_CHANGE, refuse_other_run
from ecgscale.training import checkpoint

# In a study, more steps make another run; where the encoder lies does not matter: its weights are compared.
STUDY_MAY_CHANGE = MAY_CHANGE - {"train.steps"} | {"init.model"}


def options_of(overrides: Sequence[str]) -> list[str]:
    """``train.steps=3`` -> ``--train.steps=3``."""
    return [f"--{override.removeprefix('--')}" for override in overrides]


def places(shards: Sequence[str], data_dir: str) -> list[str]:
    """Data sets where they lie: relative paths are below ``data_dir``."""
    return [place if "://" in place else str(Path(data_dir) / place) for place in shards]


def folder_name(name: str) -> str:
    """A name as part of a path."""
    return name.replace(" ", "-")


def refuse_names(kind: str, names: Sequence[str]) -> None:
    """Raises InputError for names that are given twice or cannot name a folder."""
    refuse_twice(kind, map(folder_name, names))
    for name in names:
        if not name or set(name) & set("/\\|\n") or name.startswith("."):
            raise InputError(f"{kind}: {name!r} cannot name a folder and a row of a table")


def refuse_twice(kind: str, given: Iterable[Hashable]) -> None:
    """Raises InputError for none, and for a value that is there twice."""
    values = list(given)
    if again := next((value for value in values if values.count(value) > 1), None):
        raise InputError(f"{kind}: {again} is given twice")
    if not values:
        raise InputError(f"{kind}: give one at least")


def check_pretraining(config: PretrainConfig, may_change: Collection[str] = STUDY_MAY_CHANGE) -> ShardSet:
    """The data of a pretraining run. Raises InputError where it cannot start, or where another run lies there."""
    shards, run = ShardSet.open(config.data.shards, config.data.cache), Path(config.run.dir)
    objective_named(config.objective.name).check(config.model, config.objective, config.data, shards.rate_hz)
    refuse_other_run(run, config, may_change)
    if (done := checkpoint.latest(run / "checkpoints")) and done.state["data"] != shards.identity:
        raise InputError(f"{run}: was pretrained on other data; remove it or take another run.dir")
    return shards


def is_pretrained(config: PretrainConfig) -> bool:
    """Whether a pretraining run has come to its end."""
    run = Path(config.run.dir)
    done = checkpoint.latest(run / "checkpoints")
    return is_export(run / "export") and done is not None and done.step == config.train.steps


def read_json(path: Path) -> dict[str, Any]:
    """An object that was written whole; nothing where there is none. Raises InputError for a damaged one."""
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged; remove {path.parent}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: damaged; remove {path.parent}")
    return tree
