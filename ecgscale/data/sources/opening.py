"""What a path is: recognise the layout of a data set and make its source."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecgscale.data.label_table import Description
from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources import archive, cinc2021, code15, mimic_iv_ecg, ptbxl
from ecgscale.data.sources.archive import Archive
from ecgscale.data.sources.catalogued import Described, catalogued
from ecgscale.data.sources.code15 import Code15
from ecgscale.data.sources.npy_table import NpyTable
from ecgscale.data.sources.protocol import OpenedSource
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.data.sources.wfdb_source import WfdbFolder
from ecgscale.errors import InputError

# An ECG deviates from its median by some 0.05 mV in the median; electrodes that have come off, by a few mV.
_IMPLAUSIBLE_MV = 5.0
_LOOKED_AT = 5


class _WfdbLayout(NamedTuple):
    """A data set of WFDB records, in a folder or an archive."""

    is_here: Callable[[Tree], bool]
    marks: str  # what it is recognised by
    described: Callable[[Tree, Path], Described]
    description: Callable[[Tree], str]


_WFDB_LAYOUTS = {
    "ptbxl": _WfdbLayout(
        lambda tree: ptbxl.DATABASE in tree.children(""),
        ptbxl.DATABASE,
        lambda tree, scratch: ptbxl.described(tree),
        lambda tree: ptbxl.DESCRIPTION,
    ),
    "mimic-iv-ecg": _WfdbLayout(
        lambda tree: mimic_iv_ecg.RECORDS in tree.children(""),
        mimic_iv_ecg.RECORDS,
        mimic_iv_ecg.described,
        mimic_iv_ecg.description,
    ),
    "cinc2021": _WfdbLayout(
        cinc2021.is_here,
        "training/<database>/g1",
        lambda tree, scratch: cinc2021.described(tree),
        lambda tree: cinc2021.DESCRIPTION,
    ),
}


def open_source(path: Path, options: SourceOptions) -> OpenedSource:
    """The source that a folder, an archive or a file is, by its layout or by ``options.layout``.

    Raises InputError for a path that is not there or of no known kind, for a layout that it does not have, for options
    that say nothing about its layout, and for tables and archives that are damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; a folder or an archive of recordings is needed")
    chosen = options if options.dataset else replace(options, dataset=_name_of(path))
    if path.is_dir():
        return _open_folder(path, chosen)
    if archive.is_archive(path):
        return _open_tree(Archive.open(path), chosen)
    if path.suffix.lower() == ".npy":
        return _open_npy(path, chosen)
    if path.suffix.lower() in (".hdf5", ".h5"):
        return _open_code15(path.parent, (path.name,), chosen)
    raise InputError(f"{path}: give a folder, an archive ({', '.join(archive.SUFFIXES)}), an .hdf5 or an .npy")


def implausible_unit(source: OpenedSource) -> str | None:
    """A line that says so if the first records look like microvolts taken for millivolts.

    Only of sources whose files do not say their unit.
    """
    if not isinstance(source, NpyTable | Code15):
        return None
    deviations = []
    for item in source.items()[:_LOOKED_AT]:
        try:
            mv_LT = source.read(item).millivolts()
        except InputError:
            continue  # ingest will list it
        deviations.append(float(np.median(np.abs(mv_LT - np.median(mv_LT, axis=1, keepdims=True)))))
    if not deviations or np.median(deviations) < _IMPLAUSIBLE_MV:
        return None
    return (
        f"the first records deviate from their median by {np.median(deviations):.0f} mV, an ECG by 0.05 mV: "
        "are they microvolts? Then give --unit uV (or --mv-per-count for integers)"
    )


def _name_of(path: Path) -> str:
    real = path.resolve()
    return real.name if path.is_dir() else archive.stem(real) if archive.is_archive(real) else real.stem


def _open_folder(path: Path, options: SourceOptions) -> OpenedSource:
    tree = Folder(path)
    layout = options.layout if options.layout != "auto" else _layout_of(tree)
    if layout == "code15":
        return _open_code15(path, code15.parts_in(path), options)
    if layout == "npy":
        return _open_npy(path, options)
    if layout != "wfdb":
        return _open_tree(tree, replace(options, layout=layout))
    options.check_for(layout)
    return WfdbFolder(
        path,
        options.dataset or "",
        options.labels_csv,
        options.record_column,
        options.patient_key,
        options.ignore_leads,
        label_columns=options.label_columns,
    )


def _layout_of(tree: Folder) -> str:
    for name, layout in _WFDB_LAYOUTS.items():
        if layout.is_here(tree):
            return name
    if code15.EXAMS in tree.children("") and any(name.startswith("exams_part") for name in tree.children("")):
        return "code15"
    return "npy" if _holds_only_npy(tree.where) else "wfdb"


def _holds_only_npy(root: Path) -> bool:
    """Whether there are .npy and no WFDB headers below; one header ends the search."""
    found = False
    for _, _, files in os.walk(root):
        if any(file.endswith(".hea") for file in files):
            return False
        found = found or any(file.endswith(".npy") for file in files)
    return found


def _open_tree(tree: Folder | Archive, options: SourceOptions) -> OpenedSource:
    """A layout of WFDB records in a folder, or any of them in an archive."""
    name = options.layout
    if name == "auto":
        name = next((name for name, layout in _WFDB_LAYOUTS.items() if layout.is_here(tree)), "wfdb")
    if name not in (*_WFDB_LAYOUTS, "wfdb"):
        raise InputError(f"{tree.where}: layout {name} is not read from an archive; unpack it and give the folder")
    options.check_for(name)
    scratch = tree.disk if isinstance(tree, Archive) else Scratch.make()
    if name == "wfdb":
        nothing = Description(None, {}, {})
        records = ((item, nothing) for item in tree.headers())
        return catalogued(tree, scratch, records, f"{tree.where}: an archive of {{n}} WFDB records", options)
    layout = _WFDB_LAYOUTS[name]
    if not layout.is_here(tree):
        raise InputError(f"{tree.where}: no {layout.marks} in it, so not layout {name}; leave --layout out")
    return catalogued(tree, scratch, layout.described(tree, scratch.path), layout.description(tree), options)


def _open_npy(path: Path, options: SourceOptions) -> OpenedSource:
    if options.layout not in ("auto", "npy"):
        raise InputError(f"{path}: layout {options.layout} is not that of .npy arrays; leave --layout out")
    options.check_for("npy")
    return NpyTable.open(path, options)


def _open_code15(root: Path, parts: tuple[str, ...], options: SourceOptions) -> OpenedSource:
    if options.layout not in ("auto", "code15"):
        raise InputError(f"{root}: layout {options.layout} is not that of .hdf5 files; leave --layout out")
    options.check_for("code15")
    if not parts:
        packed = any(root.glob("exams_part*.zip"))
        hint = "unpack exams_part*.zip first" if packed else "they belong beside exams.csv"
        raise InputError(f"{root}: no {code15.PARTS} in it; {hint}")
    if not (root / code15.EXAMS).is_file():
        raise InputError(f"{root}: no {code15.EXAMS} beside the parts; it names the patients")
    return Code15.open(root, parts, options)
