"""Which recordings are read, and how windows are cut from them into batches.

Shape suffixes: P positions, R records, S shards, B rows, L the twelve leads, T samples, C classes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ecgscale.data.batch import ECGBatch
from ecgscale.data.open_tars import UnreadableShardError
from ecgscale.data.order import MIXTURE_BLOCK, Mixture, Order, mixture_quotas
from ecgscale.data.payload import BLOCK
from ecgscale.data.remote import CacheConfig
from ecgscale.data.shard_set import DamagedRecordError, ShardSet, lead_positions
from ecgscale.data.shards import SPLITS
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS, chosen_leads
from ecgscale.record import Counts, moments
from ecgscale.rng import Purpose, below, random_words
from ecgscale.settings import option

Int64 = npt.NDArray[np.int64]
Normalisation = Literal["mv", "zscore"]

_MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataConfig:
    """Which recordings are read and how windows are cut from them."""

    shards: list[str] = option(default_factory=list, resumable=True)
    """Data set folders that `ecgscale ingest`, `simulate` or `index` made, or their s3://, gs:// or http(s):// URLs."""
    weights: list[float] = field(default_factory=list)
    """Shares of the data sets in training, one for each of data.shards; none: all are read as one set."""
    temperature: float = 0.0
    """Shares by size instead: recordings^(1/temperature). 1: by size, larger: more even. 0: all are read as one set."""
    segment_s: float = 5.0
    """Length of one segment in seconds; pretraining cuts two adjacent ones from each recording."""
    min_record_s: float = 10.0
    """Shorter recordings are left out of training, and counted; task.min_scored_s is for scores. Below two segments,
    segments become shorter and are padded."""
    leads: list[str] = field(default_factory=list)
    """Leads that are kept, such as I,II,V2, or a set of the CinC 2021 challenge by its size: 12, 6, 4, 3, 2 or 1; none:
    all. The others are masked in every batch, as if the recordings did not have them."""
    normalisation: Normalisation = "mv"
    """mv: millivolts as they are. zscore: each lead minus its mean, over its standard deviation, over the recording."""
    shuffle_window: int = 16384
    """Recordings of one lane that are shuffled among each other."""
    workers: int = option(1, resumable=True)
    """Threads that make batches ahead of need; 0: none, batches are made when they are asked for."""
    unreadable: Literal["stop", "skip"] = option("stop", resumable=True)
    """Damaged recordings, shards that cannot be fetched. stop: end the run. skip: read others instead, and count them;
    in validation they are blank."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.segment_s <= 0:
            raise InputError(f"data.segment_s {self.segment_s:g}: give a positive number of seconds")
        if self.min_record_s <= 0:
            raise InputError(f"data.min_record_s {self.min_record_s:g}: give a positive number of seconds")
        try:
            chosen_leads(self.leads)
        except InputError as error:
            raise InputError(f"data.leads: {error}") from error
        if self.shuffle_window < 1:
            raise InputError(f"data.shuffle_window {self.shuffle_window}: give 1 or more recordings")
        if not 0 <= self.workers <= _MOST_WORKERS:
            raise InputError(f"data.workers {self.workers}: give 0 to {_MOST_WORKERS} threads")
        if self.weights and (len(self.weights) != len(self.shards) or not all(0 < w < np.inf for w in self.weights)):
            raise InputError(
                f"data.weights {self.weights}: give a positive number for each of the {len(self.shards)} data.shards"
            )
        if self.temperature and (self.temperature < 1 or self.weights):
            raise InputError(f"data.temperature {self.temperature:g}: give 1 or more, and no data.weights")

    @property
    def lead_positions(self) -> list[int]:
        """Which of the twelve leads are kept."""
        return [LEADS.index(lead) for lead in chosen_leads(self.leads) or LEADS]


class Selection:
    """The records of one split that are long enough, and how windows are cut from them."""

    def __init__(
        self, shards: ShardSet, config: DataConfig, split: str, keep: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """``keep`` (records of the whole set,) narrows the selection further, to labelled records for example."""
        self.shards, self.config, self.split = shards, config, split
        self.numbers = shards.select(split, config.min_record_s)  # (R,) of the whole set, in its order
        self._keep, asked_for = keep, shards.count(split)
        if keep is not None:
            self.numbers = self.numbers[keep[self.numbers]]
            asked_for = int(np.count_nonzero(keep & (shards.column("split") == SPLITS.index(split))))
        self.too_short = asked_for - len(self.numbers)
        self.first_S = np.searchsorted(self.numbers, shards.first_S)  # (S + 1,) where a shard's records begin
        self.samples = round(config.segment_s * shards.rate_hz)  # T
        self._masked = [i for i in range(len(LEADS)) if i not in config.lead_positions]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def counts(self) -> tuple[int, ...]:
        """(S,) records of each shard."""
        return tuple(np.diff(self.first_S).tolist())

    @property
    def counts_of_sets(self) -> Int64:
        """(Q,) records of each data set folder."""
        first_Q = np.cumsum([0, *(len(data_set.shards) for data_set in self.shards.sets)])
        counts: Int64 = np.diff(self.first_S[first_Q])
        return counts

    def some(self, recordings: int, seed: int) -> Selection:
        """So many of these records, all of them for 0, from as few shards as hold them, which are chosen at random."""
        if not 0 < recordings < len(self):
            return self
        word_S = random_words(seed, Purpose.SOME_SHARDS, 0, len(self.shards.shards))[0]
        order_S = np.argsort(word_S, kind="stable")
        enough = int(np.searchsorted(np.cumsum(np.array(self.counts)[order_S]), recordings)) + 1
        keep = np.zeros(len(self.shards), bool)
        for shard in sorted(order_S[:enough].tolist()):
            keep[self.numbers[self.first_S[shard] : self.first_S[shard + 1]]] = True
        keep[np.flatnonzero(keep)[recordings:]] = False
        return Selection(self.shards, self.config, self.split, keep)

    def with_kept_leads(self) -> Selection:
        """Those of these records that have any of the leads that the config keeps."""
        kept_bits = np.uint16(sum(1 << position for position in self.config.lead_positions))
        keep = np.zeros(len(self.shards), bool)
        keep[self.numbers] = self.shards.take("leads", self.numbers) & kept_bits > 0
        return Selection(self.shards, self.config, self.split, keep)

    def none(self) -> Selection:
        """No record of these."""
        return Selection(self.shards, self.config, self.split, np.zeros(len(self.shards), bool))

    def refuse_empty(self, setting: str = "data.min_record_s") -> None:
        """Raises InputError where no record is left; ``setting`` is the key that says how long they must be."""
        if len(self):
            return
        names, n = ", ".join(self.shards.names), self.shards.count(self.split)
        split = "training" if self.split == "train" else self.split
        if not n:
            there = ", ".join(f"{self.shards.count(name)} for {name}" for name in SPLITS if self.shards.count(name))
            raise InputError(
                f"{names}: no {split} recordings, only {there}; give a set that has some, or ingest it with other "
                "splits"
            )
        asked_R = self.shards.column("split") == SPLITS.index(self.split)
        if self._keep is not None:
            asked_R &= self._keep
        why = "the task leaves them out"
        if self.too_short:
            longest_s = self.shards.column("samples")[asked_R].max() / self.shards.rate_hz
            why = (
                f"{self.too_short} are shorter than {setting} {self.config.min_record_s:g} s, "
                f"the longest of them has {longest_s:g} s"
            )
            why += "; the task leaves out the others" if self.too_short < n else ""
        raise InputError(f"{names}: none of the {n} {split} recordings can be used: {why}")

    def order(self, global_batch: int, contrast_batch: int, lanes: int, seed: int) -> Order:
        """The order in which these records are read for training. Raises InputError where they are too few."""
        self.refuse_empty()
        if self.too_short and len(self) < global_batch:
            raise InputError(
                f"train.global_batch {global_batch} is more than the {len(self)} usable recordings; {self.too_short} "
                f"more are shorter than data.min_record_s {self.config.min_record_s:g} s; lower one of the two"
            )
        window = self.config.shuffle_window
        return Order(self.counts, global_batch, contrast_batch, lanes, seed, window, self._mixture())

    def shares(self, mixture: Mixture) -> list[str]:
        """For people: what each set has of the stream, and what that means for its recordings."""
        shown = zip(self.shards.names, mixture.quota, self.counts_of_sets.tolist(), strict=True)
        return [f"{name} {quota / MIXTURE_BLOCK:.3f} of {usable} recordings" for name, quota, usable in shown]

    def _mixture(self) -> Mixture | None:
        if not (self.config.weights or self.config.temperature):
            return None
        records = self.counts_of_sets
        if not records.all():
            empty = self.shards.sets[int(np.argmin(records))]
            of_split = int(np.count_nonzero(empty.columns["split"] == SPLITS.index(self.split)))
            why = f", {of_split} are shorter than data.min_record_s {self.config.min_record_s:g} s" if of_split else ""
            raise InputError(
                f"{empty.place}: no usable recording for {self.split}ing{why}; leave it out of the mixture"
            )
        weights = self.config.weights or (records ** (1 / self.config.temperature)).tolist()
        if len(weights) > MIXTURE_BLOCK:
            raise InputError(f"data.shards names {len(weights)} sets; a mixture has at most {MIXTURE_BLOCK}")
        return Mixture(tuple(len(data_set.shards) for data_set in self.shards.sets), mixture_quotas(weights))

    def batch(
        self,
        number_P: Int64,
        position_P: Int64,
        segments: int,
        seed: int,
        target: npt.NDArray[np.float32] | None = None,
        buffer: torch.Tensor | None = None,
    ) -> ECGBatch:
        """Cut ``segments`` adjacent windows from each of the records; where they begin is drawn by position.

        Row s·P + p is segment s of position p. ``target`` (records of the whole set, C) gives rows their labels. The
        samples are written into ``buffer`` (B, 12, T) if there is one.
        """
        rows, take = len(number_P) * segments, self.shards.take
        samples_P, scale_PL = take("samples", number_P).astype(np.int64), take("scale", number_P)
        length_P = np.minimum(self.samples, samples_P // segments)
        starts_P = samples_P - segments * length_P + 1
        start_P = np.zeros_like(samples_P)
        if starts_P.max(initial=1) > 1:
            start_P = below(random_words(seed, Purpose.CROP, position_P, 1)[:, 0], starts_P)
        signal = torch.empty((rows, len(LEADS), self.samples), dtype=torch.int16) if buffer is None else buffer
        signal_SPLT = signal.numpy().reshape(segments, len(number_P), len(LEADS), self.samples)
        gain_PL, offset_PL = scale_PL, np.zeros_like(scale_PL)
        if self.config.normalisation == "zscore":
            gain_PL, offset_PL = self._gather_zscored(signal_SPLT, number_P, start_P, length_P)
        else:
            self._gather(signal_SPLT, number_P, start_P, length_P)
        gain_PL[:, self._masked] = 0  # the samples stay, since no kernel reads them

        def per_row(column_P: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([column_P] * segments))

        return ECGBatch(
            signal_BLT=signal,
            gain_BL=per_row(gain_PL),
            offset_BL=per_row(offset_PL),
            length_B=per_row(length_P),
            patient_B=per_row(take("patient", number_P)),
            segment_B=torch.from_numpy(np.repeat(np.arange(segments), len(number_P))),
            position_B=per_row(position_P),
            record_B=per_row(number_P.astype(np.int64)),
            padded=bool((length_P < self.samples).any()),
            target_BC=None if target is None else per_row(target[number_P]),
        )

    def _gather(self, signal_SPLT: npt.NDArray[np.int16], number_P: Int64, start_P: Int64, length_P: Int64) -> None:
        """Copy windows of records into the rows of a batch, and zeros where there is nothing."""
        segments = len(signal_SPLT)
        bits_P = self.shards.take("leads", number_P)
        whole_P = (bits_P == (1 << len(LEADS)) - 1) & (length_P == self.samples)
        if segments == 1 and whole_P.all() and (self.shards.take("samples", number_P) == self.samples).all():
            self.shards.read_whole(number_P, signal_SPLT[0])
            return
        stop_P = start_P + segments * length_P
        scratch_P = [_scratch()] * len(number_P)  # each window is copied before the next one is unpacked
        windows = self.shards.windows(number_P, start_P.tolist(), stop_P.tolist(), scratch_P)
        row_PLST, shape = signal_SPLT.transpose(1, 2, 0, 3), (len(LEADS), segments, self.samples)
        for row_LST, window_LT, whole, bits, length in zip(
            row_PLST, windows, whole_P.tolist(), bits_P.tolist(), length_P.tolist(), strict=True
        ):
            if whole:
                row_LST[...] = window_LT.reshape(shape)
            else:
                _place(row_LST.swapaxes(0, 1), window_LT, lead_positions(bits), length)

    def _gather_zscored(
        self, signal_SPLT: npt.NDArray[np.int16], number_P: Int64, start_P: Int64, length_P: Int64
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The same, with (P, L) gain and offset from the whole recording."""
        samples_P, bits_P = self.shards.take("samples", number_P), self.shards.take("leads", number_P)
        gain_PL, offset_PL = np.zeros((2, len(number_P), len(LEADS)), np.float32)
        signals = self.shards.windows(number_P, [0] * len(number_P), samples_P.tolist())
        for p, signal_LT in enumerate(signals):
            at, length = lead_positions(int(bits_P[p])), int(length_P[p])
            gain_PL[p, at], offset_PL[p, at] = zscore_gain(signal_LT)
            stop = int(start_P[p]) + len(signal_SPLT) * length
            # Behind the valid samples stands the offset, which is zero in z-units.
            rest_L = np.rint(offset_PL[p])
            _place(signal_SPLT[:, p], signal_LT[:, int(start_P[p]) : stop], at, length, rest_L)
        return gain_PL, offset_PL


