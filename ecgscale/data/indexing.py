"""`ecgscale index`: a folder of tars that others wrote becomes a data set, by an index and a manifest beside them.

Every tar is read once, its headers walked and its samples checked and hashed, by several processes; the tars are
never changed. The two files are complete or absent.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ecgscale.data.agreement import (
    IndexedTar,
    asked_keys,
    check_label_keys,
    check_label_names,
    check_one_dataset,
    check_patient_keys,
    check_sources,
    classes_of,
    dataset_of,
    folder_of,
    lead_order,
    only_rate,
    same_patients,
    source_of,
)
from ecgscale.data.cells import NOBODY, find_key
from ecgscale.data.copies import Copies, is_flat, record_keys
from ecgscale.data.foreign import Described, Rules, keys_of
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.ingest.splits import (
    Splits,
    United,
    check_not_empty,
    split_value,
    splits_by_hash,
    splits_by_value,
    without_value,
)
from ecgscale.data.json_keys import objects_in
from ecgscale.data.lead_keys import lead_keys
from ecgscale.data.payload import Bytes
from ecgscale.data.plausibility import FLAT, UnlikelyUnitError, check_geometry, judge
from ecgscale.data.remarked import NONE, Remarked
from ecgscale.data.scan import Found, scan_foreign
from ecgscale.data.shards import (
    MANIFEST,
    as_columns,
    check_patient_disjoint,
    read_signal,
    shard_entry,
    write_index_in_parts,
    write_manifest,
)
from ecgscale.data.sources.listing import is_junk
from ecgscale.errors import InputError, naming_file
from ecgscale.files import hold
from ecgscale.record import Counts

WRONG_SCALE = "no ECG by their scale; is mv_per_count or gain right?"
NO_ECG = "no ECG: nothing moves, codes for missing samples, or shorter than a beat"
KEPT_FLAT = "leads without a signal"


@dataclass(frozen=True)
class Indexed:
    """What came of it."""

    records: int
    shards: int
    rate_hz: float
    patients_known: bool  # whether any record names its patient; otherwise each counts as a person of its own
    remarked: dict[str, Remarked]
    """By kind. What is no ECG is among them: no record of such a set can be left out."""
    notes: dict[str, int]  # what was done to labels and ids (see ``Cells``) -> how often


def index_folder(folder: Path, rules: Rules, options: IngestOptions, dataset: str = "", workers: int = 1) -> Indexed:
    """Write the index and manifest of all ``*.tar`` of a folder. Of the options, those on splits count.

    ``dataset``: "" for the folder's name, where the JSON does not name several.

    Raises InputError that names the file, and the member, for anything that cannot be read exactly: see ``scan``.
    """
    if workers < 1:
        raise InputError(f"workers {workers}: give 1 or more processes")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the local folder that holds the tars")
    with _locked(folder):
        named = dataset or folder.resolve().name
        indexed = list(_run(_tars(folder), rules, named, options.split_by, workers))
        if not dataset:
            check_one_dataset(indexed)
            check_sources(indexed)
        rate_hz = only_rate(indexed)
        check_patient_keys(indexed)
        notes = Counter(same_patients(indexed))
        check_label_keys(indexed, rules)
        check_label_names(indexed)
        rules = replace(rules, lead_order=lead_order(indexed))
        splits = _splits(indexed, options)
        records = sum(len(split_B) for split_B in splits)
        parts = (one.columns | {"split": split_B} for one, split_B in zip(indexed, splits, strict=True))
        index = write_index_in_parts(folder, records, parts)
        remarked: dict[str, Remarked] = {}
        for one in indexed:
            for kind, several in one.remarked.items():
                remarked[kind] = remarked.get(kind, NONE).joined(several)
        source = {"dataset": named, "options": _given(options), "records": records, "rejected": 0}
        source["classes"] = classes_of(indexed)
        source |= {"remarked": {kind: asdict(several) for kind, several in remarked.items()}}
        write_manifest(folder, rate_hz, index, [one.entry for one in indexed], [source], rules.to_manifest())
    notes = sum((one.notes for one in indexed), notes)
    patients_known = any(any(one.patient_known) for one in indexed)
    return Indexed(records, len(indexed), rate_hz, patients_known, remarked, dict(notes))


def _given(options: IngestOptions) -> dict[str, Any]:
    about_tars = ("rate_hz", "records_per_shard", "payload")
    return {name: value for name, value in asdict(options).items() if value and name not in about_tars}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises InputError for a folder that holds a data set, or in which another `index` works."""
    with naming_file(folder, "cannot be opened"):
        handle = os.open(folder, os.O_RDONLY)
    try:
        if not hold(handle):
            raise InputError(f"{folder}: another `ecgscale index` works there; wait for it")
        if os.path.lexists(folder / MANIFEST):
            raise InputError(f"{folder}: holds a data set already; remove its {MANIFEST} to index it anew")
        yield
    finally:
        os.close(handle)


