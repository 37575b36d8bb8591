"""Archives of WFDB records: zip, tar and compressed tar, read member by member.

What an archive holds is listed once, by the process that opens it, into a table that the others look up. Members are
never unpacked under their own paths: a record's files go into a private temporary folder, in memory where there is
room, for as long as it takes to read them. A compressed tar, which can only be read from its beginning, is
uncompressed once into a private temporary file.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, TextIO, cast

from tqdm import tqdm
from xxhash import xxh3_128

from ecgscale.data.sources.catalogue import TAR, Catalogue, Member
from ecgscale.data.sources.listing import Contents, header_names, is_junk
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.wfdb_listing import (
    MAX_HEADER_BYTES,
    PEEK_BYTES,
    data_names,
    is_multi_segment,
    known_header,
    segment_names,
    stamp,
)
from ecgscale.data.sources.wfdb_source import read_wfdb
from ecgscale.errors import InputError, MachineError, file_error, naming_file, unreadable
from ecgscale.record import Record

_COMPRESSED_TARS: dict[str, Callable[[IO[bytes]], object]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
SUFFIXES = (".zip", ".tar", *_COMPRESSED_TARS)

# ECGs compress to a third or a tenth, tables to a twentieth. What unpacks to more than a hundred times its size is a
# bomb, unless it is small: a flat recording compresses a thousandfold.
_MAX_INFLATION = 100
_SMALL_BYTES = 1 << 26
_MAX_RECORD_BYTES = 1 << 32
_MAX_NAME_BYTES, _MAX_PART_BYTES = 4096, 255  # of Linux file systems
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 512  # of a tar
_SHARE_OF_MEMORY = 256  # of what is free there, a record may take one part
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}

# What the libraries raise for damaged archives.
_BROKEN: tuple[type[Exception], ...] = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
_BROKEN += (ValueError, OverflowError, RecursionError, NotImplementedError, struct.error, MemoryError, OSError)


def is_archive(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """``"ptb-xl.tar.gz"`` -> ``"ptb-xl"``."""
    suffix = max((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), key=len, default="")
    return path.name[: len(path.name) - len(suffix)]


@dataclass(frozen=True)
class Archive:
    """An archive as a Tree. If all of it lies in one folder, names are relative to that folder."""

    where: Path
    data: Path  # the archive itself, or the uncompressed tar
    catalogue: Catalogue
    prefix: str  # "" or the one folder with a slash
    disk: Scratch
    memory: Scratch

    @classmethod
    def open(cls, path: Path) -> Archive:
        """List what is in it.

        Raises InputError that names the archive, and the member where there is one: damaged or truncated archives,
        encrypted members, links and devices, members whose names lead elsewhere or stand twice, and archives that
        unpack to implausibly much.
        """
        disk, memory = Scratch.make(), Scratch.make_in_memory()
        catalogue = Catalogue.make(disk.path / "files.sqlite")
        data = path
        try:
            if path.name.lower().endswith(".zip"):
                members = _zip_members(path)
            else:
                if not path.name.lower().endswith(".tar"):
                    data = disk.path / "plain.tar"
                    _uncompress(path, data)
                members = _tar_members(data)
            top = _TopFolders()
            bar = tqdm(members, desc=f"list {path.name}", unit="file", disable=None)
            catalogue.add_files((name, member) for name, member in bar if top.saw(name))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except _BROKEN as error:
            raise unreadable(path, "a damaged or truncated archive; fetch it again", error) from error
        return cls(path, data, catalogue, top.prefix(), disk, memory)

    def children(self, folder: str) -> frozenset[str]:
        return self.catalogue.children(f"{self.prefix}{folder}/" if folder else self.prefix)

    def folders(self, folder: str) -> list[str]:
        return self.catalogue.folders(f"{self.prefix}{folder}/" if folder else self.prefix)

    def below(self, folder: str) -> Archive:
        return replace(self, prefix=f"{self.prefix}{folder}/") if folder else self

    def header_outside(self, folder: str) -> str | None:
        names = header_names(self.contents())
        return next((name for name in names if not name.startswith(f"{folder}/")), None)

    def contents(self) -> Iterator[Contents]:
        files: dict[str, list[str]] = {}
        for name in self.catalogue.names(self.prefix):
            folder, _, file = name.rpartition("/")
            files.setdefault(folder, []).append(file)
        for folder, names in files.items():
            yield Contents(folder, names, [])

    def headers(self) -> list[str]:
        names = [name.removesuffix(".hea") for name in self.catalogue.headers(self.prefix)]
        segments = {segment for name in names for segment in self._segments_of(name)}
        return [name for name in names if name not in segments]

    @contextmanager
    def table(self, name: str) -> Iterator[TextIO]:
        member = self._member(name)
        if member is None:
            raise InputError(f"{self.where}: holds no {name}")
        with tempfile.TemporaryFile(dir=self.disk.path) as file:
            try:
                with naming_file(self.disk.path, "cannot unpack a table there"):
                    for chunk in _chunks(self.data, member):
                        file.write(chunk)
            except InputError as error:
                raise InputError(f"{self.where}: {name}: {error}") from error
            file.seek(0)
            with io.TextIOWrapper(cast("IO[bytes]", file), encoding="utf-8-sig", newline="") as stream:
                yield stream

    def fingerprint(self, item: str) -> bytes:
        folder, told = item[: item.rfind("/") + 1], []
        try:
            headers = [self._header(name) for name in (item, *self._segments_of(item))]
            for name in (name for header in headers for name in data_names(header)):
                digest, member = xxh3_128(), self._member(folder + name)
                for chunk in _chunks(self.data, member) if member else ():
                    digest.update(chunk)
                told.append(digest.digest() if member else b"")
        except InputError:
            return b""  # read will say why
        return b"\0".join((*headers, *told))

    def stamp(self, item: str) -> bytes:
        return repr(self._files_of(item)).encode() + stamp(self.where)

    def read(self, item: str, **options: Any) -> Record:
        shown = self.where / f"{item}.hea"
        with self._unpacked(item, shown) as (header_path, root):
            return read_wfdb(header_path, name=item, root=root, shown=shown, **options)

    def _member(self, name: str) -> Member | None:
        return self.catalogue.file(self.prefix + name)

    @contextmanager
    def _unpacked(self, item: str, shown: Path) -> Iterator[tuple[Path, Path]]:
        """(path of the header, folder above it) of a record's files, as long as the context lasts.

        The record's folder keeps its name, which may be that of a patient.
        """
        try:
            files = self._files_of(item)
            size = sum(member.size for member in files.values())
            if size > _MAX_RECORD_BYTES:
                raise InputError(f"{size} bytes; the files of a record have at most {_MAX_RECORD_BYTES}")
            with tempfile.TemporaryDirectory(dir=self._room_for(size)) as root:
                folder = Path(root, PurePosixPath(item).parent.name)
                folder.mkdir(exist_ok=True)
                for name, member in files.items():
                    with naming_file(root, "cannot unpack a record there"), (folder / name).open("xb") as file:
                        for chunk in _chunks(self.data, member):
                            file.write(chunk)
                yield folder / f"{PurePosixPath(item).name}.hea", Path(root)
        except InputError as error:
            raise error if str(error).startswith(str(shown)) else InputError(f"{shown}: {error}") from error

    def _room_for(self, size: int) -> Path:
        return (self.memory if size * _SHARE_OF_MEMORY < self.memory.free_bytes() else self.disk).path

    def _files_of(self, item: str) -> dict[str, Member]:
        """The members of a record by their base names, as far as they are there; read_wfdb says what is missing."""
        folder = item[: item.rfind("/") + 1]
        wanted = set()
        for part in (item, *self._segments_of(item)):
            wanted |= {f"{part.removeprefix(folder)}.hea", *self._data_files(part)}
        found = {name: self._member(folder + name) for name in sorted(wanted)}
        return {name: member for name, member in found.items() if member is not None}

    def _data_files(self, item: str) -> set[str]:
        try:
            return {line.file_name for line in known_header(self._header(item)).signals}
        except InputError:
            return set()  # read_wfdb will say why

    def _segments_of(self, item: str) -> list[str]:
        try:
            if is_multi_segment(self._header(item, PEEK_BYTES)):
                return segment_names(known_header(self._header(item)), item)
        except InputError:
            pass  # read_wfdb will say why
        return []

    def _header(self, item: str, n_bytes: int = MAX_HEADER_BYTES) -> bytes:
        member = self._member(f"{item}.hea")
        return b"" if member is None else next(_chunks(self.data, member, n_bytes), b"")


class _TopFolders:
    """Which folders stand at the top, as far as it matters: whether there is only one thing, a folder."""

    def __init__(self) -> None:
        self._tops: set[str] = set()

    def saw(self, name: str) -> bool:
        top, slash, _ = name.partition("/")
        if len(self._tops) < 2:
            self._tops.add(top + slash)
        return True

    def prefix(self) -> str:
        only = next(iter(self._tops)) if len(self._tops) == 1 else ""
        return only if only.endswith("/") else ""


# --- listing ---


def _checked_name(name: str) -> str | None:
    """The name without ``./``; None for what is nothing: the archive's own folder, what systems leave in folders.

    Raises InputError for names that lead elsewhere or cannot be those of files.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise InputError(
            f"member {name!r}: an absolute name, one with '..' or one with a backslash; unpack it yourself"
        )
    try:
        encoded = [part.encode() for part in parts]
    except UnicodeEncodeError as error:
        raise InputError(f"member {name!r}: the name is not UTF-8") from error
    if len(name) > _MAX_NAME_BYTES or max(map(len, encoded), default=0) > _MAX_PART_BYTES:
        raise InputError(f"member {name[:60]!r}...: the name is too long for a file's")
    return "/".join(parts) if parts and not any(map(is_junk, parts)) else None


