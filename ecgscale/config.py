"""Reads the config of any command, and puts together that of pretraining.

A config is one dataclass tree: YAML file + dotted overrides, unknown keys refused, the resolved tree saved. Its
dataclasses stand beside the things that they configure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from ecgscale import model, objectives, settings, yaml_text
from ecgscale.choices import (
    Choice,
    belonging_elsewhere,
    choices_of,
    current,
    dotted,
    fitting,
    is_saved_before,
    named,
    resolved,
)
from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.export import described, read_about
from ecgscale.model import ENCODERS, EncoderConfig
from ecgscale.objectives import OBJECTIVES, ObjectiveConfig
from ecgscale.objectives.keys import WRITTEN_BEFORE
from ecgscale.run_folder import CONFIG
from ecgscale.settings import help as settings_help
from ecgscale.settings import option
from ecgscale.training.engine_config import EngineConfig
from ecgscale.training.train_config import TrainConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    dir: str = option("", resumable=True)
    """Run folder: config.yaml, checkpoints/, tensorboard/, events.jsonl, export/."""


@dataclass(frozen=True)
class StartConfig:
    """What pretraining begins with."""

    model: str = ""
    """Run folder or export whose weights the run begins with; none: random ones. Its shape, codes, segments and
    normalisation are taken where the keys are not given."""


ENCODER = Choice(EncoderConfig, ENCODERS, model.DEFAULT)
OBJECTIVE = Choice(ObjectiveConfig, OBJECTIVES, objectives.DEFAULT, frozenset(WRITTEN_BEFORE))


@dataclass(frozen=True)
class PretrainConfig:
    """Everything about a pretraining run."""

    data: DataConfig = field(default_factory=DataConfig)
    init: StartConfig = field(default_factory=StartConfig)
    model: EncoderConfig = field(default_factory=ENCODER)
    objective: ObjectiveConfig = field(default_factory=OBJECTIVE)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load(config_type: type[Config], words: list[str], values: Mapping[str, Any] | None = None) -> Config:
    """``--config FILE`` and ``--any.key value`` -> a checked config; later ones win, ``--init`` is ``--init.model``.

    ``values`` of dotted keys win over all words: what a command of ours decides itself.

    Where a word names another objective than a file before it, the file's keys of its own objective are left out.
    Raises InputError for unknown keys (naming the nearest right one), wrong types and values out of range, with the
    file and line of the key.
    """
    given = read_words(config_type, words)
    for key, value in (values or {}).items():
        given.put(key, value, "")
    return _built(config_type, given)


def read_words(config_type: type, words: list[str]) -> settings.Given:
    """What a command line gives of a config, which ``load`` then checks as a whole. Raises InputError as it does."""
    files, names = _names_given(config_type, words)
    in_order, elsewhere = iter(files), partial(belonging_elsewhere, config_type)

    def file(_: Path) -> settings.Given:
        given, names_then = next(in_order)
        given.elsewhere = elsewhere
        if is_saved_before(config_type, given.tree):
            given.tree = current(config_type, given.tree)
        settings.refuse_unknown(resolved(config_type, names_then), given)
        given.tree = fitting(config_type, given.tree, names)
        return given

    return settings.from_words(resolved(config_type, names), words, _SHORT, file, elsewhere)


def _names_given(
    config_type: type, words: list[str]
) -> tuple[list[tuple[settings.Given, dict[str, str]]], dict[str, str]]:
    """The files that are named, each with the classes that are named by then, by group; and those at the end."""
    names: dict[str, str] = {}
    files, groups = [], dotted(config_type)
    for word, next_word in pairwise([*words, ""]):
        key, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else next_word
        if word.startswith("--") and key == "config" and value:
            given = settings.read_file(Path(value))
            names = names | named(config_type, given.tree)
            files.append((given, names))
        elif word.startswith("--") and key in groups:
            names = names | {groups[key]: value}
    return files, names


def build(config_type: type[Config], tree: dict[str, Any]) -> Config:
    """A nested dict -> a checked config; ``model.preset`` and ``init.model`` fill in what the tree does not give."""
    return _built(config_type, settings.Given(tree, partial(belonging_elsewhere, config_type)))


def dump(config: Any) -> str:
    """The resolved config as YAML, which ``load`` reads back to the same."""
    return yaml_text.written(asdict(config))


def help_text(config_type: type, command: str) -> str:
    """Every key with its meaning and default; a key of some of the classes that can be named says of which."""
    kind = resolved(config_type, {})
    more: dict[str, list[tuple[Any, type]]] = {}
    owners: dict[str, str] = {}
    for group, choice in choices_of(config_type).items():
        usual = [member.name for member in fields(choice.keys(choice.usual))]
        others = {member.name: (member, keys) for keys in map(choice.keys, choice.registry) for member in fields(keys)}
        more[group] = [others[name] for name in others if name not in usual]
        for name in others:
            if len(having := choice.owners(name)) < len(choice.registry):
                owners[f"{group}.{name}"] = ", ".join(having)
    return settings_help.help_text(kind, f"ecgscale {command}", more=more, owners=owners)


_SHORT = {"init": "init.model", "profile": "train.profile_steps"}


def _built(config_type: type[Config], given: settings.Given) -> Config:
    kind = resolved(config_type, named(config_type, given.tree))
    settings.refuse_unknown(kind, given)
    if (choice := choices_of(config_type).get("model")) and isinstance(given.get("model"), dict):
        keys: Any = choice.keys(named(config_type, given.tree).get("model", choice.usual))
        _fill(given, "model", keys.filled_in(given.get("model")))
    if config_type is PretrainConfig and isinstance(given.get("init.model"), str) and given.get("init.model"):
        _begin_with(given, given.get("init.model"))
    built: Any = settings.build(resolved(config_type, named(config_type, given.tree)), given)
    values = {member.name: getattr(built, member.name) for member in fields(config_type)}  # type: ignore[arg-type]
    return config_type(**values)


def _fill(given: settings.Given, group: str, values: dict[str, Any]) -> None:
    """Keys of a group that were not given."""
    before = given.get(group, {})
    for name, value in values.items():
        if name not in before:
            given.put(f"{group}.{name}", value, "")


def _begin_with(given: settings.Given, init: str) -> None:
    """Fill in what ``init.model`` says of the model and of its preprocessing.

    Where the run folder holds a run that began with the same model, its config says it: the model is not needed again.
    Raises InputError for a key that contradicts.
    """
    saved = Path(str(given.get("run.dir") or "")) / CONFIG
    before = current(PretrainConfig, settings.read_file(saved).tree) if saved.is_file() else {}
    encoder = given.get("model.encoder", "")
    if before.get("init", {}).get("model") == init:
        shape, prepared = {ENCODER.key: ENCODER.usual} | before.get("model", {}), before.get("data", {})
        ENCODERS.find_read(shape["encoder"], saved, [encoder])
        codes = before.get("objective", {})
    else:
        place, about = read_about(Path(init))
        config, profile = described(place, about, encoder)
        shape, prepared, codes = asdict(config), asdict(profile), about.get("codes", {})
    prepared = {key: prepared[key] for key in ("segment_s", "normalisation") if key in prepared}
    shape_keys = ENCODERS.find(shape["encoder"]).Config.shape_keys()
    own = [("model", key, shape) for key in shape_keys] + [("data", key, prepared) for key in prepared]
    for group, key, values in own:
        value = given.get(f"{group}.{key}")
        if value is not None and key in values and value != values[key]:
            raise InputError(
                f"{given.named(f'{group}.{key}')} {value!r}: the model of init.model {init} has {values[key]!r}; leave "
                "the key out" + (" and model.preset too" if group == "model" and given.get("model.preset") else "")
            )
    _fill(given, "model", shape)
    _fill(given, "data", prepared)
    objective_kind = OBJECTIVES.find(named(PretrainConfig, given.tree).get("objective", OBJECTIVE.usual))
    _fill(given, "objective", {key: codes[key] for key in objective_kind.shape_keys if key in codes})
