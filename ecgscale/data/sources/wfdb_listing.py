"""Headers of WFDB records below a folder: which are there, which are segments of others, and what stands in them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_128

from ecgscale.data.sources.listing import contents_below, header_names
from ecgscale.data.wfdb_header import FILE_NAME, Header, parse_header
from ecgscale.errors import InputError, naming_file

MAX_HEADER_BYTES = 1 << 24
PEEK_BYTES = 4096

# An archive needs a record's header to know which files to unpack, and then it is read from there.
known_header = functools.lru_cache(maxsize=4)(parse_header)


def headers_below(root: Path) -> list[str]:
    """Sorted names of all headers, segments included."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; a folder with WFDB records is needed")

    return sorted(header_names(contents_below(root)))


def stays_inside(path: Path, root: Path) -> bool:
    # realpath, because Path.resolve raises RuntimeError for links that lead in a circle
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def without_segments(root: Path, names: list[str]) -> list[str]:
    """The names without those of records that are segments of another."""
    segments = {segment for name in names for segment in _segments_of(root, name)}
    return [name for name in names if name not in segments]


def _segments_of(root: Path, name: str) -> list[str]:
    """Names of the segments if the record has such, as far as they are plain records."""
    path = root / f"{name}.hea"
    if not path.is_file():
        return []
    with naming_file(path, "cannot be read"), path.open("rb") as file:
        if not is_multi_segment(file.read(PEEK_BYTES)):
            return []
    try:
        return segment_names(read_header(path, root), name)
    except InputError:
        return []  # read() will say why


def is_multi_segment(beginning: bytes) -> bool:
    """Whether a header that begins so is that of a record with segments."""
    lines = beginning.splitlines()
    record_line = next((line for line in lines if line.strip() and not line.lstrip().startswith(b"#")), b"")
    return b"/" in record_line.split(b" ", 1)[0]


def segment_names(header: Header, name: str) -> list[str]:
    """Names of the segments of the record ``name``; gaps are named "~", and a record is no segment of itself."""
    folder = name.rpartition("/")[0]
    names = [f"{folder}/{segment}" if folder else segment for segment, _ in header.segments]
    return [segment for segment in names if segment != name]


def fingerprint_of(root: Path, item: str) -> bytes:
    """The headers of a record and of its segments, as far as they can be read, and a hash of each data file."""
    return _told_of(root, item, _digest)


def stamp_of(root: Path, item: str) -> bytes:
    """The same with the size and time of each data file."""
    return _told_of(root, item, stamp)


def _told_of(root: Path, item: str, tell: Callable[[Path], bytes]) -> bytes:
    paths = [root / f"{name}.hea" for name in (item, *_segments_of(root, item))]
    headers = [_bytes_or_none(path, root) for path in paths]
    files = [path.with_name(name) for path, header in zip(paths, headers, strict=True) for name in data_names(header)]
    return b"\0".join((*headers, *(tell(file) if stays_inside(file, root) else b"" for file in files)))


def data_names(header: bytes) -> list[str]:
    """Files that hold the signals, sorted, by a quick look that checks nothing."""
    if is_multi_segment(header):
        return []
    lines = [line for line in header.decode("latin-1").splitlines() if line.strip() and line.lstrip()[0] != "#"]
    names = {line.split()[0] for line in lines[1:]}  # behind the line of the record
    return sorted(name for name in names if FILE_NAME.fullmatch(name))


def stamp(path: Path) -> bytes:
    """Size and time of a file; empty where there is none."""
    try:
        about = path.stat()
    except OSError:
        return b""
    return f"{about.st_size} {about.st_mtime_ns}".encode()


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxh3_128).digest()
    except OSError:
        return b""


def _bytes_or_none(path: Path, root: Path) -> bytes:
    try:
        return _header_bytes(path, root)
    except (InputError, OSError):
        return b""


def read_header(path: Path, root: Path | None = None) -> Header:
    """A header that does not lie outside of ``root``; raises InputError without the path's name."""
    return known_header(_header_bytes(path, root))


def _header_bytes(path: Path, root: Path | None) -> bytes:
    check_place(path, root)
    if not path.is_file():
        raise InputError("no such header")
    if (size := path.stat().st_size) > MAX_HEADER_BYTES:
        raise InputError(f"{size} bytes; a header has at most {MAX_HEADER_BYTES}")
    return path.read_bytes()


def check_place(path: Path, root: Path | None) -> None:
    """Raises InputError, without the path's name, where a link leads out of ``root``."""
    if root is not None and not stays_inside(path, root):
        raise InputError(f"lies outside of {root}; links may not lead out")
