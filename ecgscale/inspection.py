"""`ecgscale verify` and `ecgscale inspect`: what is in a data set, a run or an export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ecgscale.data.audit import verify_set, verify_shard
from ecgscale.data.copies import about_copies
from ecgscale.data.persons import odd_names
from ecgscale.data.remote import is_remote
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import MANIFEST, SPLITS
from ecgscale.errors import InputError
from ecgscale.export import described, is_model, part_of, read_model
from ecgscale.lead_names import LEADS, chosen_leads
from ecgscale.plot import plot_record

_SHOWN_VALUES = 12
_NO_CLASS = "(none)"  # how recordings are counted that are known to have no class


def verify_dataset(folder: str) -> str:
    """One line when every byte and count is right, and more on copies, and on ids that may be one patient's.

    Raises InputError that names the shard otherwise.
    """
    shards = ShardSet.open(folder)
    verify_set(shards)
    for shard in tqdm(range(len(shards.shards)), desc="verify", unit="shard", disable=None):
        verify_shard(shards, shard)
    right = f"{folder}: {len(shards)} records in {len(shards.shards)} shards, all checksums right"
    lines = (*about_copies(shards), *odd_names(shards))
    return "\n".join([right, *(f"{folder}: {line}" for line in lines)])


def summarise(folder: str, encoder: str = "") -> str:
    """What a data set holds, or what a model is. Raises InputError for a folder that is neither."""
    if is_remote(folder) or (Path(folder) / MANIFEST).exists() or any(Path(folder).glob("shard-*")):
        return summarise_dataset(folder)
    if is_model(Path(folder)):
        return summarise_model(Path(folder), encoder)
    what = "a folder without any of them" if Path(folder).is_dir() else "no folder"
    raise InputError(
        f"{folder} is no data set ({MANIFEST}), no export (config.json) and no run folder (checkpoints/), but {what}"
    )


def summarise_model(path: Path, encoder: str = "") -> str:
    """Parameters, shape, preprocessing, heads and origin of a model."""
    place, weights, about = read_model(path)
    model, profile = described(place, about, encoder)
    leads = chosen_leads(about.get("leads", [])) or profile.leads
    counts: Counter[str] = Counter()
    for name, tensor in weights.items():
        counts[part_of(name)] += tensor.numel()
    lines = [
        f"model       {about.get('format', 'checkpoint')} in {place}",
        f"parameters  {sum(counts.values()):,}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        f"shape       {model.in_full()}",
        f"profile     {profile.rate_hz:g} Hz, "
        + ("millivolts" if profile.normalisation == "mv" else "each lead z-scored over the recording")
        + f", segments of {profile.segment_s:g} s",
        f"leads       {', '.join(leads)}; any subset, the others are masked",
        f"step        {about.get('step', 'unknown')}",
    ]
    if task := about.get("task"):
        shown = [str(task[key]) for key in ("label", "kind", "protocol") if task.get(key)]
        lines.append(f"task        {_printable(', '.join(shown))}")
    if "head.weight" in weights:
        classes = about.get("classes")
        named = f": {', '.join(map(_printable, classes))}" if classes else ", whose names the model does not know"
        lines.append(f"classes     {len(weights['head.weight'])}{named}")
    if "arcface.weight" in weights:
        lines.append(f"persons     {len(weights['arcface.weight'])} (ArcFace)")
    if source := about.get("source"):
        lines.append(
            f"source      {_printable(str(source.get('file')))} of {source.get('system')}, {source.get('dtype')}"
        )
    return "\n".join(lines)


def summarise_dataset(folder: str) -> str:
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
    rejected = sum(data_set.manifest["rejected"] for data_set in shards.sets)
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
    lines += [f"copies      {line}" for line in about_copies(shards)]
    lines += [f"names       {line}" for line in odd_names(shards)]
    remarked: Counter[str] = Counter()
    for source in (source for data_set in shards.sets for source in data_set.manifest["sources"]):
        remarked.update({kind: one["records"] for kind, one in source.get("remarked", {}).items()})
    lines += [f"remarked    {_printable(kind)}: {records}" for kind, records in remarked.items()]
    return "\n".join(
        lines
        + [f"label       {_printable(name)}: {_counted(values)}" for name, values in sorted(_labels(shards).items())]
    )


def _labels(shards: ShardSet) -> dict[str, Counter[str]]:
    labels: dict[str, Counter[str]] = {}
    for number in tqdm(range(len(shards)), desc="labels", unit="rec", disable=None, leave=False):
        for name, values in shards.metadata(number)["labels"].items():
            labels.setdefault(name, Counter()).update(values or [_NO_CLASS])
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
