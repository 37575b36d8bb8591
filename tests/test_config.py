"""Do configs say what the user meant, or else name the key that is wrong?"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from ecgscale.choices import choices_of, field_types
from ecgscale.config import PretrainConfig, dump, help_text, load
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.errors import InputError
from ecgscale.model.presets import PRESETS
from ecgscale.run import refuse_other_config

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG_FILES = [(path, PretrainConfig) for path in sorted((CONFIGS / "pretrain").rglob("*.yaml"))]
CONFIG_FILES += [(path, FinetuneConfig) for path in sorted((CONFIGS / "finetune").glob("*.yaml"))]


@pytest.fixture
def write(tmp_path):
    def as_arguments(text: str, name: str = "given.yaml") -> list[str]:
        (tmp_path / name).write_text(text)
        return ["--config", str(tmp_path / name)]

    return as_arguments


def refusal(arguments: list[str], config_type: type = PretrainConfig) -> str:
    with pytest.raises(InputError) as refused:
        load(config_type, arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("config_type", [PretrainConfig, FinetuneConfig])
def test_defaults(config_type):
    assert load(config_type, []) == config_type()


def test_later_arguments_win(write):
    first = write("train: {steps: 7, seed: 3}\nmodel: {depth: 5}", "first.yaml")
    second = write("train: {steps: 8}", "second.yaml")
    config = load(PretrainConfig, [*first, "--model.depth", "2", *second, "--data.segment_s=2.5"])
    assert (config.train.steps, config.train.seed, config.model.depth, config.data.segment_s) == (8, 3, 2, 2.5)
    assert load(PretrainConfig, ["--model.depth", "2", *first]).model.depth == 5


@pytest.mark.parametrize(
    ("arguments", "model", "steps"),
    [
        (["--init", "a=b/c"], "a=b/c", 0),
        (["--init=a=b/c"], "a=b/c", 0),
        (["--init.model=a"], "a", 0),
        (["--init=a", "--init", "b", "--profile"], "b", 3),
        (["--profile", "--init=a"], "a", 3),
        (["--profile=5", "--init=a"], "a", 5),
        (["--profile", "5", "--init=a"], "a", 5),
    ],
)
def test_short_options_take_their_value_either_way(arguments, model, steps):
    config = load(FinetuneConfig, arguments)
    assert (config.init.model, config.train.profile_steps) == (model, steps)


def test_a_run_from_before_a_key_goes_on_with_its_default(tmp_path):
    path, config = tmp_path / "config.yaml", load(FinetuneConfig, ["--data.shards", "a", "--task.label", "x"])
    tree = yaml.safe_load(dump(config))
    del tree["data"]["leads"], tree["data"]["cache"], tree["task"]["label_fraction"]
    path.write_text(yaml.safe_dump(tree))
    refuse_other_config(path, config)
    for key, value in (("data.leads", "I,II"), ("task.label_fraction", "0.5")):
        other = load(FinetuneConfig, ["--data.shards", "a", "--task.label", "x", f"--{key}", value])
        with pytest.raises(InputError, match=f"the run has {key} "):
            refuse_other_config(path, other)


@pytest.mark.parametrize("written", ["5e-5", "5.0e-05", "0.00005"])
def test_small_numbers_are_floats(write, written):
    assert load(PretrainConfig, ["--engine.learning_rate", written]).engine.learning_rate == 5e-5
    assert load(PretrainConfig, write(f"engine: {{learning_rate: {written}}}")).engine.learning_rate == 5e-5


def test_values_keep_their_type():
    given = ["--run.dir", "0123", "--model.pre_norm", "true", "--engine.weight_decay", "0", "--engine.zero_stage", "3"]
    config = load(PretrainConfig, given)
    assert (config.run.dir, config.model.pre_norm, config.engine.zero_stage) == ("0123", True, 3)
    assert config.engine.weight_decay == 0


@pytest.mark.parametrize(
    ("written", "expected"), [("a,b c", ["a", "b c"]), ("[a, b]", ["a", "b"]), ("alone", ["alone"]), ("", [])]
)
def test_lists(written, expected):
    assert load(PretrainConfig, ["--data.shards", written]).data.shards == expected


def test_codes_in_a_list_stay_text():
    assert load(FinetuneConfig, ["--task.classes", "164889003,0427"]).task.classes == ["164889003", "0427"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.widht", "did you mean model.width?"),
        ("modle.width", "did you mean model?"),
        ("width", "did you mean model.width?"),
        ("colour", "known are data, init, model, objective, engine, train, run"),
        ("engine.colour", "known are engine.zero_stage, "),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_right_one(write, key, hint):
    said = refusal([f"--{key}", "3"])
    assert f"unknown key {key.split('.')[0] if key.startswith('modle') else key};" in said
    assert hint in said
    group, _, name = key.rpartition(".")
    arguments = write(f"{group}: {{{name}: 3}}" if group else f"{name}: 3")
    assert refusal(arguments) == f"{arguments[1]}, line 1: {said}"


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("model.width", "wide", "int"),
        ("model.width", "96.5", "int"),
        ("model.width", "true", "int"),
        ("engine.learning_rate", "fast", "float"),
        ("model.pre_norm", "perhaps", "bool"),
        ("engine.zero_stage", "4", "one of 0, 1, 2, 3"),
        ("engine.precision", "fp16", "one of 'fp32', 'bf16'"),
        ("train.schedule", "cosin", "'cosine'"),
    ],
)
def test_wrong_types_are_named(write, key, value, right):
    said = refusal([f"--{key}", value])
    assert key in said
    assert value.casefold() in said.casefold()
    assert right in said
    group, name = key.split(".")
    arguments = write(f"{group}:\n  {name}: {value}")
    assert refusal(arguments) == f"{arguments[1]}, line 2: {said.removeprefix('--')}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dropout", "1.0"),
        ("model.depth", "0"),
        ("model.width", "100"),
        ("data.segment_s", "-5.0"),
        ("data.shuffle_window", "0"),
        ("data.leads", "V7"),
        ("train.steps", "0"),
        ("train.seed", "-1"),
        ("train.contrast_batch", "100"),
        ("objective.lead_mask_probability", "1.5"),
        ("objective.augmentation_probability", "1.5"),
        ("objective.augmentations", "power_lines"),
        ("objective.negatives", "0"),
        ("objective.code_width", "255"),
        ("engine.learning_rate", "nan"),
        ("engine.clip_norm", "inf"),
    ],
)
def test_values_out_of_range_are_named(key, value):
    said = refusal([f"--{key}", f".{value}" if value in ("nan", "inf") else value])
    assert key in said
    assert value.removesuffix(".0") in said


def test_a_negative_learning_rate_is_refused():
    assert "engine.learning_rate" in refusal(["--engine.learning_rate", "-0.1"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_the_rest(write, preset):
    assert load(PretrainConfig, ["--model.preset", preset]).model == PRESETS[preset]
    assert load(PretrainConfig, write(f"model: {{preset: {preset}}}")).model == PRESETS[preset]


def test_explicit_keys_win_over_the_preset_in_any_order():
    first = load(PretrainConfig, ["--model.depth", "2", "--model.preset", "tiny"])
    last = load(PretrainConfig, ["--model.preset", "tiny", "--model.depth", "2"])
    assert asdict(first.model) == asdict(last.model) == asdict(PRESETS["tiny"]) | {"depth": 2}


@pytest.mark.parametrize("preset", ["enormous", "3", "[tiny]"])
def test_an_unknown_preset_is_named(write, preset):
    said = refusal(write(f"model: {{preset: {preset}}}"))
    assert "model.preset" in said
    assert preset.strip("[]") in said
    assert f"known are {', '.join(PRESETS)}" in said


@pytest.mark.parametrize(("path", "config_type"), CONFIG_FILES, ids=[p.stem for p, _ in CONFIG_FILES])
def test_every_file_that_comes_along_loads_and_survives_a_round_trip(write, path, config_type):
    config = load(config_type, ["--config", str(path), "--data.shards", "a,b", "--run.dir", "run"])
    tree = yaml.safe_load(path.read_text())
    for group, given in tree.items():
        assert asdict(config)[group] | given == asdict(config)[group], "what the file gives is what comes out"
    assert load(config_type, write(dump(config))) == config


def test_every_folder_of_configs_is_known():
    """Those that are not listed here have tests of their own."""
    others = {path for folder in ("cluster", "reproduce", "scaling") for path in (CONFIGS / folder).glob("*.yaml")}
    assert {path for path, _ in CONFIG_FILES} == set(CONFIGS.rglob("*/*.yaml")) - others
    assert len(CONFIG_FILES) >= 5


def documented_keys(config_type: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with the docstring under each field, read from the source; those of all classes to choose from."""
    hints = field_types(config_type)
    doc: dict[str, str] = {}
    for kind in reversed(config_type.__mro__[:-1]):
        doc |= docs_of_fields(kind)
    for name, hint in hints.items():
        if name in choices_of(config_type):
            choice = choices_of(config_type)[name]
            for kind in map(choice.keys, choice.registry):
                yield from documented_keys(kind, f"{prefix}{name}.")
        elif is_dataclass(hint):
            yield from documented_keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", doc[name]


