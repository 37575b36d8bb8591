"""What an ingest has to do, and what of it is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecgscale import __version__
from ecgscale.data.ingest.mark import NAMES, UNFINISHED, Asked, read_base, tidied, version
from ecgscale.data.ingest.options import SPLIT_OPTIONS, IngestOptions
from ecgscale.data.ingest.slice import Held, Part, Slice, check_utf8, inputs_sha256, read_part, stamps_sha256
from ecgscale.data.payload import Payload
from ecgscale.data.schema import parse_json
from ecgscale.data.shards import MANIFEST, Columns, map_index
from ecgscale.errors import InputError, naming_file
from ecgscale.files import file_sha256

if TYPE_CHECKING:
    from ecgscale.data.sources import Source


@dataclass(frozen=True)
class IngestJob:
    """An ingest; equal in all processes that take part in it."""

    source: Source
    items: Sequence[str]
    out: Path
    options: IngestOptions
    asked: Asked
    """Of the ``conversion``, on which the tars depend, and of the ``splits``, which are made at the end."""
    base: dict[str, Any] | None
    """Manifest of the set that is appended to."""
    identity: str
    """Hash of what the tars depend on."""
    first_shard: int
    finished: bool
    """The set is there already: an earlier process was killed after its last step but one."""
    held: Mapping[str, int]
    """Items whose names the data set has already in the set that is appended to, and their numbers there."""

    @property
    def items_sha256(self) -> str:
        return self.asked["conversion"][NAMES]

    def __len__(self) -> int:
        """Number of slices."""
        return -(-len(self.items) // self.options.records_per_shard)

    def tar(self, number: int) -> Path:
        return self.out / f"shard-{self.first_shard + number:06d}.tar"

    def slice(self, number: int) -> Slice:
        items = self.items_of(number)
        held = self._held([item for item in items if item in self.held])
        return Slice(self.source, items, self.tar(number), self.options, self.identity, held)

    def old_tars(self) -> Iterator[tuple[Path, Payload, Columns]]:
        """Each tar of the set that is appended to, with its payload and its columns."""
        if self.base is not None:
            yield from _old_tars(self.out, self.base)

    def _held(self, items: Sequence[str]) -> dict[str, Held]:
        held: dict[str, Held] = {}
        wanted = sorted((self.held[item], item) for item in items)
        first = 0
        for tar, payload, columns in self.old_tars() if wanted else ():
            last = first + len(columns["samples"])
            for number, item in wanted:
                if first <= number < last:
                    offset, length, leads = (
                        int(columns[name][number - first]) for name in ("offset", "length", "leads")
                    )
                    scale, patient = columns["scale"][number - first].copy(), int(columns["patient"][number - first])
                    json_place = (int(columns[name][number - first]) for name in ("json_offset", "json_length"))
                    held[item] = Held(tar, payload, offset, length, leads, scale, patient, *json_place)
            first = last
        return held

    def items_of(self, number: int) -> Sequence[str]:
        first = number * self.options.records_per_shard
        return self.items[first : first + self.options.records_per_shard]

    def numbers_of_part(self, i: int, n: int) -> range:
        """The slices of part i of n, counted from 1: consecutive ones, as sources are read fastest."""
        return range(len(self) * (i - 1) // n, len(self) * i // n)

    def is_done(self, number: int) -> bool:
        """Whether a slice is converted, from records as they are now."""
        part = read_part(self.tar(number), self.identity)
        if part is None:
            return False
        items = self.items_of(number)
        return part.stamps == stamps_sha256(self.source, items) or part.inputs == inputs_sha256(self.source, items)

    def parts(self) -> Iterator[tuple[Path, Part | None]]:
        """Each tar with what is known of it; None: not converted yet."""
        for number in range(len(self)):
            yield self.tar(number), read_part(self.tar(number), self.identity)


def open_job(
    source: Source, out: Path, options: IngestOptions, arguments: Mapping[str, str], append: bool
) -> IngestJob:
    """Find out what there is to do, and tidy up behind an ingest that was killed when it had finished.

    Raises InputError for a folder that holds a set, and with ``append`` for one that holds none or none that fits.
    """
    unfinished = (out / UNFINISHED).exists()
    if not append and not unfinished:
        _refuse_data_set(out)
    check_utf8(source.dataset)
    items = source.items()
    asked = _asked(source.dataset, items, options, arguments)
    finished = unfinished and (out / MANIFEST).exists() and tidied(out) == asked
    if not append and not finished:
        _refuse_data_set(out)
    base = read_base(out) if append or finished else None
    held: dict[str, int] = {}
    if append and not finished:
        assert base is not None
        _check_appendable(out, base, asked, options)
        held = _names_held(out, base, source.dataset, items)
    identity = hashlib.sha256(json.dumps([version(base), asked["conversion"]]).encode()).hexdigest()
    first = _after(base["shards"]) if base else 0
    return IngestJob(source, items, out, options, asked, base, identity, first, finished, held)


def _old_tars(out: Path, base: Mapping[str, Any]) -> Iterator[tuple[Path, Payload, Columns]]:
    columns = map_index(out / base["index"]["file"], base["records"])
    first = 0
    for shard in base["shards"]:
        last = first + shard["records"]
        yield out / shard["file"], shard["payload"], {name: column[first:last] for name, column in columns.items()}
        first = last


def _names_held(out: Path, base: Mapping[str, Any], dataset: str, items: Sequence[str]) -> dict[str, int]:
    """Those of the items whose names the data set has in that set already, and their numbers there."""
    wanted, held, first = frozenset(items), {}, 0
    for shard, (tar, _, columns) in zip(base["shards"], _old_tars(out, base), strict=True):
        if shard["dataset"] == dataset:
            places = zip(columns["json_offset"].tolist(), columns["json_length"].tolist(), strict=True)
            with naming_file(tar, "cannot read"), tar.open("rb") as file:
                for row, (offset, length) in enumerate(places):
                    file.seek(offset)
                    name = parse_json(file.read(length)).get("name")
                    if name in wanted:
                        held[name] = first + row
        first += shard["records"]
    return held


def _after(shards: Sequence[Mapping[str, Any]]) -> int:
    """The number behind the last shard's; tars of others may have other names."""
    named = [re.fullmatch(r"shard-(\d+)\.tar", shard["file"]) for shard in shards]
    return max((int(match[1]) + 1 for match in named if match), default=0)


