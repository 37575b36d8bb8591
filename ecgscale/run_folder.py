"""A run folder: the names of what is in it, its checkpoints, and who may write there.

Trainer and launcher both know it by this file, which imports no PyTorch.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import IO

from ecgscale.errors import RankError, naming_file
from ecgscale.files import hold

CONFIG = "config.yaml"  # the resolved config
CHECKPOINTS = "checkpoints"  # a folder for each
EVENTS = "events.jsonl"  # what was measured, a line each
TENSORBOARD = "tensorboard"  # the same, for TensorBoard
EXPORT = "export"  # the trained model
RECORDINGS = "recordings"  # which recordings each step read, where train.log_recordings asks for it
PROFILE = "profile"  # traces of chosen steps
TRAINED_ON = "trained_on.keys"  # which recordings its model has learnt from; of an export too
RUN_ID = "run.id"  # tells its export from one that was put there
TEST_REPORT = "evaluation-test.json"  # the scores of a fine-tuning on its test split
LAUNCH = "launch"  # what ecgscale-launch keeps of the job
FOLDERS = frozenset({CHECKPOINTS, TENSORBOARD, EXPORT, RECORDINGS, PROFILE, LAUNCH})

PARTIAL = ".partial"  # behind the name of a checkpoint that is being written
_WRITER = ".writer"  # locked by the one process that writes in the run folder
_WAIT_S = 15.0  # for the process before, which may just be ending
_locked: dict[Path, IO[str]] = {}


# -- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint after that step."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(checkpoint.name.removeprefix("step-").removesuffix(PARTIAL))


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a run's CHECKPOINTS, oldest first.

    What has not exactly the name that ``checkpoint_name`` gives is not ours, nor is an empty folder: a save gives the
    name to a full one. One that holds something, but not all, is damaged, and who opens it says so.
    """
    return [path for path in _named_as_checkpoints(folder, "") if not _is_empty(path)]


def empty_checkpoints(folder: Path) -> list[Path]:
    """Folders that have a checkpoint's name and nothing in them."""
    return [path for path in _named_as_checkpoints(folder, "") if _is_empty(path)]


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """What saves that were killed have left in a run's CHECKPOINTS, in order of steps."""
    return _named_as_checkpoints(folder, PARTIAL)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest finished checkpoint of a run; None where there is none."""
    finished = checkpoints(run / CHECKPOINTS)
    return finished[-1] if finished else None


def newest_step(run: Path) -> int:
    """The step of the newest finished checkpoint; 0 where there is none."""
    newest = newest_checkpoint(run)
    return 0 if newest is None else step_of(newest)


def _named_as_checkpoints(folder: Path, ending: str) -> list[Path]:
    steps = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(f"step-([0-9]{{8,19}}){re.escape(ending)}", path.name):
            steps[path] = int(match[1])
    ours = [path for path, step in steps.items() if path.name == checkpoint_name(step) + ending and path.is_dir()]
    return sorted(ours, key=step_of)


def _is_empty(folder: Path) -> bool:
    """A folder that cannot be listed is not taken for empty: who opens it says why."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


# -- who writes ------------------------------------------------------------------------------------------------------


def lock_run(run: Path) -> None:
    """Lock the run folder until `leave_run` or the end of this process; RankError where another one holds it."""
    path = run.resolve() / _WRITER
    if path in _locked:
        return
    with naming_file(path, "cannot write"):
        file = path.open("a+")
    try:
        with naming_file(path, "cannot lock"):
            ours = hold(file, _WAIT_S)
        if not ours:
            file.seek(0)
            raise RankError(f"run.dir {run}: {file.read() or 'another process'} trains there; wait for its end")
        with naming_file(path, "cannot write"):
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}")
            file.flush()
    except BaseException:
        file.close()
        raise
    _locked[path] = file


def leave_run(run: Path) -> None:
    """Another process may write into the run folder from now on."""
    if held := _locked.pop(run.resolve() / _WRITER, None):
        held.close()
