"""`ecgscale embed`: files in, embeddings out."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ecgscale.data.plausibility import plausible
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import MANIFEST, SPLITS
from ecgscale.data.sources import WfdbFolder, read_wfdb
from ecgscale.errors import InputError, unreadable
from ecgscale.files import write_whole
from ecgscale.inference import ECGModel, Embedding, Recording, load, log_remarks
from ecgscale.lead_names import LEADS, source_leads
from ecgscale.record import Record, Remark

_LOG = logging.getLogger(__name__)

# Kind of input -> the options that say something about it; any other is refused rather than ignored.
_OPTIONS = {
    "an .npy": ("--rate-hz", "--leads", "--rename-leads", "--unit", "--mv-per-count"),
    "WFDB records": ("--ignore-leads", "--rename-leads"),
    "a data set": (),
}


def embed_files(
    model_path: Path,
    source: Path,
    out: Path,
    tokens: bool = False,
    rate_hz: float | None = None,
    leads: tuple[str, ...] | None = None,
    ignore_leads: tuple[str, ...] = (),
    rename_leads: tuple[tuple[str, str], ...] = (),
    unit: str | None = None,
    mv_per_count: float | None = None,
    encoder: str = "",
) -> str:
    """Embed a WFDB record, a folder of them, a data set or an .npy; writes ``out`` and returns the line to print.

    Leads that the model's training masked are masked here too, and that is logged.
    What is odd about recordings is logged, as by ``ECGModel.embed``; those of a data set were judged at its ingest.
    Raises InputError for an option that says nothing about that kind of input.
    """
    if out.suffix != ".npz":
        raise InputError(f"{out}: the output is an .npz file")
    is_data_set = (source / MANIFEST).is_file()
    kind = "an .npy" if source.suffix == ".npy" else "a data set" if is_data_set else "WFDB records"
    given = {
        "--rate-hz": rate_hz,
        "--leads": leads,
        "--ignore-leads": ignore_leads or None,
        "--rename-leads": rename_leads or None,
        "--unit": unit,
        "--mv-per-count": mv_per_count,
    }
    _refuse_options_of_others(source, kind, given)
    model = load(model_path, encoder)
    if model.leads != LEADS and kind != "an .npy":  # of which ``ECGModel.embed`` says it
        _LOG.warning("all other leads are masked, as in training: %s", model.trained_with())
    rows = _Rows()
    if kind == "an .npy":
        renames = dict(rename_leads)
        rows.names, embedding = _embed_npy(model, source, rate_hz, leads, renames, tokens, unit, mv_per_count)
    elif kind == "a data set":
        embedding = model.embed_recordings(_of_data_set(model, ShardSet.open(source), rows), tokens)
    else:
        embedding = model.embed_recordings(_wfdb_recordings(model, source, ignore_leads, rename_leads, rows), tokens)
        log_remarks(rows.remarks)
    _write(out, embedding, rows)
    skipped = (
        f", {len(rows.rejected)} could not be read or are too short (first: {rows.rejected[0]}; all: 'rejected' in the "
        "file)"
        if rows.rejected
        else ""
    )
    return f"{out}: {len(rows.names)} recordings, width {embedding.record_embedding.shape[1]}{skipped}"


@dataclass
class _Rows:
    """What is known of the recordings beside their embeddings; it grows while they are read."""

    names: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # of a data set's recordings
    remarks: list[tuple[str, Remark]] = field(default_factory=list)  # (name, what is odd)
    rejected: list[str] = field(default_factory=list)  # why the others have no embedding


def _write(out: Path, embedding: Embedding, rows: _Rows) -> None:
    arrays: dict[str, Any] = {"record_embedding": embedding.record_embedding, "name": np.array(rows.names)}
    if rows.splits:
        arrays["split"] = np.array(rows.splits)
    if rows.rejected:
        arrays["rejected"] = np.array(rows.rejected)
    if embedding.tokens is not None:
        arrays["tokens"] = embedding.tokens
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(out, buffer.getvalue())


def _refuse_options_of_others(source: Path, kind: str, given: Mapping[str, Any]) -> None:
    """Raises InputError for an option that says nothing about this kind of input."""
    for option, value in given.items():
        if value is not None and option not in _OPTIONS[kind]:
            fitting = " or ".join(name for name, options in _OPTIONS.items() if option in options)
            raise InputError(f"{source}: {option} goes with {fitting}, not with {kind}; leave it out")


def _embed_npy(
    model: ECGModel,
    source: Path,
    rate_hz: float | None,
    leads: tuple[str, ...] | None,
    renames: Mapping[str, str],
    tokens: bool,
    unit: str | None,
    mv_per_count: float | None,
) -> tuple[list[str], Embedding]:
    if rate_hz is None:
        raise InputError(f"{source}: an .npy says no sample rate; give --rate-hz")
    try:
        # Mapped: a header that promises more than the file holds is refused before anything is allocated.
        signal = np.lib.format.open_memmap(source, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise unreadable(source, "not a readable .npy of numbers", error) from error
    if leads is None and renames:
        raise InputError(f"{source}: --rename-leads is about names in --leads; give both, or leave it out")
    if leads is None and signal.ndim in (2, 3) and signal.shape[-2] == len(LEADS):
        leads = LEADS
    if leads is None:
        raise InputError(f"{source}: of shape {signal.shape}; give --leads with the name of each lead in order")
    try:
        names = source_leads(leads, renames, can_ignore=False)
        embedding = model.embed(signal, rate_hz, names, tokens, progress=True, unit=unit, mv_per_count=mv_per_count)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return [f"{source.stem}[{i}]" for i in range(len(embedding.record_embedding))], embedding


def _of_data_set(model: ECGModel, shards: ShardSet, rows: _Rows) -> Iterator[Recording]:
    """The recordings of all splits, in their order on disk, at the model's rate; ``rows`` are told of as below."""
    split_R = shards.column("split").tolist()
    for number, split in enumerate(tqdm(split_R, desc="embed", unit="rec", disable=None)):
        record = shards.record(number).resampled(model.profile.rate_hz)
        try:
            recording = _taken(record, model)
        except InputError as error:
            rows.rejected.append(f"{record.name}: {error}")
            continue
        rows.names.append(record.name)
        rows.splits.append(SPLITS[split])
        yield recording
    if not rows.names:
        reasons = rows.rejected
        raise InputError(f"{shards.sets[0].place}: none of the {len(reasons)} records can be embedded: {reasons[0]}")


