"""Data set folders, opened for reading: every record by its number, straight from memory-mapped tars.

Records are numbered through all folders, shard by shard. Members are read by offset, never extracted, and nothing is
ever unpickled. Everything that an index claims is held against the sizes of its tars when a set is opened.

Shape suffixes: R records asked for, S shards, L leads that are there, T samples.
"""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Collection, Iterator, Sequence
from ctypes import memmove
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from ecgscale.data.data_set import DataSet
from ecgscale.data.foreign import as_own, describe, foreign_name
from ecgscale.data.open_tars import OpenTars
from ecgscale.data.payload import BLOCK, Bytes, DamagedError, decode_one_block, decode_window
from ecgscale.data.remote import CacheConfig, ShardCache, check_place, is_remote
from ecgscale.data.schema import parse_json, read_metadata
from ecgscale.data.shards import (
    SPLITS,
    check_patient_disjoint,
)
from ecgscale.data.tar import name_before
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import Counts, Record

Int64 = npt.NDArray[np.int64]
T = TypeVar("T")

_CHUNK = 1 << 18  # records that are checked or selected at once: ten million must not cost ten temporary arrays


class ShardSet:
    """The records of one or several data set folders at one sample rate, in the order of their manifests."""

    def __init__(self, sets: Sequence[DataSet], cache: ShardCache) -> None:
        self.sets = tuple(sets)
        self.rate_hz: float = sets[0].manifest["rate_hz"]
        # A run continues only on the data it began with.
        self.identity = hashlib.sha256("".join(data_set.identity for data_set in sets).encode()).hexdigest()
        self.shards = tuple(shard for data_set in sets for shard in data_set.shards)
        self.first_S = _first([shard.records for shard in self.shards])  # (S + 1,) number of each shard's first record
        self._first_of_set = _first([len(data_set) for data_set in sets])
        self._verified = np.zeros(len(self), bool)  # plain payloads that this process has checked
        self._plain_S = [shard.payload == "npy" for shard in self.shards]
        # Rules where rows stand in another order than LEADS
        self._reordered_S = [
            data_set.rules if data_set.rules and data_set.rules.lead_order != LEADS else None
            for data_set in sets
            for _ in data_set.shards
        ]
        plain_S = np.array(self._plain_S, bool)
        self._straight_S = plain_S & np.array([rules is None for rules in self._reordered_S], bool)
        self._packed_S = ~plain_S
        self._tars = OpenTars(self.shards, cache)

    @staticmethod
    def open(folders: str | Path | Sequence[str | Path], cache: CacheConfig | None = None) -> ShardSet:
        """Open data set folders; raises InputError for missing, incomplete, damaged or mixed-rate ones."""
        places = [str(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        if not places:
            raise InputError("data.shards names no folder; give the output folder of `ecgscale ingest`")
        for place in places:
            check_place(place)
            if "\0" in place:
                raise InputError(f"{place!r}: no path; give a local folder or a URL")
        if len({place if is_remote(place) else str(Path(place).resolve()) for place in places}) < len(places):
            raise InputError(f"data.shards names a folder twice: {', '.join(places)}")
        _allow_open_files()
        store = ShardCache(cache or CacheConfig())
        sets = [DataSet.open(place, store) for place in places]
        rates = {data_set.manifest["rate_hz"] for data_set in sets}
        if len(rates) > 1:
            raise InputError(
                f"data sets of different rates {sorted(rates)} Hz cannot be mixed; ingest them at one --rate-hz"
            )
        _check_disjoint_across(sets)
        return ShardSet(sets, store)

    def __len__(self) -> int:
        return int(self.first_S[-1])

    @property
    def names(self) -> list[str]:
        """A name for each folder: its last part, with a number where several share it."""
        last = [data_set.place.rstrip("/").rpartition("/")[2] for data_set in self.sets]
        return [name if last.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(last)]

    def column(self, name: str) -> npt.NDArray[Any]:
        """One index column over all records."""
        parts = [data_set.columns[name] for data_set in self.sets]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, name: str, number_R: Int64) -> npt.NDArray[Any]:
        """One index column at some records."""
        if len(self.sets) == 1:
            return self.sets[0].columns[name][number_R]
        set_R = np.searchsorted(self._first_of_set, number_R, side="right") - 1
        sample = self.sets[0].columns[name]
        taken = np.empty((len(number_R), *sample.shape[1:]), sample.dtype)
        for s in np.unique(set_R):
            here = set_R == s
            taken[here] = self.sets[s].columns[name][number_R[here] - self._first_of_set[s]]
        return taken

    def shard_of(self, number_R: Int64) -> Int64:
        """The shard that holds each record."""
        return np.searchsorted(self.first_S, number_R, side="right") - 1

    def count(self, split: str) -> int:
        """Records of a split."""
        code = SPLITS.index(split)
        return sum(int(np.count_nonzero(data_set.columns["split"] == code)) for data_set in self.sets)

    def select(self, split: str, min_s: float = 0.0) -> Int64:
        """Sorted numbers of the records of a split that are at least ``min_s`` seconds long."""
        code, numbers = SPLITS.index(split), []
        width = np.uint32 if len(self) < 1 << 32 else np.int64
        for data_set, first in zip(self.sets, self._first_of_set, strict=False):
            for start in range(0, len(data_set), _CHUNK):
                part = slice(start, start + _CHUNK)
                long_R = data_set.columns["samples"][part] / self.rate_hz >= min_s
                chosen_R = np.flatnonzero((data_set.columns["split"][part] == code) & long_R)
                numbers.append((chosen_R + (first + start)).astype(width))  # each chunk, not ten million at once
        return np.concatenate(numbers)

    # -- one record --

    def lead_positions(self, number: int) -> list[int]:
        """Which of the twelve leads the rows of a record's signal are."""
        return lead_positions(int(self.take("leads", np.array([number]))[0]))

    def signal(self, number: int) -> Counts:
        """(L, T) int16 counts, L the leads that are there. Raises InputError for a damaged record."""
        samples = int(self.take("samples", np.array([number]))[0])
        return next(self.windows(np.array([number]), [0], [samples]))

    def metadata(self, number: int) -> dict[str, Any]:
        """What a record's JSON says. Verified: raises InputError for a damaged one."""
        at = np.array([number])
        start, length, checksum = (
            int(self.take(name, at)[0]) for name in ("json_offset", "json_length", "json_checksum")
        )

        def content_of(tar: Bytes) -> bytes:
            _check(tar[start : start + length], checksum)
            return tar[start : start + length].tobytes()

        content = self._read(number, "the JSON of ", content_of)
        try:
            return self._fields(number, content, start)
        except InputError as error:
            raise self._damage(number, "the JSON of ", str(error)) from error

    def _fields(self, number: int, content: bytes, start: int) -> dict[str, Any]:
        """A record's JSON, under our own keys where others wrote it."""
        data_set = self.sets[int(np.searchsorted(self._first_of_set, number, side="right")) - 1]
        if data_set.rules is None:
            return read_metadata(content)
        shard = int(self.shard_of(np.array([number]))[0])
        place = self.shards[shard].place
        name = foreign_name(place, name_before(self._tars.bytes_of(shard), start, place))
        samples, bits = (int(self.take(column, np.array([number]))[0]) for column in ("samples", "leads"))
        described = describe(parse_json(content), data_set.rules, bits.bit_count())
        if [*described.leads_L] != [lead for lead in data_set.rules.lead_order if lead in described.leads_L]:
            raise InputError(f"its rows are {','.join(described.leads_L)}, not as indexed; index the tars again")
        return as_own(described, name, self.shards[shard].dataset, samples)

    def record(self, number: int) -> Record:
        """The whole record, as it was before it was written."""
        fields = self.metadata(number)
        return Record(
            name=fields["name"],
            signal_LT=self.signal(number),
            scale_L=np.array(fields["scale_mv"], np.float32),
            rate_hz=fields["rate_hz"],
            leads=tuple(fields["leads"]),
            patient=fields["patient"],
            labels=fields["labels"],
            metadata=fields["metadata"],
            invalid_samples=fields["invalid_samples"],
        )

    # -- many records --

    def windows(
        self,
        number_R: Int64,
        start_R: Sequence[int],
        stop_R: Sequence[int],
        scratch_R: Sequence[Counts | None] | None = None,
    ) -> Iterator[Counts]:
        """Samples ``start`` to ``stop`` of each record, (L, stop − start), views where that is possible.

        Compressed payloads are verified on every read, plain ones when this process first touches them. ``scratch``
        (L · min(T, BLOCK) numbers) is where a compressed record may be unpacked; what is yielded is then a view of it.
        Raises InputError for a damaged record.
        """
        columns = ("offset", "length", "samples", "leads", "checksum")
        offset_R, length_R, samples_R, leads_R, checksum_R = (self.take(name, number_R).tolist() for name in columns)
        verified_R = self._verified[number_R].tolist()
        reordered = self._reordered_S
        rows = zip(
            number_R.tolist(), self.shard_of(number_R).tolist(), offset_R, length_R, samples_R, leads_R, checksum_R,
            verified_R, start_R, stop_R, scratch_R or [None] * len(number_R), strict=True,
        )  # fmt: skip
        tar_of, open_tar, is_plain, array = self._tars.open, self._tars.bytes_of, self._plain_S, np.ndarray
        for number, shard, offset, length, samples, bits, checksum, verified, start, stop, scratch in rows:
            tar, leads = tar_of.get(shard), bits.bit_count()
            if tar is None:
                tar = open_tar(shard)
            if is_plain[shard]:
                if not verified:
                    if xxhash.xxh3_64_intdigest(tar[offset : offset + length].data) != checksum:
                        tar = self._mended(number, offset, length, checksum)
                    self._verified[number] = True
                first = offset + length - 2 * (samples * leads - start)
                window = array((leads, stop - start), np.int16, tar, first, (2 * samples, 2))
                rules = reordered[shard]
                yield window if rules is None else window[rules.rows(bits)]
            else:
                asked = (checksum, leads, samples, start, stop, scratch)
                try:
                    window = decode_window(tar[offset : offset + length], *asked)
                except DamagedError:
                    place = slice(offset, offset + length)
                    window = self._read(number, "", partial(_window, place=place, asked=asked))
                yield window

    def read_whole(self, number_R: Int64, out_RLT: Counts) -> None:
        """All of the signals, which have twelve leads and T samples each, straight into the rows of a batch."""
        shard_R, samples = self.shard_of(number_R), out_RLT.shape[2]
        if self._straight_S[shard_R].all():
            self._copy_whole(number_R, shard_R, out_RLT)
            return
        if samples <= BLOCK and self._packed_S[shard_R].all():
            self._unpack_whole(number_R, shard_R, out_RLT)
            return
        signals = self.windows(number_R, [0] * len(number_R), [samples] * len(number_R))
        for row_LT, signal_LT in zip(out_RLT, signals, strict=True):
            row_LT[...] = signal_LT

    def _unpack_whole(self, number_R: Int64, shard_R: Int64, out_RLT: Counts) -> None:
        columns = ("offset", "length", "checksum")
        offset_R, length_R, checksum_R = (self.take(name, number_R).tolist() for name in columns)
        tars = {shard: self._tars.bytes_of(shard).data for shard in np.unique(shard_R).tolist()}
        _, leads, samples = out_RLT.shape
        rows = zip(shard_R.tolist(), offset_R, length_R, checksum_R, out_RLT.reshape(len(out_RLT), -1), strict=True)
        for row, (shard, offset, length, checksum, values) in enumerate(rows):
            try:
                decode_one_block(tars[shard][offset : offset + length], checksum, leads, samples, values)
            except DamagedError:
                place, asked = slice(offset, offset + length), (checksum, leads, samples, values)
                self._read(int(number_R[row]), "", partial(_one_block, place=place, asked=asked))
                tars[shard] = self._tars.bytes_of(shard).data

    def _copy_whole(self, number_R: Int64, shard_R: Int64, out_RLT: Counts) -> None:
        """One memmove a record: numpy's own copy of a row costs a microsecond more, which is a fifth of it."""
        size = out_RLT[0].nbytes
        offset_R, length_R = self.take("offset", number_R).astype(np.int64), self.take("length", number_R)
        used = np.unique(shard_R)
        tars = [self._tars.bytes_of(shard) for shard in used.tolist()]  # held here, they stay mapped
        for i in np.flatnonzero(~self._verified[number_R]).tolist():
            at = np.searchsorted(used, shard_R[i])
            offset, length = int(offset_R[i]), int(length_R[i])
            checksum = int(self.take("checksum", number_R[i : i + 1])[0])
            if xxhash.xxh3_64_intdigest(tars[at][offset : offset + length].data) != checksum:
                tars[at] = self._mended(int(number_R[i]), offset, length, checksum)
            self._verified[number_R[i]] = True
        base_R = np.array([tar.ctypes.data for tar in tars])[np.searchsorted(used, shard_R)]
        from_R = (base_R + offset_R + length_R - size).tolist()
        to = out_RLT.ctypes.data
        for row, source in enumerate(from_R):
            memmove(to + row * size, source, size)

    def _mended(self, number: int, offset: int, length: int, checksum: int) -> Bytes:
        """The shard that holds a plain record, in which the record is as the index says. Raises DamagedRecordError."""

        def checked(tar: Bytes) -> Bytes:
            _check(tar[offset : offset + length], checksum)
            return tar

        return self._read(number, "", checked)

    def _read(self, number: int, what: str, read: Callable[[Bytes], T]) -> T:
        """What ``read`` makes of a record's shard; once more where a copy of a remote one on this node was damaged.

        Raises DamagedRecordError.
        """
        shard = int(self.shard_of(np.array([number]))[0])
        try:
            return read(self._tars.bytes_of(shard))
        except DamagedError:
            self._tars.mend(shard)
        try:
            return read(self._tars.bytes_of(shard))
        except DamagedError as error:
            raise self._damage(number, what, str(error)) from error

    def _damage(self, number: int, what: str, why: str) -> DamagedRecordError:
        shard = int(self.shard_of(np.array([number]))[0])
        inside = number - int(self.first_S[shard])
        place = self.shards[shard].place
        return DamagedRecordError(number, f"{place}: {what}record {inside} is damaged: {why}; copy or ingest it again")

    @property
    def cache(self) -> ShardCache:
        """Where remote shards are."""
        return self._tars.cache

    def keep_open(self, shards: Collection[int], lingering: Collection[int] = ()) -> None:
        """Keep these shards mapped, and in the cache, until the next call; others are closed when many are open.

        ``lingering`` ones too, unless the cache has no room without their space.
        """
        self._tars.keep(frozenset(shards), frozenset(lingering))

    def prefetch(self, shard: int) -> None:
        """Bring a remote shard into the cache. Raises InputError where that fails for good."""
        self._tars.prefetch(shard)

    def tar(self, shard: int) -> Bytes:
        """All bytes of a shard."""
        return self._tars.bytes_of(shard)


class DamagedRecordError(InputError):
    """A record whose bytes differ from their checksum."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def _check(member: Bytes, checksum: int) -> None:
    if xxhash.xxh3_64_intdigest(member.data) != checksum:
        raise DamagedError("its checksum differs from the index")


def _window(tar: Bytes, place: slice, asked: tuple[Any, ...]) -> Counts:
    return decode_window(tar[place], *asked)


def _one_block(tar: Bytes, place: slice, asked: tuple[Any, ...]) -> None:
    decode_one_block(tar.data[place], *asked)


def lead_positions(bits: int) -> list[int]:
    """The leads of a bit mask, as positions in LEADS."""
    return [i for i in range(len(LEADS)) if bits >> i & 1]


def _first(counts: Sequence[int]) -> Int64:
    return np.cumsum([0, *counts], dtype=np.int64)


def _allow_open_files() -> None:
    """As many as the system lets us: each mapped shard takes one or two, and a rank of a large set maps thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_disjoint_across(sets: Sequence[DataSet]) -> None:
    """A patient is (data set, id): only folders that share a data set's name can share a patient."""
    folders_of: dict[str, list[DataSet]] = {}
    for data_set in sets:
        for dataset in {shard.dataset for shard in data_set.shards}:
            folders_of.setdefault(dataset, []).append(data_set)
    for dataset, sharing in folders_of.items():
        if len(sharing) > 1:
            patient, split = (
                np.concatenate([folder.columns[name] for folder in sharing]) for name in ("patient", "split")
            )
            check_patient_disjoint(patient, split, f"data set {dataset!r} in {len(sharing)} folders")