def _check_size(name: str, packed: int, size: int) -> None:
    if size > max(_SMALL_BYTES, _MAX_INFLATION * packed):
        raise InputError(f"{name}: {packed} bytes unpack to {size}, more than {_MAX_INFLATION} times as much; a bomb")


def _zip_members(path: Path) -> Iterator[tuple[str, Member]]:
    n_packed, n_bytes = 0, path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            name = _checked_name(info.orig_filename)
            if name is None or info.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):
                raise InputError(f"member {name!r} is a link or a device; only plain files can be read from an archive")
            if info.flag_bits & 1:
                raise InputError(f"member {name!r} is encrypted; unpack the archive and give the folder")
            if info.compress_type not in _ZIP_METHODS:
                raise InputError(f"member {name!r} is compressed by method {info.compress_type}; known are 0 and 8")
            _check_size(f"member {name!r}", info.compress_size, info.file_size)
            if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
                raise InputError(f"member {name!r} is not compressed, yet has two sizes; damaged")
            if not 0 <= info.header_offset < n_bytes:
                raise InputError(
                    f"member {name!r} begins at byte {info.header_offset} of {n_bytes}, so the archive's directory is "
                    "wrong; fetch it again"
                )
            n_packed += info.compress_size
            yield name, Member(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
    if n_packed > n_bytes:
        raise InputError("its members overlap each other; a bomb")


def _tar_members(path: Path) -> Iterator[tuple[str, Member]]:
    n_bytes = path.stat().st_size
    with tarfile.open(path, "r:", errors="surrogateescape") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it remembers them all
            if info.size < 0 or info.offset_data + info.size > n_bytes:
                raise InputError(f"member {info.name!r} claims {info.size} bytes; the archive ends before: truncated")
            name = _checked_name(info.name)
            if info.isdir() or name is None:
                continue
            if not info.isreg() or info.issparse():
                raise InputError(
                    f"member {info.name!r} is a link, a device or sparse; only plain files can be read from an archive "
                    "(tar --dereference packs what links lead to)"
                )
            yield name, Member(info.offset_data, info.size, info.size, TAR, 0)
        # tarfile takes a damaged header for the end, which is a block of zeros.
        with path.open("rb") as file:
            file.seek(archive.offset)
            if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
                raise InputError(f"damaged or truncated: no member and no end mark at byte {archive.offset}")


def _uncompress(path: Path, plain: Path) -> None:
    opener = next(opener for suffix, opener in _COMPRESSED_TARS.items() if path.name.lower().endswith(suffix))
    packed = path.stat().st_size
    n_bytes = 0
    with (
        path.open("rb") as raw,
        cast("IO[bytes]", opener(raw)) as file,
        plain.open("wb") as out,
        tqdm(total=packed, desc=f"uncompress {path.name}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            n_bytes += len(chunk)
            _check_size("the archive", packed, n_bytes)
            try:
                out.write(chunk)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise file_error(plain, "cannot write", error) from error
                raise MachineError(
                    f"{path}: no room to uncompress it in {plain.parent.parent}; set TMPDIR to a folder with more, "
                    "or uncompress it yourself"
                ) from error
            bar.update(raw.tell() - bar.n)


# --- reading ---


def _chunks(path: Path, member: Member, n_bytes: int = _CHUNK_BYTES) -> Iterator[bytes]:
    """What a member holds, in pieces of at most ``n_bytes``.

    Raises InputError where it is damaged or not as long as the archive says.
    """
    with naming_file(path, "cannot read"), path.open("rb", buffering=0) as file:
        file.seek(member.offset)
        if member.method != TAR:
            signature, name_bytes, extra_bytes = _ZIP_LOCAL_HEADER.unpack(_read(file, _ZIP_LOCAL_HEADER.size))
            if signature != b"PK\3\4":
                raise InputError("damaged: no file begins where the archive's directory says")
            file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        crc, left = 0, member.size
        for content in (_inflated if member.method == zipfile.ZIP_DEFLATED else _stored)(file, member, n_bytes):
            left -= len(content)
            if member.method != TAR:
                crc = zlib.crc32(content, crc)
                if not left and crc != member.crc:
                    raise InputError("damaged: its checksum is not the one in the archive")
            yield content


def _stored(file: IO[bytes], member: Member, n_bytes: int) -> Iterator[bytes]:
    left = member.size
    while left:
        content = _read(file, min(n_bytes, left))
        left -= len(content)
        yield content


def _inflated(file: IO[bytes], member: Member, n_bytes: int) -> Iterator[bytes]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    packed_left, left, pending = member.packed, member.size, b""
    while left:
        if not pending:
            pending = _read(file, min(_CHUNK_BYTES, packed_left))
            packed_left -= len(pending)
        try:
            content = inflate.decompress(pending, min(n_bytes, left))
        except zlib.error as error:
            raise InputError(f"damaged: {error}") from error
        pending = inflate.unconsumed_tail
        left -= len(content)
        if content:
            yield content
        elif inflate.eof or not (pending or packed_left):
            raise InputError(f"damaged: unpacks to {member.size - left} bytes, the archive says {member.size}")


def _read(file: IO[bytes], n_bytes: int) -> bytes:
    content = file.read(n_bytes)
    if len(content) != n_bytes:
        raise InputError(f"truncated: the archive ends at byte {file.tell()}")
    return content
