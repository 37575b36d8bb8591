"""The folder of a job, ``RUN/launch``: where everything lies, and how it is read and written."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecgscale.errors import InputError, MachineError
from ecgscale.files import finite, json_bytes, read_json


@dataclass(frozen=True)
class JobFolder:
    """The paths in a job's folder, ``RUN/launch``."""

    path: Path

    @classmethod
    def of(cls, run: Path) -> JobFolder:
        """The job folder of a run folder."""
        return cls(Path(os.path.abspath(run)) / "launch")  # noqa: PTH100 (links stay: the nodes may see others)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.path.parent

    @property
    def job(self) -> Path:
        """job.json: everything about the submission."""
        return self.path / "job.json"

    @property
    def diff(self) -> Path:
        """What was not committed, untracked files too."""
        return self.path / "diff.patch"

    @property
    def code(self) -> Path:
        """The packages that the job runs."""
        return self.path / "code"

    @property
    def config(self) -> Path:
        """The resolved config of pretrain or finetune, which the job runs from."""
        return self.path / "config.yaml"

    @property
    def cluster(self) -> Path:
        """The resolved cluster config."""
        return self.path / "cluster.yaml"

    @property
    def submitted(self) -> Path:
        """submitted.json: SLURM's number of the job."""
        return self.path / "submitted.json"

    @property
    def state(self) -> Path:
        """state.json: where the job stands."""
        return self.path / "state.json"

    @property
    def log(self) -> Path:
        """supervisor.log: what happened, for people."""
        return self.path / "supervisor.log"

    @property
    def submitit(self) -> Path:
        """submitit's pickles and the batch log."""
        return self.path / "submitit"

    @property
    def attempts(self) -> Path:
        """One folder per attempt."""
        return self.path / "attempts"

    def attempt(self, number: int) -> Path:
        """The folder of attempt ``number``, from 1."""
        return self.attempts / f"{number:04d}"

    def latest_attempt(self) -> Path | None:
        """The folder of the newest attempt."""
        numbers = [int(path.name) for path in self.attempts.glob("[0-9]*") if path.name.isdecimal()]
        return self.attempt(max(numbers)) if numbers else None


def write_json_or_say(path: Path, tree: Any) -> None:
    """Write JSON as far as the disk allows: one that is full or gone must not end what still works.

    It is not flushed: ranks write every few seconds, and nobody reads after a power cut where they stood.
    """
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(json_bytes(finite(tree)))
        partial.replace(path)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr, flush=True)


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """``read_json``, but None where there is no such file."""
    try:
        return read_json(path)
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise


def read_json_now(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where none can be read at the moment."""
    try:
        return read_json_if_there(path)
    except (InputError, MachineError):
        return None


def code_environment(folder: JobFolder, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with which Python imports the job's snapshot, wherever it is started.

    PYTHONSAFEPATH, since ``python -m`` would look first in the current folder: in a clone, at the code of today.
    """
    path = [str(folder.code), *filter(None, [environment.get("PYTHONPATH")])]
    return dict(environment) | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
