"""What is in a tar, by its headers alone: strict, bounded by the file's size, and nothing is ever unpacked.

Only what training data needs is let through: plain files, and folders, which are skipped, under relative names, with
ustar or GNU headers. Links, devices, sparse files and whatever else a tar may hold are refused by name, and so are
pickles, which other readers of these tars would execute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ecgscale.data.payload import Bytes
from ecgscale.errors import InputError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAGICS = (b"ustar\x0000", b"ustar  \x00")  # POSIX, GNU
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_FORBIDDEN = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"L": "a name of more than 100 bytes in GNU's own way",
    b"K": "a link name of more than 100 bytes",
}
_PAX_LIMIT_BYTES = 1 << 16
_END_LIMIT_BYTES = 1 << 20  # zeros at the end: writers fill up to 10 KiB, or what they have been told
_PAX_KEYS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}  # what has no say in the content
_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill", "cloudpickle"}
_HEADER_ADVICE = "write the tar in ustar format, as the webdataset library does"


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int  # of its content
    size: int  # bytes


class Sample(NamedTuple):
    """Consecutive members whose names differ behind the first dot only, as WebDataset groups them."""

    key: str
    members: dict[str, Member]  # by extension, without its dot, in lower case


def samples(tar: Bytes, place: str) -> Iterator[Sample]:
    """The samples of a tar in its order. Raises InputError as ``members`` does, for pickles and for repeated keys."""
    current = Sample("", {})
    seen: set[str] = set()
    for member in members(tar, place):
        key, extension = split_name(member.name)
        if not key:
            continue  # as the webdataset library does with .DS_Store or README
        if not _PICKLES.isdisjoint(extension.split(".")):
            raise InputError(f"{place}: member {member.name!r} is a pickle, which can run programs; remove it")
        if key != current.key:
            if current.members:
                yield current
            if key in seen:
                raise InputError(
                    f"{place}: member {member.name!r}: key {key!r} stands in two places; give each sample its own key, "
                    "its members one after the other"
                )
            seen.add(key)
            current = Sample(key, {})
        if extension in current.members:
            raise InputError(f"{place}: member {member.name!r} stands twice; each may stand once")
        current.members[extension] = member
    if current.members:
        yield current


def split_name(name: str) -> tuple[str, str]:
    """``a/b.ecg.npy`` -> ``a/b``, ``ecg.npy``: what WebDataset calls key and extension. ("", "") where it sees none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else ("", "")


def members(tar: Bytes, place: str) -> Iterator[Member]:
    """The plain files of a tar. Raises InputError that names ``place``, and the member, for anything but that.

    Every byte is accounted for: headers have their checksums, the gaps are zeros, and zeros end the file.
    """
    view, at = tar.data, 0
    while at + _BLOCK <= len(view):
        header = bytes(view[at : at + _BLOCK])
        if header == _ZEROS:
            if not 2 * _BLOCK <= len(view) - at <= _END_LIMIT_BYTES or tar[at:].any():
                raise InputError(
                    f"{place}: damaged, its end at byte {at} is not a few KiB of zeros; copy or write it again"
                )
            return
        name, kind, size = _parsed(header, at, place)
        start = at + _BLOCK
        if size > len(view) - start:
            raise InputError(
                f"{place}: member {name!r} claims {size} bytes, {len(view) - start} are left; copy or write it again"
            )
        at = start + -(-size // _BLOCK) * _BLOCK
        gap = bytes(view[start + size : at])
        if gap.count(0) != at - start - size:
            raise InputError(f"{place}: damaged, the gap behind member {name!r} is not zero; copy or write it again")
        if kind in b"0\0" and not name.endswith("/"):
            yield Member(name, start, size)
        elif kind in b"xg":
            _check_pax(bytes(view[start : start + min(size, _PAX_LIMIT_BYTES + 1)]), name, place)
        elif kind not in b"5\0" or size:
            what = _FORBIDDEN.get(kind, f"of type {kind!r}")
            raise InputError(f"{place}: member {name!r} is {what}; only plain files are read: {_HEADER_ADVICE}")
    raise InputError(f"{place}: truncated, its end-of-archive blocks are missing; copy or write it again")


def name_before(tar: Bytes, offset: int, place: str) -> str:
    """The name of the member whose content begins at ``offset``. Raises InputError where no header stands there."""
    if not _BLOCK <= offset <= len(tar):
        raise InputError(f"{place}: no tar header stands before byte {offset}; index it again")
    return _parsed(tar[offset - _BLOCK : offset].tobytes(), offset - _BLOCK, place)[0]


def _parsed(header: bytes, at: int, place: str) -> tuple[str, bytes, int]:
    """Name, type and size of a member."""
    magic = header[257:265]
    checksum = _OCTAL.fullmatch(header[148:156])
    if magic not in _MAGICS or not checksum or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise InputError(
            f"{place}: damaged, or no tar: byte {at} begins no ustar header; copy it again or {_HEADER_ADVICE}"
        )
    name = _name(header, magic, place)
    size = _OCTAL.fullmatch(header[124:136])
    if not size:
        raise InputError(f"{place}: member {name!r} has no octal size, as members of 8 GiB or more; {_HEADER_ADVICE}")
    return name, header[156:157], int(size[1], 8)


def _name(header: bytes, magic: bytes, place: str) -> str:
    """Raises InputError for a name that leads out of a folder or that a terminal would not print."""
    raw = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if magic == _MAGICS[0] else b""
    try:
        name = (prefix + b"/" + raw if prefix else raw).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: member {raw!r} has a name that is not UTF-8; rename it") from error
    if not name.isprintable() or name.startswith("/") or "\\" in name or ".." in name.split("/") or not name:
        raise InputError(f"{place}: member {name!r} is not named as a file below a folder; rename it")
    return name


def _check_pax(content: bytes, name: str, place: str) -> None:
    """Raises InputError unless a pax header says only when and by whom a member was written."""
    if len(content) > _PAX_LIMIT_BYTES:
        raise InputError(f"{place}: pax header {name!r} is larger than {_PAX_LIMIT_BYTES} bytes; {_HEADER_ADVICE}")
    at = 0
    while at < len(content):
        length = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=").match(content, at)
        if not length or content[at + int(length[1]) - 1 : at + int(length[1])] != b"\n":
            raise InputError(f"{place}: pax header {name!r} is damaged; {_HEADER_ADVICE}")
        if length[2] not in _PAX_KEYS:
            raise InputError(f"{place}: pax header {name!r} sets {length[2][:40]!r}; {_HEADER_ADVICE}")
        at += int(length[1])