def _taken(record: Record, model: ECGModel) -> Recording:
    """As the model takes it; raises InputError where it has no embedding."""
    token = model.encoder.config.patch_samples
    samples = record.signal_LT.shape[1]
    if samples < token:
        raise InputError(f"{samples} samples, shorter than one token of {token}")
    return model.narrowed(Recording.of(record))


def _wfdb_recordings(
    model: ECGModel,
    source: Path,
    ignore_leads: tuple[str, ...],
    rename_leads: tuple[tuple[str, str], ...],
    rows: _Rows,
) -> Iterator[Recording]:
    """Recordings one by one; ``rows`` gets the name and the remarks of each, or the reason why it cannot be read.

    Of a folder, such recordings are left out; one that was asked for by name raises InputError, and so does a folder
    without any that can be read.
    """
    if source.is_dir():
        folder = WfdbFolder(source, source.name, ignore_leads=ignore_leads, rename_leads=rename_leads)
        for item in tqdm(folder.items(), desc="embed", unit="rec", disable=None):
            try:
                record = folder.read(item).resampled(model.profile.rate_hz)
                recording = _taken(record, model)
            except InputError as error:
                rows.rejected.append(str(error))
                continue
            rows.names.append(item)
            rows.remarks += [(item, remark) for remark in record.remarks]
            yield recording
        if not rows.names:
            reasons = rows.rejected
            raise InputError(f"{source}: none of the {len(reasons)} records could be read, the first: {reasons[0]}")
    else:
        record = read_wfdb(source, ignore_leads=ignore_leads, rename_leads=rename_leads)
        record = plausible(record, source)
        name = source.stem if source.suffix == ".hea" else source.name
        rows.names.append(name)
        rows.remarks += [(name, remark) for remark in record.remarks]
        yield _taken(record.resampled(model.profile.rate_hz), model)
