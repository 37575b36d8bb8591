"""``ingest.unfinished``: what was asked for, so that only the same ingest goes on, and who works on it.

It stands in the folder from the first step of an ingest to the last. Its bytes are the locks: byte n for slice n, all
of them for whoever joins the parts. So parts need no other coordination, and a killed process holds no lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ecgscale.data.copies import copies_in, write_copies
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import MANIFEST, read_manifest
from ecgscale.errors import InputError, file_error, naming_file
from ecgscale.files import JSON_LIMIT_BYTES, NO_LOCKS, free_name, is_partial, json_bytes, parse_json, seal_holds, sealed

if TYPE_CHECKING:
    from ecgscale.data.ingest.job import IngestJob

UNFINISHED = "ingest.unfinished"
NAMES = "the sha256 of their names"

Asked = dict[str, dict[str, str]]


class Mark:
    """``ingest.unfinished``, open and locked."""

    def __init__(self, file: IO[bytes], job: IngestJob) -> None:
        self._file, self._job = file, job

    def parts(self) -> int:
        """In how many parts the ingest was begun."""
        content = _read_mark(self._file)
        return content["parts"] if content else 1

    def check_same(self) -> None:
        """Raises InputError that says in what the ingest differs from the one that was begun."""
        content = _read_mark(self._file)
        if content is None:  # of an older version, or half-written: part files are checked one by one anyway
            self.write(self._job.asked, 1)
            return
        if content["base"] != version(self._job.base):
            begun, now = ("--append", "a new set") if content["base"] else ("a new set", "--append")
            raise self._differs(f"was begun as {begun}, this is {now}")
        for kind, asked in content["asked"].items():
            for name in sorted({*asked, *self._job.asked[kind]}, key=lambda name: (name == NAMES, name)):
                begun, now = (fields.get(name, "unset") or "none" for fields in (asked, self._job.asked[kind]))
                if begun != now:
                    raise self._differs(f"has {name} {begun}, this one {now}")
        if content["asked"].keys() != self._job.asked.keys():
            self.write(self._job.asked, content["parts"])

    def _differs(self, how: str) -> InputError:
        return InputError(f"{self._job.out}: the unfinished ingest there {how}; give the same, or --restart to redo it")

    def write(self, asked: Mapping[str, object], parts: int) -> None:
        """Say in place what is asked for: the locks belong to this very file."""
        with naming_file(self._job.out / UNFINISHED, "cannot write"):
            self._file.seek(0)
            self._file.truncate()
            self._file.write(_mark_content(self._job, asked, parts))
            self._file.flush()

    def allow_other_splits(self) -> None:
        """The tars are good, only the splits were not: let them be joined with others."""
        self.write({"conversion": self._job.asked["conversion"]}, self.parts())

    def remove(self) -> None:
        """The last step."""
        (self._job.out / UNFINISHED).unlink()


@contextmanager
def claimed(job: IngestJob, part: tuple[int, int] | None = None, restart: bool = False) -> Iterator[Mark]:
    """The folder, marked, while this process works on a part of the slices, or on all and on what follows.

    Raises InputError where another process works on them, and where another ingest was begun.
    """
    _begin(job, part[1] if part else 1)
    with _locked(job.out, job.numbers_of_part(*part) if part else None) as file:
        if version(read_base(job.out) if (job.out / MANIFEST).exists() else None) != version(job.base):
            raise _just_finished(job.out)
        mark = Mark(file, job)
        if restart:
            sweep(job.out)
            mark.write(job.asked, 1)
        mark.check_same()
        if part is None:
            for path in job.out.glob("shard-*.partial"):
                path.unlink()
        yield mark


def _begin(job: IngestJob, parts: int) -> None:
    """Make and mark the folder, unless it holds shards that somebody else made."""
    mark = job.out / UNFINISHED
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        leftovers = {path for path in _leftovers(job.out) if not path.name.startswith(UNFINISHED)}
        if (job.out / MANIFEST).exists():  # a finished set, beside which another writer of ours may have been killed
            leftovers = {path for path in leftovers if not is_partial(path)}
        if mark.exists():
            return
        if leftovers:
            raise InputError(f"{min(leftovers)}: not made by an interrupted ingest; give an empty or a new folder")
        whole = free_name(mark, sweep=False)
        whole.write_bytes(_mark_content(job, job.asked, parts))
        try:
            os.link(whole, mark)  # complete or absent, and never over that of another process
        except FileExistsError:
            pass
        finally:
            whole.unlink()
    except OSError as error:
        raise file_error(job.out, "cannot make a data set there", error) from error


def _mark_content(job: IngestJob, asked: Mapping[str, object], parts: int) -> bytes:
    return json_bytes(sealed({"base": version(job.base), "parts": parts, "asked": asked}))


def _read_mark(file: IO[bytes]) -> dict[str, Any] | None:
    """None where it is damaged, or of an older version."""
    file.seek(0)
    try:
        content = parse_json(file.read(JSON_LIMIT_BYTES))
    except InputError:
        return None
    return content if seal_holds(content) else None


@contextmanager
def _locked(out: Path, numbers: range | None) -> Iterator[IO[bytes]]:
    """The mark, locked for these slices or for all. Closing any other handle of it would end the lock."""
    with (out / UNFINISHED).open("r+b") as file:
        if numbers is None or numbers:
            _lock(file, out, numbers)
        try:
            same = os.path.samestat(os.fstat(file.fileno()), (out / UNFINISHED).stat())
        except FileNotFoundError:
            same = False
        if not same:
            raise _just_finished(out)
        yield file


def _lock(file: IO[bytes], out: Path, numbers: range | None) -> None:
    try:
        first, count = (numbers.start, len(numbers)) if numbers else (0, 0)  # 0 bytes: all of them
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        what = "another ingest is writing there" if numbers is None else "another ingest is writing the same shards"
        raise InputError(f"{out}: {what}; wait for it or give another folder") from error


def _just_finished(out: Path) -> InputError:
    return InputError(f"{out}: another ingest has just finished there; look at it with `ecgscale inspect`")


# -- tidying up ------------------------------------------------------------------------------------------------------


def tidied(out: Path) -> Asked | None:
    """Where the manifest is newer than the mark, finish the mark's ingest; returns what it was asked for."""
    content = _read_mark_of(out)
    if content is not None and content["base"] == version(read_base(out)):
        return None  # an --append that goes on
    with _locked(out, None):
        shards = ShardSet.open(out)
        write_copies(shards, out, copies_in(shards))
        sweep(out)
        (out / UNFINISHED).unlink()
    return content["asked"] if content else None


def _read_mark_of(out: Path) -> dict[str, Any] | None:
    with (out / UNFINISHED).open("rb") as file:
        return _read_mark(file)


def sweep(out: Path) -> None:
    """Remove all that an ingest has written and that no manifest names."""
    for path in _leftovers(out):
        path.unlink(missing_ok=True)


def _leftovers(out: Path) -> Iterator[Path]:
    named: set[str] = set()
    if (out / MANIFEST).exists():
        manifest = read_base(out)
        named = {manifest["index"]["file"], *(shard["file"] for shard in manifest["shards"])}
    for pattern in ("shard-*", "index-*", "*.partial"):
        for path in out.glob(pattern):
            if path.name not in named:
                yield path


def read_base(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    if not path.is_file():
        raise InputError(f"{out}: no {MANIFEST} there, so no data set to append to; leave --append out")
    with naming_file(path, "cannot read"):
        return read_manifest(path.read_bytes(), str(path))


def version(manifest: dict[str, Any] | None) -> str:
    return "" if manifest is None else str(manifest["sha256"])
