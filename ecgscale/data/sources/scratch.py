"""Private folders that live as long as the object that made them, also if the process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from ecgscale.errors import file_error

_PREFIX = "ecgscale-scratch-"
_LOCK = "lock"
_GRACE_S = 60.0  # for a process that has made its folder and not locked it yet
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, eq=False)
class Scratch:
    """A folder that only this user may read.

    It is removed together with the object that ``make`` returned, at the latest when that process ends. Copies
    that were pickled into other processes read it and remove nothing.
    """

    path: Path

    @classmethod
    def make(cls, parent: Path | None = None) -> Scratch:
        """A new one below ``parent`` (None: the folder for temporary files, which TMPDIR names).

        What killed processes have left there is removed. Raises InputError where nothing can be made.
        """
        below = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(below)
        try:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=below))
            lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise file_error(below, "no temporary folder can be made there, set TMPDIR to another", error) from error
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = cls(path)
        weakref.finalize(scratch, _remove, path, lock, os.getpid())
        return scratch

    @classmethod
    def make_in_memory(cls) -> Scratch:
        """One whose files stay in memory where the system has a place for such."""
        return cls.make(_MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else None)

    def free_bytes(self) -> int:
        """What still fits."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has inherited the finalizer
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that are gone: their locks are free."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            status = path.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _GRACE_S:
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # it has just gone, or is no folder of ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
