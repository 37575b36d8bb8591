"""Every command and every piece of Python in the README runs as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ecgscale.cli import main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_commands_of_the_readme(tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCKS:
        if language == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line)
            if command == "ecgscale":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of deepspeed, in this process
                    assert main(arguments) == 0, capsys.readouterr().err
            elif command == "ecgscale-launch":
                subprocess.run([sys.executable, "-m", "ecgscale_launch.cli", *arguments], check=True, timeout=300)
            else:
                assert command == "make"
    assert "(1, 96) (1, 312, 96)" in capsys.readouterr().out
    for made in (
        "ecg.png",
        "ecg.npz",
        "pretrain/export/config.json",
        "two/export/config.json",
        "finetune/evaluation-test.json",
    ):
        assert (tmp_path / "runs" / "tour" / made).is_file(), made


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)$", (ROOT / "README.md").read_text(), re.MULTILINE))
def test_make_targets_of_the_readme_exist(target) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_file_tree_of_the_readme_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("```")[1]
    named = re.findall(r"^  (\S+)  ", tree, re.MULTILINE)
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / "ecgscale" / name).exists()]
    assert not missing
    there = {
        path.name
        for path in (ROOT / "ecgscale").iterdir()
        if path.name not in ("__pycache__", "__init__.py", "py.typed")
    }
    assert {name.rstrip("/") for name in named} >= there - {"errors.py"}
