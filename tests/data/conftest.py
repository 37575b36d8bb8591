"""Small data sets, built once, and the means to build odd ones.

Shape suffixes: L leads, T samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.lead_names import LEADS
from ecgscale.record import Record
from ecgscale.simulate import Simulation
from in_memory import Records

RATE_HZ = 100.0


def _make_record(name: str, n_samples: int = 1000, leads: Sequence[str] = LEADS, **fields: object) -> Record:
    """Noise that is the record's own, so that any of its windows is found in no other place."""
    rng = np.random.default_rng([*name.encode()])
    options: dict[str, object] = {
        "scale_L": rng.uniform(1e-3, 5e-3, len(leads)).astype(np.float32),
        "rate_hz": RATE_HZ,
        "patient": f"patient of {name}",
    }
    signal_LT = rng.integers(-32767, 32768, (len(leads), n_samples), dtype=np.int16)
    return Record(name=name, signal_LT=signal_LT, leads=tuple(leads), **(options | fields))


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return _make_record


@pytest.fixture(scope="session")
def ingest_records() -> Callable[..., Path]:
    """Write records as a data set: (out, records, **IngestOptions) -> out."""

    def write(out: Path, records: Sequence[Record], **options: object) -> Path:
        ingest(Records(records), out, IngestOptions(**{"rate_hz": RATE_HZ} | options))
        return out

    return write


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    """40 recordings of 20 patients, 10 s at 100 Hz, in 5 shards. Not to be changed."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    options = IngestOptions(rate_hz=RATE_HZ, records_per_shard=8, test_fraction=0.2)
    ingest(Simulation(patients=20, rate_hz=RATE_HZ), out, options)
    return out


@pytest.fixture
def copied(simulated, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(simulated, tmp_path / "copied")


def _write_record(
    folder: Path, name: str, record: Record, comments: Sequence[str] = (), leads: Sequence[str] = ()
) -> Path:
    """A WFDB record of format 16, its leads in the order of ``leads`` (default: the record's own)."""
    folder.mkdir(parents=True, exist_ok=True)
    order = [record.leads.index(lead) for lead in leads or record.leads]
    lines = [
        f"{name}.dat 16 {1 / record.scale_L[i]:.6f}(0)/mV 16 0 {record.signal_LT[i, 0]} "
        f"{int(record.signal_LT[i].sum(dtype=np.int64)) % 65536} 0 {record.leads[i]}"
        for i in order
    ]
    head = f"{name} {len(order)} {record.rate_hz:g} {record.n_samples}"
    (folder / f"{name}.hea").write_text("\n".join([head, *lines, *(f"# {comment}" for comment in comments), ""]))
    (folder / f"{name}.dat").write_bytes(record.signal_LT[order].T.astype("<i2").tobytes())
    return folder / f"{name}.hea"


@pytest.fixture(scope="session")
def write_record() -> Callable[..., Path]:
    return _write_record


def _assert_same(one: Record, other: Record) -> None:
    """All fields, bit by bit."""
    for field in fields(Record):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Record, Record], None]:
    return _assert_same
