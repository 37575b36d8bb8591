"""The folder of a job, ``RUN/launch``: what lies there, for this user alone, and how it is read and written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ecgscale.errors import InputError, file_error
from ecgscale.run_folder import LAUNCH


class JobFolder:
    """The paths in a job's folder, ``RUN/launch``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = path.parent
        self.job = path / "job.json"  # everything about the job: what the supervisor runs
        self.config = path / "config.yaml"  # what the command is given, all keys of a config; the ranks read it
        self.diff = path / "diff.patch"  # what was not committed, untracked files too
        self.code = path / "code"  # the packages that the job runs
        self.sweep = path / "sweep.json"  # of a sweep: its runs, and what each was given
        self.batch = path / "batch"  # batch script and log
        self.submitted = path / "submitted.json"  # SLURM's number of the job
        self.state = path / "state.json"  # where the job stands
        self.log = path / "supervisor.log"  # what happened, for people
        self.attempts = path / "attempts"  # a folder for each

    @classmethod
    def of(cls, run: Path) -> JobFolder:
        """The job folder of a run folder."""
        return cls(Path(os.path.abspath(run)) / LAUNCH)  # noqa: PTH100 (links stay: the nodes may see others)

    @classmethod
    def of_attempt(cls, attempt: Path) -> JobFolder:
        """The job folder that the folder of an attempt lies in."""
        return cls(attempt.parent.parent)

    def batch_folders(self) -> list[Path]:
        """Where the log of the batch script may be: here, or where earlier versions kept it."""
        return [path for path in (self.batch, self.path / "submitit") if path.is_dir()]

    def attempt(self, number: int) -> Path:
        """The folder of attempt ``number``, from 1."""
        return self.attempts / f"{number:04d}"

    def latest_attempt(self) -> Path | None:
        """The folder of the newest attempt."""
        numbers = [int(path.name) for path in self.attempts.glob("[0-9]*") if path.name.isdecimal()]
        return self.attempt(max(numbers)) if numbers else None


def make_private(folder: JobFolder) -> None:
    """Make RUN and RUN/launch, for this user alone; raises InputError where others can get at it."""
    try:
        folder.run.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder.run, folder.path):
            path.mkdir(mode=0o700, exist_ok=path == folder.run or path.is_dir())
    except FileExistsError as error:
        raise InputError(f"{error.filename}: not a folder; remove it or give another run folder") from error
    except OSError as error:
        raise file_error(error.filename, "cannot make the folder", error) from error
    refuse_shared(folder)


def refuse_shared(folder: JobFolder) -> None:
    """Raises InputError where others can get at a job folder: what lies there is executed."""
    try:
        found = folder.path.lstat()
    except OSError as error:
        raise file_error(folder.path, "cannot read", error) from error
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{folder.path}: not a folder; remove it or give another run folder")
    if found.st_uid != os.geteuid():
        raise InputError(f"{folder.path}: belongs to another user; give another run folder")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise InputError(f"{folder.path}: open to others (mode {mode:04o}); chmod 700 it or give another run folder")
