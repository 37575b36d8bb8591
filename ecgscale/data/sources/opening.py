"""What a path is: recognise the layout of a data set and make its source."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ecgscale.data.description import Description
from ecgscale.data.plausibility import UnlikelyUnitError, questions
from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources import archive, cinc2021, code15, mimic_iv_ecg, ptbxl
from ecgscale.data.sources.archive import Archive
from ecgscale.data.sources.catalogued import Absent, Described, all_headers, catalogued
from ecgscale.data.sources.code15 import Code15
from ecgscale.data.sources.listing import contents_below
from ecgscale.data.sources.npy_table import NpyTable
from ecgscale.data.sources.protocol import OpenedSource
from ecgscale.data.sources.recognise import LAYOUTS, Place, recognise, unrecognised
from ecgscale.data.sources.scratch import Scratch
from ecgscale.data.sources.tree import Folder, Tree
from ecgscale.data.sources.wfdb_source import WfdbFolder
from ecgscale.errors import InputError

_LOOKED_AT, _LOOKED_AT_S = 5, 5.0


_FOR_WFDB = {name: layout for name, layout in LAYOUTS.items() if name != "code15"}


def open_source(path: Path, options: SourceOptions) -> OpenedSource:
    """The source that a folder, an archive or a file is, by its layout or by ``options.layout``.

    Raises InputError for a path that is not there or of no known kind, for a layout that it does not have, for options
    that say nothing about its layout, and for tables and archives that are damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; a folder or an archive of recordings is needed")
    if path.is_dir():
        return _open_folder(path, options)
    chosen = options if options.dataset else replace(options, dataset=_name_of(path))
    if archive.is_archive(path):
        return _open_archive(Archive.open(path), chosen)
    if path.suffix.lower() == ".npy":
        return _open_npy(path, chosen)
    if path.suffix.lower() in (".hdf5", ".h5"):
        return _open_code15(path.parent, (path.name,), chosen)
    raise InputError(f"{path}: give a folder, an archive ({', '.join(archive.SUFFIXES)}), an .hdf5 or an .npy")


def implausible_unit(source: OpenedSource) -> str | None:
    """What to ask before a whole set is converted, by a few records from all over it; ``ingest`` checks each.

    None where most of them are as ECGs are. The first is read whole, however long; others are not begun after 5 s.
    """
    items = source.items()
    probed = items[:: -(-len(items) // _LOOKED_AT)]
    refusals: list[str] = []
    kinds: Counter[str] = Counter()
    readable = 0
    begun = time.monotonic()
    for item in probed:
        if readable and time.monotonic() > begun + _LOOKED_AT_S:
            break
        try:
            remarks = source.read(item).remarks
        except UnlikelyUnitError as error:
            refusals.append(str(error))
        except InputError:
            continue  # ingest will list it
        else:
            kinds.update({remark.kind for remark in remarks})
        readable += 1
    if 2 * len(refusals) > readable:
        return f"{len(refusals)} of {readable} records that were looked at are no ECG, such as {refusals[0]}"
    return "; ".join(questions(kinds, readable)) or None


def _name_of(path: Path) -> str:
    real = path.resolve()
    return real.name if path.is_dir() else archive.stem(real) if archive.is_archive(real) else real.stem


def _open_folder(path: Path, options: SourceOptions) -> OpenedSource:
    place, tree = None, Folder(path)
    if options.layout not in ("wfdb", "npy"):
        place = recognise(tree, LAYOUTS if options.layout == "auto" else {options.layout: LAYOUTS[options.layout]})
    root = place.tree.where if place else path
    chosen = options if options.dataset else replace(options, dataset=_name_of(root))
    if options.layout == "code15" or (place and place.layout == "code15"):
        return _open_code15(root, code15.parts_in(root), chosen)
    if place or options.layout in _FOR_WFDB:
        return _open_known(tree, place, chosen, Scratch.make())
    if options.layout == "npy" or (options.layout == "auto" and _holds_only_npy(path)):
        return _open_npy(path, chosen)
    options.check_for("wfdb")
    return WfdbFolder(
        path,
        chosen.dataset or "",
        options.labels_csv,
        options.record_column,
        options.patient_key,
        options.ignore_leads,
        hints=tuple(unrecognised(tree, forced=options.layout == "wfdb")),
        rename_leads=options.rename_leads,
        label_columns=options.label_columns,
    )


def _holds_only_npy(root: Path) -> bool:
    """Whether there are .npy and no WFDB headers below; one header ends the search."""
    found = False
    for contents in contents_below(root):
        if any(file.endswith(".hea") for file in contents.files):
            return False
        found = found or any(file.endswith(".npy") for file in contents.files)
    return found


def _open_archive(tree: Archive, options: SourceOptions) -> OpenedSource:
    """Any layout of WFDB records."""
    if options.layout not in ("auto", "wfdb", *_FOR_WFDB):
        raise InputError(
            f"{tree.where}: layout {options.layout} is not read from an archive; unpack it and give the folder"
        )
    place = None
    if options.layout != "wfdb":
        place = recognise(tree, LAYOUTS if options.layout == "auto" else {options.layout: LAYOUTS[options.layout]})
    if place and place.layout == "code15":
        raise InputError(f"{tree.where}: layout code15 is not read from an archive; unpack it and give the folder")
    if place or options.layout in _FOR_WFDB:
        return _open_known(tree, place, options, tree.disk)
    options.check_for("wfdb")
    hints = unrecognised(tree, forced=options.layout == "wfdb")
    records = ((item, Description(None, {}, {})) for item in tree.headers())
    description = f"{tree.where}: an archive of {{n}} WFDB records"
    return catalogued(tree, tree.disk, records, description, options, hints, all_headers)


def _open_known(tree: Tree, place: Place | None, options: SourceOptions, scratch: Scratch) -> OpenedSource:
    """One of the known sets of WFDB records, where ``recognise`` says that it lies."""
    if place is None:
        marks = LAYOUTS[options.layout].marks
        raise InputError(f"{tree.where}: no {marks} in it, so not layout {options.layout}; leave --layout out")
    options.check_for(place.layout)
    layout, root, absent = LAYOUTS[place.layout], place.tree, Absent()
    assert isinstance(root, Folder | Archive)
    try:
        described, description, others = _about(place, scratch, absent)
        described_as = f"{description}; {place.how}" if place.how else description
        return catalogued(root, scratch, described, described_as, options, (), others, absent)
    except InputError as error:
        if options.layout != "auto":
            raise
        raise InputError(
            f"{error} (taken for {layout.title} because of {layout.marks}; --layout wfdb reads plain records)"
        ) from error


def _about(place: Place, scratch: Scratch, absent: Absent) -> tuple[Described, str, Callable[[Tree], list[str]] | None]:
    """What its tables say of the records, a line for people, and who knows what is left out."""
    tree, within = place.tree, place.within
    if place.layout == "ptbxl":
        return ptbxl.described(tree, within, absent), ptbxl.DESCRIPTION, partial(ptbxl.left_out, within=within)
    if place.layout == "mimic-iv-ecg":
        described = mimic_iv_ecg.described(tree, scratch.path, within, absent)
        return described, mimic_iv_ecg.description(tree), partial(mimic_iv_ecg.left_out, within=within)
    return cinc2021.described(tree, within), cinc2021.DESCRIPTION, all_headers


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
