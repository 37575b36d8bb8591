"""What commands that do many runs share: names of runs, changes of their configs, and what is done of them already."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ecgscale.config import PretrainConfig, load
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError, file_error
from ecgscale.export import is_export
from ecgscale.files import SEAL, finite, parse_json, seal_holds, sealed, write_json
from ecgscale.objectives import OBJECTIVES
from ecgscale.run import Allowance, refuse_other_run
from ecgscale.run_folder import CHECKPOINTS, EXPORT
from ecgscale.training import checkpoint

# In a study, more steps make another run; where the encoder lies does not matter: its weights are compared.
STUDY = Allowance(strict=frozenset({"train.steps"}), free=frozenset({"init.model"}))
Config = TypeVar("Config")
_FORMAT = {"format": "ecgscale-result/1"}


def config_of(
    config_type: type[Config], file: str, overrides: Sequence[str], values: Mapping[str, Any], named: str
) -> Config:
    """The config of one run: that of a file, changed by a user's ``train.steps=3``, with ``values`` of dotted keys.

    Raises InputError that begins with what the study has ``named`` it.
    """
    changes = [f"--{override.removeprefix('--')}" for override in overrides]
    try:
        return load(config_type, ["--config", file, *changes], values)
    except InputError as error:
        raise InputError(f"{named}: {error}") from error


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


def check_pretraining(config: PretrainConfig, may: Allowance = STUDY) -> ShardSet:
    """The data of a pretraining run. Raises InputError where it cannot start, or where another run lies there."""
    shards, run = ShardSet.open(config.data.shards, config.data.cache), Path(config.run.dir)
    OBJECTIVES.find(config.objective.name).check(config.model, config.objective, config.data, shards.rate_hz)
    refuse_other_run(run, config, may)
    if (done := checkpoint.latest(run / CHECKPOINTS)) and done.state["data"] != shards.identity:
        raise InputError(f"{run}: was pretrained on other data; remove it or take another run.dir")
    return shards


def is_pretrained(config: PretrainConfig) -> bool:
    """Whether a pretraining run has come to its end."""
    run = Path(config.run.dir)
    done = checkpoint.latest(run / CHECKPOINTS)
    return is_export(run / EXPORT) and done is not None and done.step == config.train.steps


def write_result(path: Path, tree: dict[str, Any]) -> None:
    """Write what a study relies on later, with its own hash. A figure that is not finite becomes None."""
    write_json(path, sealed(finite(tree) | _FORMAT))


def read_result(path: Path) -> dict[str, Any]:
    """What ``write_result`` wrote; nothing where there is none. Raises InputError for a damaged one.

    Those of earlier versions have no hash, or NaN, which comes as None too.
    """
    try:
        tree = parse_json(path.read_bytes(), allow_nan=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise file_error(path, "cannot read", error) from error
    except InputError as error:
        raise InputError(f"{path}: damaged, {error}; remove {path.parent}") from error
    marks = {SEAL, *_FORMAT}  # two, so that one flipped bit does not make it one of an earlier version
    if marks & tree.keys() and not (tree.items() >= _FORMAT.items() and seal_holds(tree)):
        raise InputError(f"{path}: damaged; remove {path.parent}")
    return {key: finite(value) for key, value in tree.items() if key not in marks}
