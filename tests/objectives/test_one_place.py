"""What an objective or an encoder is, its own file says: nobody asks elsewhere for its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ecgscale.model import ENCODERS
from ecgscale.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
# Files that are about one objective: a format of its weights, and the same method written plainly to compare with; and
# closed forms of FLOPs and bytes, until both are measured from the modules.
OF_ONE = {"ecgscale/interop/fairseq.py", "ecgscale/bench/straightforward.py"}
STILL = {"ecgscale/cost.py", "ecgscale/plan/activations.py"}


def modules() -> list[Path]:
    return [path for folder in ("ecgscale", "launch", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


def others(room: str) -> list[Path]:
    return [path for path in modules() if not path.is_relative_to(ROOT / "ecgscale" / room)]


def names_in(path: Path) -> set[str]:
    """Strings in a file's code that are no more than a name."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize(("registry", "room"), [(OBJECTIVES, "objectives"), (ENCODERS, "model")], ids=str)
def test_no_other_room_has_a_name_of_the_registry(registry, room):
    assert len(others(room)) > 100
    for path in others(room):
        assert not names_in(path) & set(registry), path


def test_no_other_room_knows_an_objective_by_its_class():
    classes = {registered.partition(":")[0] for registered in OBJECTIVES._ours.values()}
    known = set()
    for path in others("objectives"):
        nodes = ast.walk(ast.parse(path.read_text()))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        if imported & classes:
            known.add(str(path.relative_to(ROOT)))
    assert known == OF_ONE | STILL