def _refuse_data_set(out: Path) -> None:
    if (out / MANIFEST).exists():
        more = "an interrupted --append goes on with --append; else " if (out / UNFINISHED).exists() else ""
        raise InputError(f"{out}: holds a data set already; {more}give another folder, --append or remove it")


def _check_appendable(out: Path, base: dict[str, Any], asked: Asked, options: IngestOptions) -> None:
    if base.get("foreign"):
        raise InputError(f"{out}: tars that others wrote are not added to; give a new folder and train on both")
    if base["rate_hz"] != options.rate_hz:
        held = f"{base['rate_hz']:g}"
        raise InputError(f"{out}: its records have {held} Hz, not {options.rate_hz:g}; append with --rate-hz {held}")
    conversion = asked["conversion"]
    for source in base["sources"]:
        if (source["dataset"], source.get("items_sha256")) == (conversion["dataset"], conversion[NAMES]):
            raise InputError(
                f"{out}: these records of {source['dataset']!r} are in it already; append others, or ingest all anew "
                "if their labels have changed"
            )
    index = out / base["index"]["file"]
    if not index.is_file() or file_sha256(index) != base["index"]["sha256"]:
        raise InputError(f"{index}: missing or damaged, its sha256 differs from the manifest; ingest the data again")


def _asked(dataset: str, items: Sequence[str], options: IngestOptions, arguments: Mapping[str, str]) -> Asked:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.encode(errors="surrogateescape") + b"\0")
    said = {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in vars(options).items()}
    splits = {name.replace("_", "-"): said.pop(name) for name in SPLIT_OPTIONS}
    conversion = {"ecgscale": __version__, "dataset": dataset, "records": str(len(items)), NAMES: digest.hexdigest()}
    return {
        "conversion": conversion | {name.replace("_", "-"): value for name, value in said.items()} | dict(arguments),
        "splits": splits,
    }
