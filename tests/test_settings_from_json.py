"""Does JSON come back as the dataclass that it was made of, and nothing else?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from ecgscale.errors import InputError
from ecgscale.settings import from_tree


@dataclass(frozen=True)
class Part:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise InputError(f"size {self.size}: give 0 or more")


@dataclass(frozen=True)
class Whole:
    name: str
    share: float
    kind: Literal["a", "b"] = "a"
    note: str | None = None
    sure: bool = True
    words: list[str] = field(default_factory=list)
    of: dict[str, str] = field(default_factory=dict)
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)
    anything: Any = None


def test_what_was_written_comes_back() -> None:
    whole = Whole("x", 0.5, "b", "n", False, ["y"], {"k": "v"}, Part(3), [Part(4), Part(5)], [1, {"a": None}])
    assert from_tree(Whole, json.loads(json.dumps(asdict(whole)))) == whole
    assert from_tree(Whole, {"name": "x", "share": 1}) == Whole("x", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "name: a value is missing; give one or leave the key out"),
        ({"name": ["x"]}, "name \"['x']\": give text"),
        ({"share": True}, "share 'True': give a number (float)"),
        ({"kind": "c"}, "kind 'c': give one of 'a', 'b'"),
        ({"note": 1}, "note '1': give text"),
        ({"sure": 1}, "sure '1': give true or false (bool)"),
        ({"words": "x"}, "words 'x': give a list of text"),
        ({"words": ["x", 1]}, "words \"['x', 1]\": give a list of text"),
        ({"of": {"k": 1}}, "of \"{'k': 1}\": give names, each with text"),
        ({"part": 3}, "part: a group of keys, not the value 3"),
        ({"part": {"size": 1.0}}, "part.size '1.0': give a whole number (int)"),
        ({"part": {"size": -1}}, "size -1: give 0 or more"),
        ({"part": {"sise": 1}}, "unknown key part.sise; did you mean part.size?"),
        ({"parts": [{"size": "1"}]}, "parts[0].size '1': give a whole number (int)"),
        (
            {"colour": 1},
            "unknown key colour; known are name, share, kind, note, sure, words, of, part, parts, anything",
        ),
    ],
)
def test_what_is_of_another_type_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        from_tree(Whole, {"name": "x", "share": 1.0} | change)
    assert str(refused.value) == message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"^the following arguments are required: --share$"):
        from_tree(Whole, {"name": "x"})
