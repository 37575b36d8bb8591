"""Shards behind ``s3://``, ``gs://`` and ``http(s)://``: fetched through fsspec into a cache folder on the node.

Whatever can go wrong on the way is retried until a file has the size and sha256 that its manifest gives; what cannot
get better (no such file, no permission) fails at once. Reading itself knows nothing of this: it maps a local file.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ecgscale.data.cache import FileCache, Held, NoRoomError, Partial
from ecgscale.data.fetch import FetchError, RemoteFiles
from ecgscale.data.schema import MANIFEST_LIMIT_BYTES
from ecgscale.errors import InputError, MachineError, file_error, naming_file
from ecgscale.settings import option

__all__ = ["CacheConfig", "CacheStats", "Held", "NoRoomError", "NotThere", "OutOfReach", "ShardCache", "Unreadable"]
__all__ += ["check_place", "is_remote", "join"]

T = TypeVar("T")

SCHEMES = ("s3", "gs", "gcs", "http", "https")
_READ_LIMIT_BYTES = MANIFEST_LIMIT_BYTES
_BACKOFF_S = 0.5  # before the second attempt; doubles with each further one
_BACKOFF_LIMIT_S = 30.0


# -- places ----------------------------------------------------------------------------------------------------------


def is_remote(place: str) -> bool:
    """Whether a data set's place is behind one of the schemes that are fetched; anything else is a local folder."""
    scheme, separator, _ = place.partition("://")
    return bool(separator) and scheme in SCHEMES


def check_place(place: str) -> None:
    """Raises InputError for a place that is neither a local folder nor a plain URL of a known scheme."""
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    if is_remote(place):
        address = place.partition("://")[2]
        host = address.partition("/")[0]
        if "@" in host:  # it would stand in every log
            raise InputError(f"a URL of {host.rpartition('@')[2]} holds a password; put it into ~/.netrc instead")
        if not host or re.search(r"[?#\s]|::", address):
            raise InputError(f"{place}: not a plain URL; give for instance s3://bucket/folder")
        return
    scheme = re.match(r"([A-Za-z][\w+.-]*):(//)?", place)
    if scheme and (scheme[2] or scheme[1] in (*SCHEMES, "pipe", "file") or "::" in place):
        raise InputError(f"{place}: not a place that shards are read from; give a local folder or one of {known}")


def join(folder_url: str, name: str) -> str:
    """The URL of a file that a manifest names. Raises InputError where the name leads out of the manifest's folder."""
    parts = name.split("/")
    if not all(re.fullmatch(r"[\w.+=@,~-]+", part) and part.strip(".") for part in parts):
        raise InputError(f"{folder_url}: its manifest names {name!r}, which is no file of that folder; ingest it again")
    return f"{folder_url.rstrip('/')}/{name}"


# -- configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheConfig:
    """Where remote shards are kept on a node, and how they are fetched."""

    folder: str = option("", resumable=True)
    """On a local disk, shared by all jobs of the node; empty: $ECGSCALE_CACHE or ~/.cache/ecgscale."""

    limit_gb: float = option(100.0, resumable=True)
    """What the cache takes of the disk at most, in GB of 1e9 bytes."""

    attempts: int = option(6, resumable=True)
    """Downloads of one file before it counts as unreadable."""

    timeout_s: float = option(30.0, resumable=True)
    """A connection that brings no byte for this long has stalled; also how long to wait for space in the cache."""

    downloads: int = option(4, resumable=True)
    """Files that one process fetches ahead at the same time; what a batch waits for comes besides."""

    def __post_init__(self) -> None:
        for field in ("limit_gb", "timeout_s"):
            value = getattr(self, field)
            if not 0 < value < float("inf"):
                raise InputError(f"data.cache.{field} must be above 0, not {value}")
        for field in ("attempts", "downloads"):
            value = getattr(self, field)
            if value < 1:
                raise InputError(f"data.cache.{field} must be at least 1, not {value}")

    @property
    def place(self) -> Path:
        """The folder that is meant."""
        return Path(self.folder or os.environ.get("ECGSCALE_CACHE") or "~/.cache/ecgscale").expanduser()


@dataclass
class CacheStats:
    """What a process's cache has done since it was opened."""

    hits: int = 0  # files that were there, or that another process was fetching
    downloads: int = 0
    bytes: int = 0  # received, failed attempts included
    retries: int = 0
    damaged: int = 0  # copies on the node's disk that were not what had been written, and were fetched again
    waited_s: float = 0.0  # in hold(), over all threads


# -- the cache -------------------------------------------------------------------------------------------------------


class Unreadable(Exception):  # noqa: N818
    """A remote file could not be read; the message names its URL and the last reason. It is one of these two."""


class NotThere(Unreadable, InputError):  # noqa: N818
    """The server will never give it: no such file, no right to it, or the content of another file."""


class OutOfReach(Unreadable, MachineError):  # noqa: N818
    """The network or the server failed as often as was tried."""


