"""What an objective, an encoder, a task or a layout is, its own file says: nobody asks elsewhere for its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ecgscale.data.source_options import LAYOUTS
from ecgscale.downstream import TASKS
from ecgscale.model import ENCODERS
from ecgscale.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
# Files that are about one objective: a format of its weights, and the same method written plainly to compare with.
OF_ONE = {"ecgscale/interop/fairseq.py", "ecgscale/bench/straightforward.py"}


def modules() -> list[Path]:
    return [path for folder in ("ecgscale", "launch", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


def others(room: str) -> list[Path]:
    return [path for path in modules() if not path.is_relative_to(ROOT / "ecgscale" / room)]


def names_in(path: Path) -> set[str]:
    """Strings in a file's code that are no more than a name."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


ROOMS = [(OBJECTIVES, "objectives"), (ENCODERS, "model"), (TASKS, "downstream")]


@pytest.mark.parametrize(("registry", "room"), ROOMS, ids=str)
def test_no_other_room_has_a_name_of_the_registry(registry, room):
    assert len(others(room)) > 100
    for path in others(room):
        assert not names_in(path) & set(registry), path


def test_no_file_of_the_room_asks_which_task_it_is():
    own = {place.partition(":")[0].rpartition(".")[2] for place in TASKS._ours.values()}
    others = [path for path in sorted((ROOT / "ecgscale/downstream").glob("*.py")) if path.stem not in own]
    assert len(others) > 10
    for path in others:
        assert path.stem == "__init__" or not names_in(path) & set(TASKS), path
        assert not any(
            isinstance(node, ast.Compare) and ".kind" in ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
        ), path


def test_no_other_file_knows_a_known_data_set():
    known = set(LAYOUTS) - {"npy", "wfdb"}  # which are names of formats too
    assert len(known) > 3
    assert {path.name for path in modules() if names_in(path) & known} == {"source_options.py"}


def test_no_other_room_knows_an_objective_by_its_class():
    classes = {registered.partition(":")[0] for registered in OBJECTIVES._ours.values()}
    known = set()
    for path in others("objectives"):
        nodes = ast.walk(ast.parse(path.read_text()))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        if imported & classes:
            known.add(str(path.relative_to(ROOT)))
    assert known == OF_ONE
