"""Batches for steps that are measured: synthetic ones, which are always ready, and those of a data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ecgscale.bench.step_case import Case
from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.source_options import listed
from ecgscale.data.stream import TrainStream
from ecgscale.pretrain import SEGMENTS
from ecgscale.record import LEADS
from ecgscale.training.loop import TrainConfig


def synthetic_batch(rows: int, samples: int, first_position: int = 0) -> ECGBatch:
    """Random counts; the first half of the rows holds segment 0, the second segment 1 of the same positions."""
    position_B = first_position + torch.arange(rows // 2).repeat(2)
    signal_BLT = torch.randint(-2000, 2000, (rows, len(LEADS), samples), dtype=torch.int16)
    return ECGBatch(
        signal_BLT=signal_BLT,
        gain_BL=torch.full((rows, len(LEADS)), 1e-3),
        offset_BL=torch.zeros(rows, len(LEADS)),
        length_B=torch.full((rows,), samples),
        patient_B=position_B,
        segment_B=torch.arange(2).repeat_interleave(rows // 2),
        position_B=position_B,
        record_B=position_B,
        padded=False,
    )


def synthetic_batches(case: Case, rank: int) -> Iterator[ECGBatch]:
    """Without end, from a few that are made beforehand, as a loader that is never late."""
    torch.manual_seed(1 + rank)
    pool = [synthetic_batch(case.rows, case.samples, (4 * rank + i) * case.batch) for i in range(4)]
    if case.device == "cuda":
        pool = [batch.pin_memory() for batch in pool]
    while True:
        yield from pool


def shard_stream(case: Case, rank: int) -> TrainStream:
    """What `ecgscale pretrain` reads of the case's shards; raises InputError where they do not give such batches."""
    places = list(listed(case.shards))
    data = DataConfig(shards=places)
    shards = ShardSet.open(places, data.cache)
    segment_s = case.samples / shards.rate_hz
    data = DataConfig(shards=places, segment_s=segment_s, min_record_s=SEGMENTS * segment_s)
    selection = Selection(shards, data, "train")
    order = TrainConfig(global_batch=case.batch * case.ranks).order(selection, case.ranks)
    return TrainStream(selection, order, rank, case.ranks, SEGMENTS)
