"""`ecgscale verify` and `ecgscale inspect`: what is in a data set folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ecgscale.data.shards import SPLITS, ShardSet, read_manifest, verify_shard
from ecgscale.errors import InputError
from ecgscale.plot import plot_record
from ecgscale.record import LEADS

_SHOWN_VALUES = 12


def verify_dataset(folder: Path) -> str:
    """One line when every byte and count is right; raises InputError that names the shard otherwise."""
    shards = ShardSet.open(folder)
    entries = read_manifest(folder)["shards"]
    for shard, entry in zip(tqdm(shards.shards, desc="verify", unit="shard", disable=None), entries, strict=True):
        verify_shard(shard, entry)
    return f"{folder}: {len(shards)} records in {len(entries)} shards, all checksums right"


def summarise(folder: Path) -> str:
    """Records, patients, hours, leads, rates and labels of a data set."""
    shards, manifest = ShardSet.open(folder), read_manifest(folder)
    samples, split = shards.column("samples"), shards.column("split")
    duration_s = samples / shards.column("rate_hz")
    lead_bits = shards.column("leads")
    megabytes = sum(entry["bytes"] for entry in manifest["shards"]) / 1e6
    lines = [
        f"data set    {manifest['dataset']}",
        f"records     {len(shards)} in {len(shards.shards)} shards, {megabytes:.1f} MB; "
        f"{manifest['rejected']} rejected",
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
        lines + [f"label       {name}: {_counted(values)}" for name, values in sorted(_labels(shards).items())]
    )


def _labels(shards: ShardSet) -> dict[str, Counter[str]]:
    labels: dict[str, Counter[str]] = {}
    for shard in shards.shards:
        for record in range(len(shard)):
            for name, values in shard.metadata(record)["labels"].items():
                labels.setdefault(name, Counter()).update(values)
    return labels


def _counted(values: Counter[str]) -> str:
    shown = ", ".join(f"{value} {count}" for value, count in values.most_common(_SHOWN_VALUES))
    return shown + (f", … ({len(values)} values)" if len(values) > _SHOWN_VALUES else "")


def plot_recording(folder: Path, number: str, out: str) -> str:
    """Draw recording ``number`` of a data set, counted from 0; returns the line to print."""
    shards = ShardSet.open(folder)
    if not number.isdecimal() or int(number) >= len(shards):
        raise InputError(f"--plot {number}: give a recording from 0 to {len(shards) - 1}")
    shard, record = shards.locate(int(number))
    plot_record(shard.record(record), Path(out))
    return f"{out}: recording {number} of {folder}"