def docs_of_fields(config_type: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0].body
    return {
        field.target.id: after.value.value
        for field, after in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


@pytest.mark.parametrize("config_type", [PretrainConfig, FinetuneConfig])
def test_help_tells_every_key_with_its_meaning(config_type):
    text = help_text(config_type, "pretrain")
    words = "".join(text.split())  # lines may be broken anywhere, at hyphens too
    keys = list(documented_keys(config_type))
    assert len(keys) > 30
    for key, meaning in keys:
        assert f"\n  --{key} " in text, key
        assert "".join(meaning.split()) in words, key
    assert "--config FILE" in text
    offered = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert offered == {key for key, _ in keys} | {"config"}, "nothing that load would refuse"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.width"], "--model.width: a value is missing"),
        (["--run.dir", "--train.steps", "5"], "--run.dir: a value is missing"),
        (["--engine.learning_rate="], "engine.learning_rate: a value is missing"),
        (["--train.steps", "[1"], "--train.steps: cannot read the value '[1'"),
        (["tiny.yaml"], "unexpected argument 'tiny.yaml'"),
        (
            ["--model", "3"],
            "--model: a group of keys; give one of --model.encoder, --model.patch_samples, ",
        ),
    ],
)
def test_slips_on_the_command_line(arguments, said):
    assert said in refusal(arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b: c", "not YAML"),
        ("model: [", "not YAML"),
        ("\x00", "not YAML"),
        ("", "a config is a mapping of keys"),
        ("- tiny", "a config is a mapping of keys"),
        ("model: tiny", "model: a group of keys, not the value 'tiny'"),
    ],
)
def test_files_that_are_no_config_are_named(write, text, said):
    arguments = write(text)
    assert refusal(arguments).startswith((f"{arguments[1]}: {said}", f"{arguments[1]}, line 1: {said}"))


@pytest.mark.parametrize(
    ("text", "key"), [("train:", "train"), ("model:", "model"), ("model: {width: }", "model.width")]
)
def test_keys_without_a_value_are_named(write, text, key):
    arguments = write(text)
    assert refusal(arguments).startswith(f"{arguments[1]}, line 1: {key}: a value is missing")


def test_unreadable_files_are_named(tmp_path):
    missing, binary = tmp_path / "missing.yaml", tmp_path / "binary.yaml"
    assert str(missing) in refusal(["--config", str(missing)])
    assert str(tmp_path) in refusal(["--config", str(tmp_path)])
    binary.write_bytes(b"\xff\xfe\x00")
    assert str(binary) in refusal(["--config", str(binary)])
