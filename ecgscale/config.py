"""One dataclass tree per command: YAML file + dotted overrides, unknown keys refused, the resolved tree saved.

The dataclasses stand beside the things that they configure; this file puts them together and reads them.
"""

from __future__ import annotations

import math
import re
import warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from ecgscale import yaml_text
from ecgscale.data.selection import DataConfig
from ecgscale.downstream.tasks import InitConfig, TaskConfig
from ecgscale.errors import InputError
from ecgscale.export import described, read_about
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import PRESETS, SHAPE_FIELDS
from ecgscale.objectives import CODES, ObjectiveConfig
from ecgscale.run_folder import CONFIG
from ecgscale.training.engine import EngineConfig
from ecgscale.training.loop import TrainConfig

Config = TypeVar("Config")


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


def load(config_type: type[Config], arguments: list[str]) -> Config:
    """``--config FILE`` and ``--any.key value`` -> a checked config; later ones win, ``--init`` is ``--init.model``.

    Raises InputError for unknown keys (naming the nearest right one), wrong types and values out of range.
    """
    tree: dict[str, Any] = {}
    for key, value in _pairs(arguments):
        given = read_yaml(Path(value), config_type) if key == "config" else _nested(key, value, config_type)
        _merge(tree, given)
    return build(config_type, tree)


def overridden(config_type: type[Config], tree: dict[str, Any], arguments: list[str]) -> Config:
    """A nested dict with ``--any.key value`` on top -> a checked config. Raises InputError as ``load`` does."""
    tree = deepcopy(tree)
    for key, value in _pairs(arguments):
        _merge(tree, _nested(key, value, config_type))
    return build(config_type, tree)


def build(config_type: type[Config], tree: dict[str, Any]) -> Config:
    """A nested dict -> a checked config; ``model.preset`` and ``init.model`` fill in what the tree does not give."""
    from jsonargparse import ArgumentError

    _check_values(tree)
    preset = tree.get("model", {}).get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(f"model.preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
        tree = tree | {"model": asdict(PRESETS[preset]) | tree["model"]}
    if config_type is PretrainConfig and isinstance(tree.get("init", {}).get("model", None), str):
        tree = _begun_with(tree)
    tree_type: type = config_type  # of which mypy knows that it is hashable
    parser = _checker(tree_type)
    try:
        built = parser.instantiate(parser.parse_object(tree))
    except ArgumentError as error:
        raise InputError(_tidied(str(error))) from error
    return config_type(**{f.name: built[f.name] for f in fields(config_type)})  # type: ignore[arg-type]


def _begun_with(tree: dict[str, Any]) -> dict[str, Any]:
    """A pretraining tree with what ``init.model`` says of the model and of its preprocessing.

    Where the run folder holds a run that began with the same model, its config says it: the model is not needed again.
    Raises InputError for a key that contradicts.
    """
    model, data, init = tree.get("model", {}), tree.get("data", {}), tree["init"]["model"]
    if not init:
        return tree
    saved = Path(str(tree.get("run", {}).get("dir") or "")) / CONFIG
    before = read_yaml(saved, PretrainConfig) if saved.is_file() else {}
    if before.get("init", {}).get("model") == init:
        shape, prepared = before.get("model", {}), before.get("data", {})
        codes = before.get("objective", {})
    else:
        place, about = read_about(Path(init))
        config, profile = described(place, about)
        shape, prepared, codes = asdict(config), asdict(profile), about.get("codes", {})
    for group, given, own, keys in (
        ("model", model, shape, SHAPE_FIELDS),
        ("data", data, prepared, ("segment_s", "normalisation")),
    ):
        for key in keys:
            if key in given and key in own and given[key] != own[key]:
                raise InputError(
                    f"{group}.{key} {given[key]!r}: the model of init.model {init} has {own[key]!r}; leave the key out"
                    + (" and model.preset too" if group == "model" and "preset" in given else "")
                )
    prepared = {key: prepared[key] for key in ("segment_s", "normalisation") if key in prepared}
    codes = {key: codes[key] for key in CODES if key in codes}
    objective = codes | tree.get("objective", {})
    return tree | {"model": shape | model, "data": prepared | data, "objective": objective}


def help_text(config_type: type, command: str) -> str:
    """Every key with its type, default and meaning."""
    parser = _parser(config_type, prog=f"ecgscale {command}")
    parser.usage = f"ecgscale {command} [--config FILE] [--any.key VALUE ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these keys; later arguments win")
    # jsonargparse offers every group as a file of its own and --list+ to append; ``load`` does not.
    text = re.sub(r"\n +--[\w.]+\.help +Show the help .*", "", parser.format_help())
    text = re.sub(r"\n +--[\w.]+ CONFIG\s+Path\s+to\s+a\s+configuration\s+file\.", "", text)
    return re.sub(r", --\S+\+ \[ITEM,\.\.\.\]", "", text).replace("[ITEM,...]", "A,B")