def _tars(folder: Path) -> list[Path]:
    tars = sorted(tar for tar in folder.glob("*.tar") if not is_junk(tar.name))
    for tar in tars:
        if tar.is_symlink() or not tar.is_file() or not tar.name.isprintable():
            raise InputError(f"{str(tar)!r}: no plain file of that folder, or an odd name; copy the tar itself there")
    if not tars:
        packed = [path for ending in ("*.tar.*", "*.tgz") for path in folder.glob(ending)]
        hint = f"{min(packed).name} is compressed: unpack it with gunzip or the like" if packed else "give their folder"
        raise InputError(f"{folder}: no *.tar in it; {hint}")
    return tars


def _run(tars: Sequence[Path], rules: Rules, dataset: str, split_by: str, workers: int) -> Iterator[IndexedTar]:
    tasks = [(tar, rules, dataset, split_by) for tar in tars]
    with tqdm(
        total=sum(tar.stat().st_size for tar in tars), desc="index", unit="B", unit_scale=True, disable=None
    ) as bar:
        if workers == 1 or len(tasks) == 1:
            for task in tasks:
                yield _index_tar(*task, progress=bar.update)
            return
        from ecgscale.data.ingest.run import end_with_parent

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(min(workers, len(tasks)), context, end_with_parent) as pool:
            try:
                for one in pool.map(_index_tar, *zip(*tasks, strict=True)):
                    yield one
                    bar.update(one.entry["bytes"])
            except BrokenProcessPool as error:
                raise InputError("a worker was killed, most likely for memory: give fewer --workers") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _index_tar(
    path: Path, rules: Rules, dataset: str, split_by: str, progress: Callable[[int], object] = lambda n_bytes: None
) -> IndexedTar:
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path}: empty; copy or write it again")
    tar = np.memmap(path, np.uint8, "r").view(np.ndarray)
    digest, hashed = hashlib.sha256(), 0
    done, rows = IndexedTar(path, {}, {}, []), []
    asked = asked_keys(rules)
    for record in scan_foreign(tar, str(path), rules, dataset):
        # Hashed as it is read: each page comes from the disk once.
        digest.update(tar[hashed : record.end].data)
        progress(record.end - hashed)
        hashed = record.end
        described, signal_LT = record.described, _signal(tar, record)
        rows.append(record.row | {"lead_keys": lead_keys(signal_LT, described.scale_L, described.leads_L)})
        done.leads.setdefault(described.leads_L, record.name)
        done.rates.setdefault(described.rate_hz, record.name)
        keys = keys_of(record.fields)
        done.label_keys |= asked & keys
        for name in (*described.labels, *(key for key in keys if find_key(asked, key) is not None)):
            done.label_names.setdefault(name, record.name)
        for name in described.flags:
            done.flags.setdefault(name, record.name)
        done.some_keys = done.some_keys or keys
        if described.patient_key:
            done.patient_keys.setdefault(described.patient_key, record.name)
        if described.patient is not None:
            done.datasets.setdefault(dataset_of(record.fields), record.name)
            of_patient = (described.patient_key, described.patient)
            if source := source_of(record.fields):
                done.sources.add((*of_patient, source))
            done.other_ids |= {(*of_patient, key, id_) for key, id_ in described.other_ids.items()}
        done.patient_known.append(described.patient is not None)
        for kind in _oddities(signal_LT, described):
            done.remarked[kind] = done.remarked.get(kind, NONE).plus(record.name)
        done.notes.update(described.notes)
        done.spellings.add(described.labels)
        if described.patient is None:
            done.notes[NOBODY] += 1
        if split_by:
            try:
                value = split_value((described.labels, *objects_in(record.fields)), split_by)
            except InputError as error:
                raise InputError(f"{path}: {record.name!r}: {error}") from error
            if not value:
                done.notes[without_value(split_by)] += 1
            done.split_values.append(value)
    if not rows:
        raise InputError(f"{path}: no sample in it; remove it")
    digest.update(tar[hashed:].data)
    progress(size - hashed)
    done.columns = as_columns(rows)
    done.entry = shard_entry(path, len(rows), dataset, "npy", size, digest.hexdigest())
    return done


