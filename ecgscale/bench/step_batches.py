"""Batches for steps that are measured: synthetic ones, which are always ready, and those of a data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ecgscale.bench.step_case import Case
from ecgscale.data.batch import ECGBatch, synthetic_batch
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.source_options import listed
from ecgscale.data.stream import TrainStream
from ecgscale.objectives import OBJECTIVES
from ecgscale.training.loop import TrainConfig


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
    segment_s, segments = case.samples / shards.rate_hz, OBJECTIVES.find(case.config.objective.name).segments
    data = DataConfig(shards=places, segment_s=segment_s, min_record_s=segments * segment_s)
    selection = Selection(shards, data, "train")
    order = TrainConfig(global_batch=case.batch * case.ranks).order(selection, case.ranks)
    return TrainStream(selection, order, rank, case.ranks, segments)
