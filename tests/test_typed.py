"""Does JSON come back as the dataclass that it was made of, and nothing else?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from ecgscale.errors import InputError
from ecgscale.typed import from_tree


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
        ({"name": None}, "name is None"),
        ({"name": ["x"]}, "name is ['x']"),
        ({"share": True}, "share is True"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"note": 1}, "note is 1"),
        ({"sure": 1}, "sure is 1"),
        ({"words": "x"}, "words is 'x'"),
        ({"words": ["x", 1]}, "words[1] is 1"),
        ({"of": {"k": 1}}, "of is {'k': 1}"),
        ({"part": 3}, "part is 3"),
        ({"part": {"size": 1.0}}, "part: size is 1.0"),
        ({"part": {"size": -1}}, "part: size -1: give 0 or more"),
        ({"part": {"sise": 1}}, "part: sise: unknown key"),
        ({"parts": [{"size": "1"}]}, "parts[0]: size is '1'"),
        ({"colour": 1}, "colour: unknown key"),
    ],
)
def test_what_is_of_another_type_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        from_tree(Whole, {"name": "x", "share": 1.0} | change)
    assert str(refused.value) == message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"^share is missing$"):
        from_tree(Whole, {"name": "x"})
