"""Names of ours and of the user's own code."""

from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from ecgscale.errors import InputError
from ecgscale.registry import Registry, is_code


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def area(self) -> float:
        return 1.0


SHAPES = Registry("shape.name", f"{__name__}:Shape", {"square": f"{__name__}:Square", "cube": "nowhere.at_all:Cube"})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"from {__name__} import Shape\n"
    text += "class Disc(Shape):\n    def area(self): return 3.14\n"
    text += "class Half(Shape): pass\nclass Other: pass\nnumber = 1\n"
    (tmp_path / "own_shapes.py").write_text(text)
    (tmp_path / "broken_shapes.py").write_text("raise RuntimeError('no\\nluck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_names_of_ours_and_of_the_user(own: None) -> None:
    assert SHAPES.find("square") is Square
    assert SHAPES.find("own_shapes:Disc").__name__ == "Disc"
    assert list(SHAPES) == ["square", "cube"]
    assert "square" in SHAPES
    assert "own_shapes:Disc" not in SHAPES
    assert is_code("a.b:C")
    assert not is_code("square")
    assert not is_code(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sqare", "shape.name 'sqare' is unknown; did you mean 'square'?"),
        ("x", "shape.name 'x' is unknown; known are square, cube"),
        ("nowhere:X", "cannot import nowhere "),
        ("broken_shapes:X", "cannot import broken_shapes (no luck)"),
        ("own_shapes:Disk", "own_shapes has no class Disk; did you mean own_shapes:Disc?"),
        ("own_shapes:number", "own_shapes has no class number"),
        ("own_shapes:Other", "is no Shape; derive it from"),
        ("own_shapes:Half", "does not define area of"),
        (":", "cannot import"),
        ("..own:X", "cannot import"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(own: None, name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        SHAPES.find(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_was_read_as_data_is_not_imported_by_itself(own: None) -> None:
    assert SHAPES.find_read("square", "export/config.json") is Square
    with pytest.raises(InputError, match=r"^export/config.json: shape.name 'own_shapes:Disc' is code that is not ours"):
        SHAPES.find_read("own_shapes:Disc", "export/config.json")
    named = SHAPES.find_read("own_shapes:Disc", "export/config.json", named=["own_shapes:Disc"])
    assert named.__name__ == "Disc"
