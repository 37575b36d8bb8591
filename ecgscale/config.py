"""One dataclass tree per command: YAML file + dotted overrides, unknown keys refused, the resolved tree saved.

The dataclasses stand beside the things that they configure; this file puts them together and reads them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ecgscale import settings
from ecgscale.data.selection import DataConfig
from ecgscale.downstream.tasks import InitConfig, TaskConfig
from ecgscale.errors import InputError
from ecgscale.export import described, read_about
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import PRESETS, SHAPE_FIELDS
from ecgscale.objectives import CODES, ObjectiveConfig
from ecgscale.settings_help import help_text
from ecgscale.training.engine import EngineConfig
from ecgscale.training.loop import TrainConfig

Config = TypeVar("Config")

__all__ = [
    "FinetuneConfig",
    "PretrainConfig",
    "RunConfig",
    "StartConfig",
    "build",
    "dump",
    "help_text",
    "load",
    "read_yaml",
]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = ""
    """Run folder: config.yaml, checkpoints/, tensorboard/, events.jsonl, export/."""


@dataclass(frozen=True)
class StartConfig:
    """What pretraining begins with."""

    model: str = ""
    """Run folder or export whose weights the run begins with; none: random ones. Its shape, codes, segments and
    normalisation are taken where the keys are not given."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything about a pretraining run."""

    data: DataConfig = field(default_factory=DataConfig)
    init: StartConfig = field(default_factory=StartConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything about a fine-tuning run or a linear probe."""

    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load(config_type: type[Config], words: list[str]) -> Config:
    """``--config FILE`` and ``--any.key value`` -> a checked config; later ones win, ``--init`` is ``--init.model``.

    Raises InputError for unknown keys (naming the nearest right one), wrong types and values out of range, with the
    file and line of the key.
    """
    return _resolved(config_type, settings.from_words(config_type, words, _SHORT))


def build(config_type: type[Config], tree: dict[str, Any]) -> Config:
    """A nested dict -> a checked config; ``model.preset`` and ``init.model`` fill in what the tree does not give."""
    return _resolved(config_type, settings.Given(tree))


def read_yaml(path: Path, config_type: type) -> dict[str, Any]:
    """A YAML config as a dict of known keys."""
    given = settings.Given()
    given.put_file(path)
    settings.refuse_unknown(config_type, given)
    return given.tree


def dump(config: Any) -> str:
    """The resolved config as YAML, which ``load`` reads back to the same."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


_SHORT = {"init": "init.model", "profile": "train.profile_steps"}


def _resolved(config_type: type[Config], given: settings.Given) -> Config:
    settings.refuse_unknown(config_type, given)
    if (preset := given.get("model.preset")) is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            place = given.named("model.preset")
            raise InputError(f"{place} {preset!r} is unknown; known are {', '.join(PRESETS)}")
        _fill(given, "model", asdict(PRESETS[preset]))
    if config_type is PretrainConfig and isinstance(given.get("init.model"), str) and given.get("init.model"):
        _begin_with(given, given.get("init.model"))
    return settings.build(config_type, given)


def _fill(given: settings.Given, group: str, values: dict[str, Any]) -> None:
    """Keys of a group that were not given."""
    for name, value in values.items():
        if given.get(f"{group}.{name}") is None:
            given.put(f"{group}.{name}", value, "")


def _begin_with(given: settings.Given, init: str) -> None:
    """Fill in what ``init.model`` says of the model and of its preprocessing.

    Where the run folder holds a run that began with the same model, its config says it: the model is not needed again.
    Raises InputError for a key that contradicts.
    """
    saved = Path(str(given.get("run.dir") or "")) / "config.yaml"
    before = read_yaml(saved, PretrainConfig) if saved.is_file() else {}
    if before.get("init", {}).get("model") == init:
        shape, prepared = before.get("model", {}), before.get("data", {})
        codes = before.get("objective", {})
    else:
        place, about = read_about(Path(init))
        config, profile = described(place, about)
        shape, prepared, codes = asdict(config), asdict(profile), about.get("codes", {})
    prepared = {key: prepared[key] for key in ("segment_s", "normalisation") if key in prepared}
    own = [("model", key, shape) for key in SHAPE_FIELDS] + [("data", key, prepared) for key in prepared]
    for group, key, values in own:
        value = given.get(f"{group}.{key}")
        if value is not None and key in values and value != values[key]:
            raise InputError(
                f"{given.named(f'{group}.{key}')} {value!r}: the model of init.model {init} has {values[key]!r}; leave "
                "the key out" + (" and model.preset too" if group == "model" and given.get("model.preset") else "")
            )
    _fill(given, "model", shape)
    _fill(given, "data", prepared)
    _fill(given, "objective", {key: codes[key] for key in CODES if key in codes})
