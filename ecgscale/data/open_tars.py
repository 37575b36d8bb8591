"""Shards mapped into memory: fetched where they are remote, closed when too many are open."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecgscale.data.data_set import Shard
from ecgscale.data.payload import Bytes
from ecgscale.data.remote import Held, NoRoomError, ShardCache, Unreadable, is_remote
from ecgscale.errors import InputError, MachineError, file_error

_OPEN_TARS = 64  # that stay mapped beside those in use
_HELD_TARS = 4  # the same for remote ones, which cannot be evicted meanwhile


class UnreadableShardError(Exception):
    """A shard that cannot be fetched or opened. It is one of these two."""

    def __init__(self, shard: int, message: str) -> None:
        super().__init__(message)
        self.shard = shard


class MissingShardError(UnreadableShardError, InputError):
    """It is not there, or not what the manifest names."""


class LostShardError(UnreadableShardError, MachineError):
    """The disk or the network does not give it."""


class OpenTars:
    """Mapped tars: those to keep, and the last few others. Safe under threads."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache) -> None:
        self._shards, self.cache = shards, cache
        self.open: dict[int, Bytes] = {}  # in order of opening
        self._held: dict[int, Held] = {}
        weakref.finalize(self, _release_all, self._held)
        self._kept: frozenset[int] = frozenset()
        self._lingering: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._sound: set[int] = set()  # open remote shards whose copy on this node was held against its sha256
        self._mending = threading.Lock()

    def bytes_of(self, shard: int) -> Bytes:
        known = self.open.get(shard)
        return self._map(shard) if known is None else known

    def keep(self, shards: frozenset[int], lingering: frozenset[int]) -> None:
        with self._lock:
            self._kept, self._lingering = shards, lingering
            self._close_others(0)

    def prefetch(self, shard: int) -> None:
        if shard not in self.open and is_remote(self._shards[shard].place):
            self._fetch(shard, wait=False).release()

    def _fetch_now(self, shard: int) -> Held:
        try:
            return self._fetch(shard, wait=False)
        except NoRoomError:
            with self._lock:
                self._lingering = frozenset()
                self._close_others(0)
            return self._fetch(shard, wait=True)

    def _fetch(self, shard: int, wait: bool) -> Held:
        wanted = self._shards[shard]
        try:
            return self.cache.hold(wanted.place, wanted.sha256, wanted.bytes, wait)
        except Unreadable as error:
            raise _unreadable(shard, str(error), error) from error

    def mend(self, shard: int) -> None:
        """Map a remote shard anew, whose copy in the cache is verified before, and fetched again if it was damaged."""
        wanted = self._shards[shard]
        if not is_remote(wanted.place):
            return
        with self._mending:
            if shard in self._sound:  # another thread has seen to it
                return
            try:
                held = self.cache.hold_verified(wanted.place, wanted.sha256, wanted.bytes)
            except (Unreadable, MachineError) as error:
                raise _unreadable(shard, str(error), error) from error
            with self._lock:
                self._close(shard)
            self._map(shard)
            self._sound.add(shard)
            held.release()

    def _map(self, shard: int) -> Bytes:
        wanted = self._shards[shard]
        held = self._fetch_now(shard) if is_remote(wanted.place) else None
        try:
            path = held.path if held else Path(wanted.place)
            if (size := path.stat().st_size) != wanted.bytes:  # offsets were checked against the manifest
                if held:
                    held.release()
                raise MissingShardError(shard, f"{wanted.place}: {size} bytes, was {wanted.bytes} when it was opened")
            mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise InputError(
                    f"{wanted.place}: {len(self.open)} shards are open and the system allows no more files; "
                    "raise `ulimit -n`, start more ranks or lower data.shuffle_window"
                ) from error
            cause = file_error(wanted.place, "cannot be opened", error)
            raise _unreadable(shard, str(cause), cause) from error
        with self._lock:
            if shard in self.open:  # another thread was faster
                if held:
                    held.release()
                return self.open[shard]
            self._close_others(_HELD_TARS if held else _OPEN_TARS)
            self.open[shard] = mapped
            if held:
                self._held[shard] = held
        return mapped

    def _close_others(self, at_most: int) -> None:
        """Whoever still has a view of a closed tar keeps its pages."""
        others = [shard for shard in self.open if shard not in self._kept and shard not in self._lingering]
        for shard in others[: max(0, len(others) - at_most)]:
            self._close(shard)

    def _close(self, shard: int) -> None:
        self.open.pop(shard, None)
        self._sound.discard(shard)
        if shard in self._held:
            self._held.pop(shard).release()


def _unreadable(shard: int, message: str, cause: Exception) -> UnreadableShardError:
    kind = LostShardError if isinstance(cause, MachineError) else MissingShardError
    return kind(shard, message)


def _release_all(held: dict[int, Held]) -> None:
    for copy in held.values():
        copy.release()
