"""The packages as they are at submission, copied into the job's folder, so that later edits do not reach the job."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ecgscale.errors import InputError
from ecgscale.files import whole_folder

PACKAGES = ("ecgscale", "ecgscale_kernels", "ecgscale_launch")


def package_folders() -> dict[str, Path]:
    """Where the packages are imported from."""
    folders = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(f"{package}: not installed; pip install ecgscale")
        folders[package] = Path(spec.origin).parent
    return folders


def snapshot(sources: Mapping[str, Path], target: Path) -> None:
    """Copy packages; a snapshot from before is replaced when all is there. Raises InputError or MachineError."""
    with whole_folder(target) as fresh:
        for package, source in sources.items():
            _copy(source, fresh / package)


def _copy(source: Path, target: Path) -> None:
    """Content only: an installed package may be read-only, its snapshot must be removable."""
    for folder, folders, files in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        copied = target / Path(folder).relative_to(source)
        copied.mkdir(parents=True)
        for name in files:
            if (Path(folder) / name).is_file():  # an editor's lock is a link to nowhere
                shutil.copyfile(Path(folder) / name, copied / name)


def code_environment(code: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with which Python imports a snapshot, wherever it is started.

    PYTHONSAFEPATH, since ``python -m`` would look first in the current folder: in a clone, at the code of today.
    """
    path = [str(code), *filter(None, [environment.get("PYTHONPATH")])]
    return dict(environment) | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