def _tidied(message: str) -> str:
    """jsonargparse's complaint in one line and without Python's own words for types."""
    message = re.sub(r"a <class '(\w+)'>", r"\1", message.replace("Parser key ", ""))
    return " ".join(re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message).split())


@cache
def _checker(config_type: type) -> Any:
    """The parser that checks values: it takes a tenth of a second to make."""
    return _parser(config_type)


def _parser(config_type: type, prog: str = "ecgscale") -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, description=config_type.__doc__)
        parser.add_class_arguments(config_type)
    return parser


def dump(config: Any) -> str:
    """The resolved config as YAML, which ``load`` reads back to the same."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, config_type: type) -> dict[str, Any]:
    """A YAML config as a dict of known keys."""
    tree = yaml_text.read(path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of keys, this is {type(tree).__name__}")
    _check_keys(tree, config_type, f"{path}: ")
    return tree


_SHORT = {"init": "init.model", "profile": "train.profile_steps"}
_USUAL = {"profile": "3"}  # values of options that need none


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise InputError(f"unexpected argument {key!r}; give --key value")
        short, equals, value = key[2:].partition("=")
        name = _SHORT.get(short, short)
        if not equals:
            given = rest and not rest[0].startswith("--")
            if not given and short not in _USUAL:
                raise InputError(f"--{name}: a value is missing; give --{name} VALUE")
            value = rest.pop(0) if given else _USUAL[short]
        pairs.append((name, value))
    return pairs


def _nested(key: str, text: str, config_type: type) -> dict[str, Any]:
    """``model.width`` and ``"96"`` -> ``{"model": {"width": 96}}``."""
    group, _, entry = key.partition(".")
    if entry and get_type_hints(config_type).get(group) == dict[str, str]:
        return {group: {entry: text}}
    kind: Any = config_type
    value: Any = {}
    _check_keys(_unflatten(key, None), config_type, "")
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    if is_dataclass(kind):
        raise InputError(
            f"--{key}: a group of keys; give one of {', '.join(f'--{key}.{f.name}' for f in fields(kind))}"
        )
    if kind is str:
        value = text
    elif getattr(kind, "__origin__", None) is list and not text.startswith("["):
        value = [item for item in text.split(",") if item]
    else:
        value = yaml_text.parse(text, f"--{key}: cannot read the value {text[:100]!r}")
    tree = _unflatten(key, value)
    if isinstance(value, list):
        _check_keys(tree, config_type, "")
    return tree


def _unflatten(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _check_keys(tree: dict[str, Any], config_type: Any, where: str, prefix: str = "") -> None:
    hints = get_type_hints(config_type)
    for key, value in tree.items():
        if key not in hints:
            near = get_close_matches(str(key), hints, 1) or [
                name for name in _all_keys(config_type) if name.endswith(f".{key}")
            ]
            hint = (
                f"did you mean {prefix}{near[0]}?"
                if near
                else f"known are {', '.join(prefix + name for name in hints)}"
            )
            raise InputError(f"{where}unknown key {prefix}{key}; {hint}")
        if is_dataclass(hints[key]) and value is not None:
            if not isinstance(value, dict):
                raise InputError(f"{where}{prefix}{key}: a group of keys, not the value {value!r}")
            _check_keys(value, hints[key], where, f"{prefix}{key}.")
        for number, (item, kind) in enumerate(_groups_in(value, hints[key])):
            if not isinstance(item, dict):
                raise InputError(f"{where}{prefix}{key}[{number}]: a group of keys, not the value {item!r}")
            _check_keys(item, kind, where, f"{prefix}{key}[{number}].")


def _groups_in(value: Any, hint: Any) -> list[tuple[Any, type]]:
    """The items of a list of groups, each with its type."""
    kinds = [kind for kind in getattr(hint, "__args__", ()) if is_dataclass(kind) and isinstance(kind, type)]
    return [(item, kinds[0]) for item in value] if kinds and isinstance(value, list) else []


def _check_values(tree: dict[str, Any], prefix: str = "") -> None:
    """No key may be left empty, and no number may be NaN or infinite."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _check_values(value, f"{prefix}{key}.")
        elif value is None:
            raise InputError(f"{prefix}{key}: a value is missing; give one or leave the key out")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{prefix}{key} {value}: give a finite number")


def _all_keys(config_type: Any) -> list[str]:
    keys = []
    for name, hint in get_type_hints(config_type).items():
        keys += [f"{name}.{key}" for key in _all_keys(hint)] if is_dataclass(hint) else [name]
    return keys


def _merge(into: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