def _signal(tar: Bytes, record: Found) -> Counts:
    """A view of the rows as they stand there."""
    n_samples, end = record.row["samples"], record.row["offset"] + record.row["length"]
    signal_LT: Counts = tar[end - 2 * len(record.described.leads_L) * n_samples : end].view("<i2")
    return signal_LT.reshape(-1, n_samples)


def _oddities(signal_LT: Counts, described: Described) -> Iterator[str]:
    """Kinds of what is odd about the numbers of a record."""
    try:
        check_geometry(signal_LT.shape[1], described.rate_hz)
        verdict = judge(signal_LT, described.scale_L, described.leads_L, described.rate_hz)
        if verdict.refusal:
            raise verdict.refusal
    except UnlikelyUnitError:
        yield WRONG_SCALE
    except InputError:
        yield NO_ECG
    else:
        yield from (KEPT_FLAT if remark.kind == FLAT else remark.kind for remark in verdict.remarks)


def _splits(indexed: Sequence[IndexedTar], options: IngestOptions) -> list[Splits]:
    """The split of each record, per tar. Raises InputError where a patient would stand in two, or a split be empty."""
    if not options.split_by:
        united = _united(indexed, options)
        return [
            united.applied(one.columns["patient"], splits_by_hash(one.columns["patient"], options)) for one in indexed
        ]
    check_not_empty({value for one in indexed for value in one.split_values}, options)
    values_V = sorted({value for one in indexed for value in one.split_values})
    place = {value: number for number, value in enumerate(values_V)}
    splits = [
        splits_by_value(values_V, np.array([place[value] for value in one.split_values], np.uint32), options)
        for one in indexed
    ]
    patient = np.concatenate([one.columns["patient"] for one in indexed])
    check_patient_disjoint(patient, np.concatenate(splits), f"{folder_of(indexed)}, split by {options.split_by}")
    return splits


def _united(indexed: Sequence[IndexedTar], options: IngestOptions) -> United:
    """Persons that equal records link: their copies lie in one split."""
    patient_N = np.concatenate([one.columns["patient"] for one in indexed])
    copies = Copies.joined(np.concatenate([record_keys(one.columns) for one in indexed], axis=1))
    copies = copies.only(copies.differing(patient_N[copies.number_R]))
    first_S = np.cumsum([0, *(len(one.columns["samples"]) for one in indexed)])
    flat_G = np.zeros(len(copies), bool)
    for g, number in enumerate(copies.one_of_each.tolist()):
        s = int(np.searchsorted(first_S, number, side="right")) - 1
        columns, at = indexed[s].columns, number - int(first_S[s])
        flat_G[g] = is_flat(read_signal(indexed[s].path, "npy", int(columns["offset"][at]), int(columns["length"][at])))
    copies = copies.only(~flat_G)
    known_N = np.concatenate([np.array(one.patient_known, bool) for one in indexed])
    return United.by_copies(copies, patient_N[copies.number_R], known_N[copies.number_R], options)
