"""YAML that people write: what it says is read, what would be read otherwise than written is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError
from ecgscale.settings import Given
from ecgscale.yaml_text import parse, read
from ecgscale_launch.launch_config import load_cluster

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8))
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


@given(TREES)
def test_what_is_written_is_read(tree: object) -> None:
    text = yaml.safe_dump(tree, allow_unicode=True)
    assert parse(text, "x") == yaml.safe_load(text)


def test_a_plain_merge_and_an_alias_are_read() -> None:
    text = "base: &base {steps: 3, seed: 1}\ntrain: {<<: *base, seed: 2}\nother: *base\n"
    assert parse(text, "x") == yaml.safe_load(text)


def _merges(levels: int, width: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * width)}]}}")
    return "\n".join(lines)


def _laughs(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


HOSTILE = {
    "repeated key": (
        "train:\n  steps: 1\n  seed: 0\n  steps: 2\n",
        "line 4: 'steps' stands there twice, first on line 2",
    ),
    "repeated key in braces": ('train: {steps: 1, "steps": 2}', "line 1: 'steps' stands there twice"),
    "repeated group": (
        "train: {steps: 1}\nmodel: {width: 8}\ntrain: {seed: 1}\n",
        "line 3: 'train' stands there twice",
    ),
    "merges": (_merges(9, 10), "more than 100000 values"),
    "laughs": (_laughs(9, 10), "more than 100000 values"),
    "merges with braces": ("train: {<<: *a}", "not YAML"),
    "deep list": ("[" * 90_000, "line 1: nested more than 32 levels deep"),
    "deep mapping": ("".join(f"{' ' * i}a:\n" for i in range(200)), "nested more than 32 levels deep"),
    "itself": ("train: &a {steps: *a}", "a value that contains itself"),
    "itself in a list": ("train: &a [1, [*a]]", "a value that contains itself"),
    "itself merged": ("train: &a {<<: *a}", "a value that contains itself"),
    "digits": (f"train: {{steps: {'9' * 5000}}}", "Exceeds the limit"),
    "date": ("train: {steps: 2024-13-45}", "month must be in 1..12"),
    "key that is a list": ("{[1]: 2}", "not YAML"),
    "two documents": ("a: 1\n---\na: 2\n", "not YAML"),
    "python object": ("!!python/object/apply:os.system [ls]", "not YAML"),
    "unknown tag": ("a: !x 1", "not YAML"),
    "control character": ("a: \x07", "not YAML"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_text_is_one_line_in_bounded_time(what: str, tmp_path: Path) -> None:
    text, says = HOSTILE[what]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(InputError) as error:
        read(path)
    assert time.process_time() - began < 10  # the bombs took minutes
    assert says in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        read(path)
    path.write_bytes(b"# " + b"x" * (1 << 19))
    with pytest.raises(InputError, match="more than 262144 bytes"):
        read(path)
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "absent.yaml")


def test_commands_and_the_launcher_read_their_files_so(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("train: {steps: 1, steps: 2}")
    with pytest.raises(InputError, match=r"two\.yaml: line 1: 'steps' stands there twice"):
        load(PretrainConfig, ["--config", str(path)])
    path.write_text("nodes: 1\nnodes: 2\n")
    with pytest.raises(InputError, match=r"two\.yaml: line 2: 'nodes' stands there twice"):
        load_cluster(path, Given())
    with pytest.raises(InputError, match=r"--train\.steps: cannot read the value"):
        load(PretrainConfig, ["--train.steps", "9" * 5000])
