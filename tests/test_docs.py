"""README and docs/ are true: commands run, options and keys exist, links lead somewhere, the site builds.

Blocks marked ``sh`` and ``python`` run as they stand there, page after page in one folder. Blocks marked ``text`` show
commands on somebody's own data: their commands and options must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest

from ecgscale.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
IN_ORDER = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("data", "pretraining", "evaluation", "models"))]
PAGES = [*IN_ORDER, *(page for page in sorted(DOCS.glob("*.md")) if page not in IN_ORDER)]
OF_ITS_OWN = {DOCS / "launching.md"}  # tests/launch runs its commands, on a SLURM
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MOST_WORDS = 1200  # of the README


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def test_commands_run(tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            if language == "python":
                exec(block, {})
            if language == "sh" and page not in OF_ITS_OWN:
                for line in block.splitlines():
                    run_line(line, capsys)
    assert "(1, 96) (1, 312, 96)" in capsys.readouterr().out
    for made in (
        "ecg.png",
        "ecg.npz",
        "pretrain/export/config.json",
        "two/export/config.json",
        "finetune/evaluation-test.json",
    ):
        assert (tmp_path / "runs" / "tour" / made).is_file(), made


def run_line(line: str, capsys) -> None:
    command, *arguments = shlex.split(line)
    if command == "ecgscale":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deepspeed, in this process
            assert main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
    elif command == "ecgscale-launch":
        subprocess.run([sys.executable, "-m", "ecgscale_launch.cli", *arguments], check=True, timeout=300)
    else:
        assert command == "make", line


@pytest.mark.parametrize(
    "target",
    sorted(set(re.findall(r"(?:`|^)make ([a-z][\w-]+)", "\n".join(p.read_text() for p in PAGES), re.MULTILINE))),
)
def test_make_targets_exist(target) -> None:
    dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page) -> None:
    unknown = []
    for block in blocks(page, "text", "sh"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for program, command, options in commands_of(line):
                known = options_of(program, command)
                unknown += [f"{program} {command} {option}" for option in options if option not in known]
    assert not unknown


def commands_of(line: str) -> list[tuple[str, str, list[str]]]:
    """(program, command, options) of a line, and of each command that a launch line starts."""
    found = []
    for part in re.split(r"\s--\s", line):
        words = part.split()
        options = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        if words[:1] == ["ecgscale"]:
            command = " ".join(words[1 : 3 if words[1] == "bench" else 2])
            found.append(("ecgscale", command, options))
        elif words[:1] == ["ecgscale-launch"]:
            found.append(("ecgscale-launch", "", options))
        elif found and words:
            found.append(("ecgscale", words[0], options))
    return found


@cache
def options_of(program: str, command: str) -> set[str]:
    module = {"ecgscale": "ecgscale.cli", "ecgscale-launch": "ecgscale_launch.cli"}[program]
    arguments = [sys.executable, "-m", module, *command.split(), "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    shown = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, f"{program} {command}: {shown.stderr}"
    text = shown.stdout
    if program == "ecgscale-launch":
        for watched in ("status", "logs", "cancel", "resume", "doctor"):
            text += subprocess.run([*arguments[:3], watched, "--help"], capture_output=True, text=True).stdout
    common = {"--help", "--debug", "--config", "--init", "--profile"}
    return set(re.findall(r"--[A-Za-z][\w.-]*", text)) | common


def test_links_lead_somewhere() -> None:
    missing = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            place = page.parent / path if path else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                missing.append(f"{page.name}: {target}")
    assert not missing


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_site_builds_without_a_warning(tmp_path) -> None:
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path / "site"),
    ]
    done = subprocess.run([*build, "-d", str(tmp_path / "trees")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "searchindex.js").is_file()


def test_the_readme_is_short_and_its_file_tree_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= MOST_WORDS
    tree = text.split("## Files")[1].split("```")[1]
    named = [name.rstrip(",") for row in re.findall(r"^  (\S.*?)  ", tree, re.MULTILINE) for name in row.split(", ")]
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / "ecgscale" / name).exists()]
    assert not missing
