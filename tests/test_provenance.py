"""Versions, also where the packages are only on PYTHONPATH."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import ecgscale
from ecgscale.provenance import package_version, versions

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
