"""The recordings that the stream is measured on: the same ones as a plain and as a compressed data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.payload import PAYLOADS, Payload
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import MANIFEST
from ecgscale.data.sources.protocol import Source
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.record import Record
from ecgscale.simulate import Simulation

_DURATION_S = 5.0


@dataclass(frozen=True)
class Sets:
    """One data set in each payload: equal records of twelve leads and equal length, all for training."""

    described: str
    folders: dict[Payload, Path]
    records: int
    samples: int  # of a lead
    rate_hz: float

    @property
    def record_bytes(self) -> int:
        """int16 samples of all leads."""
        return 2 * len(LEADS) * self.samples

    @property
    def duration_s(self) -> float:
        return self.samples / self.rate_hz

    def open(self, payload: Payload) -> ShardSet:
        return ShardSet.open(self.folders[payload])


@dataclass(frozen=True)
class _Chosen:
    """Records of data set folders, as a source."""

    places: tuple[str, ...]
    numbers: tuple[int, ...]
    dataset: str = "chosen"

    def items(self) -> list[str]:
        return [f"{number:010d}" for number in self.numbers]

    def read(self, item: str) -> Record:
        return _opened(self.places).record(int(item))


@cache  # each worker opens it once
def _opened(places: tuple[str, ...]) -> ShardSet:
    return ShardSet.open(places)


def make_sets(places: list[str], out: Path, records: int, workers: int = os.cpu_count() or 1) -> Sets:
    """Simulated recordings or those of data set folders, at most so many, in both payloads below ``out``.

    What an earlier run left there is used again. Raises InputError for folders without records of twelve leads.
    """
    if places:
        shards = ShardSet.open(places)
        numbers = _alike(shards, records)
        samples, rate_hz = int(shards.column("samples")[numbers[0]]), shards.rate_hz
        source: Source = _Chosen(tuple(places), numbers)
        name, records = f"{shards.identity[:12]}-{len(numbers)}", len(numbers)
        folders_named = ", ".join(Path(place).name for place in places)
        described = f"{records} of the {len(shards)} recordings of {folders_named}"
    else:
        simulation = Simulation(patients=records // 2, records_per_patient=2, duration_s=_DURATION_S)
        samples, rate_hz, source = round(_DURATION_S * simulation.rate_hz), simulation.rate_hz, simulation
        name, described = f"simulated-{records}", f"{records} simulated recordings"
    folders = {payload: out / f"{name}-{payload}" for payload in PAYLOADS}
    for payload, folder in folders.items():
        if not (folder / MANIFEST).exists():
            options = IngestOptions(rate_hz=rate_hz, payload=payload, validation_fraction=0.0)
            ingest(source, folder, options, workers)
    described += f", {len(LEADS)} leads of {samples} samples at {rate_hz:g} Hz"
    return Sets(described, folders, records, samples, rate_hz)


def _alike(shards: ShardSet, records: int) -> tuple[int, ...]:
    """Numbers of at most so many records of all leads and the most frequent length, from all over the set."""
    samples = shards.column("samples")
    complete = shards.column("leads") == (1 << len(LEADS)) - 1
    if not complete.any():
        raise InputError("the data sets hold no recording of twelve leads; the bench needs some")
    lengths, counts = np.unique(samples[complete], return_counts=True)
    fitting = np.flatnonzero(complete & (samples == lengths[counts.argmax()]))
    return tuple(fitting[np.unique(np.linspace(0, len(fitting) - 1, records).astype(int))].tolist())