def _place(
    row_SLT: npt.NDArray[np.int16],
    window_LT: Counts,
    at: list[int],
    length: int,
    rest_L: npt.NDArray[np.float32] | None = None,
) -> None:
    """Write the segments of a record that lacks leads or is short."""
    row_SLT[...] = 0 if rest_L is None else rest_L[:, None]
    for s in range(len(row_SLT)):
        row_SLT[s, at, :length] = window_LT[:, s * length : (s + 1) * length]


_of_thread = threading.local()


def _scratch() -> Counts:
    """Room to decompress one block, of this thread's own."""
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = np.empty(len(LEADS) * BLOCK, np.int16)
    scratch: Counts = _of_thread.scratch
    return scratch


def zscore_gain(
    signal_LT: npt.NDArray[np.generic],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Gain and offset that bring each lead to mean 0 and standard deviation 1; gain 0 for a flat lead."""
    mean_L, std_L = moments(signal_LT)
    gain_L = np.divide(1.0, std_L, out=np.zeros_like(std_L), where=std_L > 0)
    return gain_L.astype(np.float32), mean_L.astype(np.float32)


def evaluation_batches(
    selection: Selection,
    batch: int,
    segments: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    target: npt.NDArray[np.float32] | None = None,
) -> Iterator[tuple[ECGBatch, bool]]:
    """Every record of the selection once, ``batch`` positions at a time over all ranks.

    Yields the rank's rows and whether they are a share: the last, incomplete batch goes to every rank whole.
    """
    for first in range(0, len(selection), batch):
        positions = np.arange(first, min(first + batch, len(selection)), dtype=np.int64)
        shared = len(positions) == batch
        if shared:
            positions = positions.reshape(world_size, -1)[rank]
        read = _readable if selection.config.unreadable == "skip" else Selection.batch
        yield read(selection, selection.numbers[positions], positions, segments, seed, target), shared


def _readable(
    selection: Selection,
    number_P: Int64,
    position_P: Int64,
    segments: int,
    seed: int,
    target: npt.NDArray[np.float32] | None,
) -> ECGBatch:
    """A batch in which unreadable records are blank, every lead missing: all ranks must go on with as many rows."""
    bad_P = np.zeros(len(number_P), bool)
    while not bad_P.all():
        try:
            shown_P = np.where(bad_P, number_P[np.argmin(bad_P)], number_P)
            batch = selection.batch(shown_P, position_P, segments, seed, target)
        except UnreadableShardError as error:
            bad_P |= selection.shards.shard_of(number_P) == error.shard
        except DamagedRecordError as error:
            bad_P |= number_P == error.number
        else:
            bad_B = torch.from_numpy(np.tile(bad_P, segments))
            return batch.with_gain(batch.gain_BL * ~bad_B[:, None])
    raise InputError(f"none of {len(number_P)} recordings for {selection.split} can be read, see data.unreadable")
