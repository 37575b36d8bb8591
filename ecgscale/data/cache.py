"""A folder of files known by their sha256, of bounded size, that all threads, processes and jobs of a node share.

    <folder>/lock                        held while space is given out and while a file gets its name
    <folder>/ab/ab12...                  a complete file; who uses it holds a shared lock on it
    <folder>/ab/ab12....lock             held by the one who fetches that file; goes away with the lock
    <folder>/ab/ab12....<name>.partial   a file being fetched, as large from the start as it will be; its writer holds
                                         a shared lock on it

All locks are flocks, which the kernel drops when their process dies, however it dies. So a file that nobody has locked
may be removed: a complete one when its space is needed, a partial one or a lock file because its process is dead.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ecgscale.errors import InputError

_BLOCK_BYTES = 1 << 20
_POLL_S = 0.1  # between two looks whether space was given back
_FILE = re.compile(r"[0-9a-f]{64}(\.lock|\.\w+\.partial)?")

# Locks that are the opening process's alone. A forked child would keep them after its parent's death.
_unshared: set[IO[bytes]] = set()


def _close_unshared() -> None:
    for file in _unshared:
        file.close()
    _unshared.clear()


os.register_at_fork(after_in_child=_close_unshared)


class NoRoomError(InputError):
    """All of the cache stays in use."""


class Held:
    """A complete file of the cache, which stays there until it is released or the process ends.

    A memory map of it stays good after the release; only its space is then no longer counted.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._owner = os.getpid()

    def release(self) -> None:
        """Let the file go. May be called twice."""
        if self._file.closed:
            return
        if self._owner == os.getpid():  # closing alone would not unlock it while a forked child has it open
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def sha256(self) -> str:
        """Of what the disk gives back."""
        digest = hashlib.sha256()
        self._file.seek(0)
        while block := self._file.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()

    def discard(self) -> None:
        """Take a damaged file out of the cache and let it go. Whoever else has it keeps it until they let it go."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):  # else another took its place
                self.path.unlink()
        self.release()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Partial:
    """A file that is being written, its space reserved; gone on leaving the context unless completed."""

    def __init__(self, path: Path, target: Path, size: int, lock: Path) -> None:
        self._path, self._target, self._lock = path, target, lock
        # Unbuffered, so that closing it writes nothing, which could fail.
        self._file = path.open("x+b", buffering=0)
        _unshared.add(self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self._file.truncate(size)
        except OSError:
            self.__exit__()
            raise

    def rewind(self) -> None:
        self._file.seek(0)

    def write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[self._file.write(rest) :]

    def complete(self) -> Held:
        """Make it the cache's file, which is held already: no eviction comes in between."""
        os.fdatasync(self._file.fileno())  # a node that loses its power must not keep a file of zeros
        with _locked(self._lock):  # else who counts what is there could miss it under either name
            self._path.rename(self._target)
        _unshared.discard(self._file)
        return Held(self._target, self._file)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file in _unshared:
            self._path.unlink(missing_ok=True)
            _unshared.discard(self._file)
            Held(self._path, self._file).release()


class FileCache:
    """The cache's folder. All methods raise OSError where the disk or the folder does not do its part."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def find(self, sha256: str, size: int) -> Held | None:
        """The file, held, where the cache has it. Its name and size are trusted, its content is not read."""
        path = self._path(sha256)
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            held = Held(path, file)
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
            if status.st_nlink and status.st_size == size:
                os.utime(file.fileno())  # eviction takes the file first that was asked for longest ago
                return held
            held.release()
            if status.st_nlink:
                return None
            # evicted between open and lock: look again

    @contextmanager
    def alone(self, sha256: str) -> Iterator[None]:
        """Be the only one on this node who fetches the file; wait while another does."""
        path = self._path(sha256).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with _locked(path) as file:
                if os.fstat(file.fileno()).st_nlink:  # else its holder before us has removed it
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return

    def reserve(self, sha256: str, size: int, patience_s: float) -> Partial:
        """Space for a file, made by evicting what nobody uses; to be called only by who is ``alone`` with it.

        Raises InputError where the file is larger than the cache, NoRoomError where all of it stays in use for
        ``patience_s``.
        """
        if size > self.limit_bytes:
            raise InputError(
                f"data.cache.limit_gb is {self.limit_bytes / 1e9:g}, but one file has {size / 1e9:.3g} GB; raise it"
            )
        target, lock = self._path(sha256), self.folder / "lock"
        target.unlink(missing_ok=True)  # there only if of a wrong size
        deadline = time.monotonic() + patience_s
        while True:
            with _locked(lock):
                used = self._make_room(size)
                if used + size <= self.limit_bytes:
                    return Partial(target.with_suffix(f".{uuid.uuid4().hex}.partial"), target, size, lock)
            if time.monotonic() > deadline:
                raise NoRoomError(
                    f"{self.folder}: {used / 1e9:.3g} GB are in use at once and {size / 1e9:.3g} GB more are needed, "
                    f"data.cache.limit_gb is {self.limit_bytes / 1e9:g}; raise it or lower data.shuffle_window"
                )
            time.sleep(_POLL_S)

    def _make_room(self, size: int) -> int:
        """Remove what dead processes left, then unused files, oldest first, until ``size`` fits; the bytes left."""
        used = 0
        complete: list[tuple[int, int, Path]] = []
        for entry in self._entries():
            path = Path(entry.path)
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if path.suffix and _remove_unused(path):
                continue
            used += status.st_size
            if not path.suffix:
                complete.append((status.st_mtime_ns, status.st_size, path))
        for _, freed, path in sorted(complete):
            if used + size <= self.limit_bytes:
                break
            if _remove_unused(path):
                used -= freed
        return used

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """The cache's own files; whatever else lies in the folder is neither counted nor touched."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            with os.scandir(folder) as entries:
                yield from (entry for entry in entries if _FILE.fullmatch(entry.name))

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody has it locked; whether it is gone."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock file may have been removed and made anew since it was opened; the new one is not ours to remove.
            if os.fstat(file.fileno()).st_nlink:
                path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("ab") as file:
        _unshared.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            _unshared.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)
