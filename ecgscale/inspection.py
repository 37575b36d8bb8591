"""`ecgscale verify` and `ecgscale inspect`: what is in a data set folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ecgscale.data.audit import verify_set, verify_shard
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.errors import InputError
from ecgscale.plot import plot_record
from ecgscale.record import LEADS

_SHOWN_VALUES = 12


def verify_dataset(folder: str) -> str:
    """One line when every byte and count is right; raises InputError that names the shard otherwise."""
    shards = ShardSet.open(folder)
    verify_set(shards)
    for shard in tqdm(range(len(shards.shards)), desc="verify", unit="shard", disable=None):
        verify_shard(shards, shard)
    return f"{folder}: {len(shards)} records in {len(shards.shards)} shards, all checksums right"


def summarise(folder: str) -> str:
    """Records, patients, hours, leads, rates and labels of a data set."""
    shards = ShardSet.open(folder)
    samples, split = shards.column("samples"), shards.column("split")
    duration_s = samples / shards.rate_hz
    lead_bits = shards.column("leads")
    stored, raw = (
        sum(shard.bytes for shard in shards.shards),
        2 * (np.bitwise_count(lead_bits) * samples.astype(np.int64)).sum(),
    )
    payloads = sorted({shard.payload for shard in shards.shards})
    rejected = sum(one.manifest["rejected"] for one in shards.sets)
    lines = [
        f"data set    {', '.join(sorted({_printable(shard.dataset) for shard in shards.shards}))}",
        f"records     {len(shards)} in {len(shards.shards)} shards; {rejected} rejected",
        f"size        {stored / 1e6:.1f} MB as {' and '.join(payloads)}, {stored / raw:.2f} of the int16 samples",
        f"patients    {len(np.unique(shards.column('patient')))}",
        f"hours       {duration_s.sum() / 3600:.2f}; recordings of {duration_s.min():g} to {duration_s.max():g} s",
        f"rate        {shards.rate_hz:g} Hz",
        "splits      " + ", ".join(f"{name} {int((split == code).sum())}" for code, name in enumerate(SPLITS)),
        "leads       "
        + ", ".join(
            f"{lead} {int((lead_bits >> i & 1).sum())}" for i, lead in enumerate(LEADS) if (lead_bits >> i & 1).any()
        ),
    ]
    return "\n".join(
        lines
        + [f"label       {_printable(name)}: {_counted(values)}" for name, values in sorted(_labels(shards).items())]
    )


def _labels(shards: ShardSet) -> dict[str, Counter[str]]:
    labels: dict[str, Counter[str]] = {}
    for number in tqdm(range(len(shards)), desc="labels", unit="rec", disable=None, leave=False):
        for name, values in shards.metadata(number)["labels"].items():
            labels.setdefault(name, Counter()).update(values)
    return labels


def _counted(values: Counter[str]) -> str:
    shown = ", ".join(f"{_printable(value)} {count}" for value, count in values.most_common(_SHOWN_VALUES))
    return shown + (f", … ({len(values)} values)" if len(values) > _SHOWN_VALUES else "")


def _printable(text: str) -> str:
    """A label may be anybody's, and hold what moves a terminal's cursor."""
    return text if text.isprintable() else ascii(text)


def plot_recording(folder: str, number: str, out: str) -> str:
    """Draw recording ``number`` of a data set, counted from 0; returns the line to print."""
    shards = ShardSet.open(folder)
    if not number.isdecimal() or int(number) >= len(shards):
        raise InputError(f"--plot {number}: give a recording from 0 to {len(shards) - 1}")
    plot_record(shards.record(int(number)), Path(out))
    return f"{out}: recording {number} of {folder}"
