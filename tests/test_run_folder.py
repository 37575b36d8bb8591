"""Does one file alone know what a run folder holds?"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ecgscale import run_folder
from ecgscale.run_folder import CHECKPOINTS, newest_checkpoint, newest_step
from small_jobs import put_checkpoint

ROOT = Path(__file__).parents[1]
OF_RUNS_ALONE = {
    run_folder.CHECKPOINTS,
    run_folder.EVENTS,
    run_folder.EXPORT,
    run_folder.RECORDINGS,
    run_folder.TEST_REPORT,
}


def parts_of_paths(path: Path) -> set[str]:
    """Texts that a file joins to a path: the right sides of ``folder / "name"``."""
    joined = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.BinOp))
    sides = (node.right for node in joined if isinstance(node.op, ast.Div))
    return {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}


@pytest.mark.parametrize("package", ["ecgscale", "launch/ecgscale_launch"])
def test_names_in_a_run_folder_stand_in_one_file(package: str) -> None:
    used = {path: parts_of_paths(path) & OF_RUNS_ALONE for path in (ROOT / package).rglob("*.py")}
    assert {path: names for path, names in used.items() if names} == {}


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000098", "step-00000099.partial", "step-7", "other"):
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    for step in (3, 12):
        put_checkpoint(tmp_path / CHECKPOINTS, step)
    (tmp_path / CHECKPOINTS / "step-00000050").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step-00000012"
    assert newest_step(tmp_path) == 12
