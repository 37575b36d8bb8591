"""What is written and read back, under one promise: complete or absent, and nothing believed that was not checked.

A file or folder is written beside its place, under a name that nobody else uses; it is flushed down to the disk, its
folder's entry too, and only then takes its name. JSON is read as strictly as it is written. Errors of the system name
the file (``errors.naming_file``).

To replace a folder takes two steps of the file system: the old one goes to ``NAME.before``, the new one takes the name.
Who dies in between leaves the old one, complete, aside: ``standing`` finds it, and the next writer puts it back.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ecgscale.errors import InputError, MachineError, naming_file

JSON_LIMIT_BYTES = 1 << 24  # of what is parsed whole, into twenty times as much memory
_DEPTH = 64  # of nested JSON; what we write has less than ten
_PARTIAL = re.compile(r".+\.[0-9a-f]{32}\.partial", re.DOTALL)
_ABANDONED_S = 3600.0  # no writer is silent for so long: what is older was left by one that was killed
# What renaming says where another process puts a folder of the same name in its place meanwhile.
_OF_ANOTHER_WRITER = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}
_ATTEMPTS, _PAUSE_S = 20, 0.02
_LOOK_S = 0.5  # between two looks at a lock that another process holds
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # what file systems say that know none
# What file systems say that know no locks. What would be locked there is left unguarded.
NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

SEAL = "sha256"  # key of a JSON object's hash over all that it says besides


# -- complete or absent ----------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent. Raises InputError or MachineError that names it."""
    with whole_file(path) as partial, partial.open("xb") as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, *, sweep: bool = True) -> Iterator[Path]:
    """A free name beside ``path``, to write a file to: at the end of the context it is flushed and takes the name.

    Where the context is left by an error, nothing stays behind. OSErrors inside come out as ``file_error(path, …)``.
    ``sweep``: remove what killed writers of this file left; to be left out in folders with thousands of files.
    """
    with naming_file(path, "cannot write"):
        partial = free_name(path, sweep=sweep)
        try:
            yield partial
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: the context fills a new, empty one, which then stands under ``path``, or replaces it."""
    path = path.absolute()  # "." has no name
    with naming_file(path, "cannot write"):
        partial = free_name(path)
        partial.mkdir(parents=True)
        try:
            yield partial
            put_in_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def free_name(path: Path, *, sweep: bool = True) -> Path:
    """A name beside ``path`` that nobody else uses, for what is to be put in place; ``sweep`` as in ``whole_file``."""
    if sweep:
        _sweep(path)
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def is_partial(path: Path) -> bool:
    """Whether a name is one of ``free_name``'s."""
    return _PARTIAL.fullmatch(path.name) is not None


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file or folder its name, over an older one if there is one; all of it is flushed to the disk.

    Of several writers of one folder the last wins. Raises OSError; an older folder then stands where it stood.
    """
    _sync_tree(partial)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            replaced = _rename(partial, path)
            break
        except OSError as error:
            if error.errno not in _OF_ANOTHER_WRITER or attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S * random.random())
    sync(path.parent)
    if replaced:
        shutil.rmtree(_before(path), ignore_errors=True)


def _rename(partial: Path, path: Path) -> bool:
    """One attempt to give a file or folder its name; whether an older folder stands aside now."""
    before = _before(path)
    if before.is_dir() and not os.path.lexists(path):
        before.rename(path)  # a writer before us died between its two steps
    if not path.is_dir() or path.is_symlink():
        partial.replace(path)
        return False
    shutil.rmtree(before, ignore_errors=True)
    path.rename(before)
    try:
        partial.rename(path)
    except OSError:
        with suppress(OSError):  # where another writer's stands already
            before.rename(path)
        raise
    return True


def standing(folder: Path) -> Path:
    """Where a folder's content stands: under its name, or aside where a process died while it replaced it."""
    before = _before(folder)
    return before if not os.path.lexists(folder) and before.is_dir() else folder


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, down to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    sync(path)


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def _sweep(path: Path) -> None:
    """Remove what killed writers of this file or folder left, by the age of their last change."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 32}.partial"):
        try:
            age_s = time.time() - partial.stat().st_mtime
        except FileNotFoundError:
            continue
        if age_s < _ABANDONED_S:
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


# -- locks -----------------------------------------------------------------------------------------------------------


def hold(file: IO[Any] | int, wait_s: float = 0.0) -> bool:
    """Lock an open file until it is closed or this process ends; False where another holds it for ``wait_s``.

    True, and nothing is guarded, where the file system knows no locks. Raises OSError.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return True