class ShardCache:
    """Remote files as local ones. Safe in threads and after a fork; pickled, it opens anew on the other side."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.stats = CacheStats()
        self._disk = FileCache(config.place, int(config.limit_gb * 1e9))
        self._begin()
        _caches.add(self)

    def __reduce__(self) -> tuple[type[ShardCache], tuple[CacheConfig]]:
        return ShardCache, (self.config,)

    def _begin(self) -> None:
        """What belongs to one process."""
        self._sources: dict[str, RemoteFiles] = {}
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(self.config.downloads)
        self.stopping = threading.Event()  # set: what is being fetched is given up

    def read(self, url: str) -> bytes:
        """The content of a manifest as it is now. Raises Unreadable; InputError for more than 64 MiB."""
        _check_remote(url)

        def download() -> bytes:
            content = bytearray()
            for block in self._blocks(url):
                content += block
                if len(content) > _READ_LIMIT_BYTES:
                    raise InputError(f"{url}: larger than 64 MiB; not a file that is read as a whole")
            return bytes(content)

        return self._persist(url, download)

    def hold(self, url: str, sha256: str, size: int, wait: bool = True) -> Held:
        """The file in the cache, complete and, when fetched now, verified; fetched unless there. Blocks until then.

        Raises Unreadable where it cannot be had, NoRoomError where the cache has no place for it, even after a while,
        or, without ``wait``, at once.
        """
        _check_remote(url)
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):  # it becomes a file name
            raise InputError(f"{url}: its manifest gives the sha256 {sha256!r}, not 64 hexadecimal digits")
        if not (isinstance(size, int) and size > 0):
            raise InputError(f"{url}: its manifest gives {size!r} as its bytes, not a positive number")
        began = time.monotonic()
        try:
            held = self._disk.find(sha256, size)
            if held is None:
                return self._fetch(url, sha256, size, wait)
        except OSError as error:
            fault = file_error(self._disk.folder, "the cache cannot be used", error)
            hint = "free space there, lower data.cache.limit_gb or name another data.cache.folder"
            raise type(fault)(f"{fault}; {hint}") from error
        finally:
            self._count(waited_s=time.monotonic() - began)
        self._count(hits=1)
        return held

    def hold_verified(self, url: str, sha256: str, size: int) -> Held:
        """``hold``, and what the node's disk gives back is held against the sha256: a damaged copy is fetched again.

        Raises MachineError where the new copy is damaged too.
        """
        for _ in range(2):
            held = self.hold(url, sha256, size)
            with naming_file(held.path, "cannot read"):
                if held.sha256() == sha256:
                    return held
                held.discard()
            self._count(damaged=1)
            print(f"ecgscale: {url}: its copy in {self._disk.folder} was damaged; fetched again", file=sys.stderr)
        raise MachineError(
            f"{self._disk.folder}: gives back other bytes than were written to it, of {url}; name another "
            "data.cache.folder"
        )

    def _fetch(self, url: str, sha256: str, size: int, wait: bool) -> Held:
        with self._disk.alone(sha256):
            held = self._disk.find(sha256, size)
            if held is not None:
                self._count(hits=1)
                return held
            # What is fetched ahead takes its turn; what somebody waits for does not.
            turn = nullcontext() if wait else self._slots
            patience_s = self.config.timeout_s if wait else 0.0
            with turn, self._disk.reserve(sha256, size, patience_s) as partial:
                self._persist(url, lambda: self._download(url, sha256, size, partial))
                self._count(downloads=1)
                return partial.complete()

    def _download(self, url: str, sha256: str, size: int, partial: Partial) -> None:
        """One attempt."""
        partial.rewind()
        digest = hashlib.sha256()
        received = 0
        for block in self._blocks(url, size):
            received += len(block)
            if received > size:
                break
            digest.update(block)
            partial.write(block)
        if received != size:
            there = f"more than {size}" if received > size else f"{received} of {size}"
            reason = f"{there} bytes came; is it the file that the manifest names?"
            raise FetchError(reason, other_content=received > size)
        if digest.hexdigest() != sha256:
            raise FetchError("its sha256 differs from the manifest", other_content=True)

    def _blocks(self, url: str, size: int | None = None) -> Iterator[bytes]:
        scheme = url.partition("://")[0]
        with self._lock:
            if scheme not in self._sources:
                self._sources[scheme] = RemoteFiles(scheme, self.config.timeout_s, self.config.downloads)
        for block in self._sources[scheme].blocks(url, size):
            self._check_stopping(url)
            self._count(bytes=len(block))
            yield block

    def _check_stopping(self, url: str) -> None:
        if self.stopping.is_set():
            raise OutOfReach(f"{url}: given up, since its stream was closed")

    def _persist(self, url: str, download: Callable[[], T]) -> T:
        """Repeat a download until it succeeds; raises Unreadable when it has failed often enough."""
        for attempt in range(self.config.attempts):
            if attempt:
                self._count(retries=1)
                # Unseeded: the ranks of a job must not come back all at once.
                pause_s = min(_BACKOFF_LIMIT_S, _BACKOFF_S * 2 ** (attempt - 1))
                self.stopping.wait(pause_s * random.SystemRandom().uniform(0.5, 1.0))
                self._check_stopping(url)
            try:
                return download()
            except FetchError as failed:
                last = failed
                if failed.permanent:
                    raise NotThere(f"{url}: {failed}") from failed
        kind = NotThere if last.other_content else OutOfReach
        raise kind(f"{url}: unreadable after {self.config.attempts} attempts, the last: {last}") from last

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.stats, name, getattr(self.stats, name) + number)


def _check_remote(url: str) -> None:
    check_place(url)
    if not is_remote(url):
        raise InputError(f"{url}: a local path; only URLs are fetched")


_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()
# Never collected: closing a connection waits for a thread, which a fork leaves behind in the parent.
_of_the_parent: list[dict[str, RemoteFiles]] = []


def _begin_anew() -> None:
    for cache in _caches:
        _of_the_parent.append(cache._sources)
        cache._begin()


os.register_at_fork(after_in_child=_begin_anew)
