"""Versions, also where the packages are only on PYTHONPATH, and the state of a clone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import ecgscale
from ecgscale import provenance
from ecgscale.provenance import Clone, commit_of, describe_clone, package_version, versions

ROOT = Path(__file__).parents[1]
WITHOUT_METADATA = """
import json, sys
from importlib import metadata

def absent(package):
    raise metadata.PackageNotFoundError(package)

metadata.version = absent
import torch
from ecgscale.provenance import versions
print(json.dumps(versions(["ecgscale", "torch", "no-such-package"])))
"""


def test_versions_are_those_that_are_installed() -> None:
    assert package_version("torch") == metadata.version("torch")
    assert package_version("no-such-package") is None
    assert versions(["ecgscale"]) == {"python": sys.version.split()[0], "ecgscale": ecgscale.__version__}


def test_a_version_is_known_without_metadata() -> None:
    said = subprocess.run([sys.executable, "-c", WITHOUT_METADATA], capture_output=True, text=True, check=True).stdout
    known = json.loads(said)
    assert known["ecgscale"] == ecgscale.__version__
    assert known["torch"].startswith(metadata.version("torch"))
    assert known.keys() == {"python", "ecgscale", "torch"}


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ecgscale.__version__"}


def test_nobody_else_asks_for_installed_metadata() -> None:
    asking = set()
    for folder in ("ecgscale", "launch", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
                module = getattr(node, "module", None) or ""
                if "importlib.metadata" in {module, *names, *(f"{module}.{name}" for name in names)}:
                    asking.add(path.relative_to(ROOT).as_posix())
    assert asking == {"ecgscale/provenance.py"}


# -- git -------------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *own, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def clone(tmp_path):
    """A repository with one package of one file, not committed."""
    package = tmp_path / "clone" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 1\n")
    git(package.parent, "init", "-q")
    return package


@pytest.fixture
def committed(clone):
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "first")
    return clone


def test_a_clean_clone(committed):
    clone = describe_clone(committed)
    assert clone.commit == git(committed, "rev-parse", "HEAD").strip()
    assert (clone.dirty, clone.diff) == (False, b"")


def test_the_diff_rebuilds_the_working_tree(committed, tmp_path):
    (committed / "__init__.py").write_text("VALUE = 2\n")
    (committed / "staged.py").write_text("x\n")
    git(committed, "add", "staged.py")
    (committed / "binary").write_bytes(bytes(range(256)))
    (committed / "empty").touch()
    (committed / "*$(x) 'ü\n").write_text("hostile\n")
    (committed.parent / "outside the package").write_text("y\n")
    (committed / ".gitignore").write_text("secret\n")
    (committed / "secret").write_text("not shown\n")
    before = git(committed, "status", "--porcelain")
    clone = describe_clone(committed)
    assert clone.dirty
    assert git(committed, "status", "--porcelain") == before, "nothing of the clone is changed"

    git(tmp_path, "clone", "-q", str(committed.parent), "again")
    (tmp_path / "diff.patch").write_bytes(clone.diff)
    git(tmp_path / "again", "apply", str(tmp_path / "diff.patch"))

    def files(root: Path) -> dict[str, bytes]:
        found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        return {str(path): (root / path).read_bytes() for path in found if path.parts[0] != ".git"}

    expected = files(committed.parent)
    assert expected.pop("package/secret")
    assert files(tmp_path / "again") == expected


@pytest.mark.parametrize("added", [False, True])
def test_a_repository_without_commits(clone, added):
    if added:
        git(clone, "add", ".")
    found = describe_clone(clone)
    assert (found.commit, found.dirty) == (None, True)
    assert b"+VALUE = 1" in found.diff


def test_no_repository(tmp_path):
    assert describe_clone(tmp_path) == Clone(None, False, b"")


def test_a_package_that_is_ignored_belongs_to_no_clone(committed):
    installed = committed.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (committed.parent / ".gitignore").write_text(".venv\n")
    assert describe_clone(installed) == Clone(None, False, b"")


def test_no_git(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_clone(committed) == Clone(None, False, b"")


def test_huge_diffs_are_cut_with_a_note(committed, monkeypatch):
    monkeypatch.setattr(provenance, "_DIFF_LIMIT", 2**20)
    (committed / "__init__.py").write_text("VALUE = 2  # long\n" * 100_000)
    (committed / "huge.npy").write_bytes(b"\0" * 2**21)
    diff = describe_clone(committed).diff
    assert len(diff) < 2**20 + 1000
    notes = [line for line in diff.decode().splitlines() if line.startswith("# ")]
    assert notes == [
        "# ecgscale-launch: left out, too large: b'package/huge.npy'",
        "# ecgscale-launch: cut at 1 MB, does not apply",
    ]
    assert diff.endswith(b"# long\n")


def test_a_slow_git_does_not_hold_up_the_submission(committed, monkeypatch):
    monkeypatch.setattr(provenance, "_GIT_LIMIT_S", 0.0)
    describe_clone(committed)


def test_the_surroundings_of_a_hook_do_not_mislead(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert describe_clone(committed).commit is not None


def test_settings_of_the_user_do_not_change_the_diff(committed):
    (committed / "__init__.py").write_text("VALUE = 2\n")
    plain = describe_clone(committed).diff
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false")):
        git(committed, "config", key, value)
    assert describe_clone(committed).diff == plain


def test_a_clone_within_is_left_out_with_a_note(committed):
    inner = committed / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "file").touch()
    (committed / "new.py").write_text("new\n")
    diff = describe_clone(committed).diff
    assert diff.startswith(b"# ecgscale-launch: left out, a clone of its own: b'package/inner/'\n")
    assert b"+new" in diff


def test_the_commit_of_a_package_with_a_plus_where_it_was_changed(committed, tmp_path):
    head = git(committed, "rev-parse", "HEAD").strip()
    assert commit_of(committed) == head
    (committed / "__init__.py").write_text("VALUE = 2\n")
    assert commit_of(committed) == f"{head}+"
    installed = committed.parent / "lib" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert commit_of(installed) is None, "it lies in a clone of something else"
    assert commit_of(tmp_path) is None


@pytest.mark.parametrize(
    "module", ["run_folder", "files", "json_lines", "provenance", "stopping", "progress", "errors", "registry"]
)
def test_the_ground_floor_imports_no_torch(module):
    code = f"import ecgscale.{module}, sys; print(*{{'torch', 'numpy', 'yaml'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