# -- checksums -------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Hexadecimal digits. Raises InputError or MachineError that names the file."""
    with naming_file(path, "cannot read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """The object, as JSON gives it back, with its own hash under SEAL, so that a flipped bit in it shows."""
    as_read: dict[str, Any] = json.loads(json.dumps(tree))  # whose keys are all text, and so in the same order
    return as_read | {SEAL: _own_sha256(as_read)}


def seal_holds(tree: dict[str, Any]) -> bool:
    """Whether an object has its hash and says what it said when it was sealed."""
    return tree.get(SEAL) == _own_sha256(tree)


def _own_sha256(tree: dict[str, Any]) -> str:
    rest = {key: value for key, value in tree.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# -- JSON ------------------------------------------------------------------------------------------------------------


def json_bytes(tree: Any) -> bytes:
    """JSON for people to read, one value a line. NaN and infinity, which are no JSON, are a ValueError."""
    return json.dumps(tree, indent=1, allow_nan=False).encode() + b"\n"


def finite(tree: Any) -> Any:
    """The same with None for each float that JSON does not know: NaN and infinity."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_json(path: Path, tree: Any) -> None:
    """``json_bytes`` in a file that is complete or absent. Raises InputError or MachineError that names it."""
    write_whole(path, json_bytes(tree))


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


def read_json(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises InputError that names it where it is missing, too large or damaged, MachineError where the disk fails.
    """
    with naming_file(path, "cannot read"):
        try:
            content = _beginning(path, limit_bytes + 1)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            content = _beginning(path, limit_bytes + 1)  # NFS: replaced between opening and reading
    if len(content) > limit_bytes:
        raise InputError(f"{path}: more than {limit_bytes} bytes; no file that ecgscale wrote")
    try:
        return parse_json(content)
    except InputError as error:
        raise InputError(f"{path}: damaged, {error}") from error


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


def _beginning(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most_bytes)


def parse_json(content: bytes, allow_nan: bool = False) -> dict[str, Any]:
    """One JSON object. Raises InputError for anything else, and as ``parse_json_value`` does."""
    tree = parse_json_value(content, allow_nan)
    if not isinstance(tree, dict):
        raise InputError(f"not a JSON object but {type(tree).__name__}")
    return tree


def parse_json_value(content: bytes, allow_nan: bool = False) -> Any:
    """Any JSON. Raises InputError for NaN, infinity, keys that stand twice, deep nesting.

    The message has no subject: who knows where the bytes are from puts it before. ``allow_nan``: earlier versions wrote
    NaN and infinity into such files.
    """
    try:
        tree = json.loads(
            content.decode(),
            parse_constant=float if allow_nan else _refuse_constant,
            parse_float=_finite,
            object_pairs_hook=without_repeats,
        )
    except RecursionError as error:
        raise InputError("not JSON of ours: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"not JSON: {str(error)[:120]}") from error
    if _deeper(tree, _DEPTH):
        raise InputError(f"not JSON of ours: nested more than {_DEPTH} deep")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond every float")
    return number


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``: raises ValueError for an object in which a key stands twice; json takes the last."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return tree


def _deeper(tree: Any, depth: int) -> bool:
    """Whether lists and objects stand in one another more than ``depth`` deep, found level by level."""
    level = [tree]
    for _ in range(depth):
        children: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                children += value.values()
            elif isinstance(value, list):
                children += value
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True
