"""What a path is: recognise the layout of a data set and make its source."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ecgscale.data.plausibility import UnlikelyUnitError, questions
from ecgscale.data.source_options import LAYOUTS, SourceOptions
from ecgscale.data.sources import archive
from ecgscale.data.sources.archive import Archive
from ecgscale.data.sources.layout import Place
from ecgscale.data.sources.protocol import OpenedSource
from ecgscale.data.sources.recognise import Layouts, recognise
from ecgscale.data.sources.tree import Folder
from ecgscale.errors import InputError

_LOOKED_AT, _LOOKED_AT_S = 5, 5.0


def open_source(path: Path, options: SourceOptions) -> OpenedSource:
    """The source that a folder, an archive or a file is, by its layout or by ``options.layout``.

    Raises InputError for a path that is not there or of no known kind, for a layout that it does not have, for options
    that say nothing about its layout, and for tables and archives that are damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; a folder or an archive of recordings is needed")
    auto = options.layout == "auto"
    layouts = {name: LAYOUTS.find(name) for name in (LAYOUTS if auto else [options.layout])}
    place = _place_of(path, layouts, auto)
    if isinstance(place.tree, Archive):
        _refuse_packed(path, place.layout)
    options.check_for(place.layout)
    dataset = options.dataset or _name_of(place.tree.where if path.is_dir() else path)
    return layouts[place.layout].open(place, replace(options, dataset=dataset))


def _place_of(path: Path, layouts: Layouts, auto: bool) -> Place:
    """Which of the layouts a path is, and where that lies."""
    if path.is_dir() or archive.is_archive(path):
        if not auto and not path.is_dir():  # before it is listed, which may take long
            _refuse_packed(path, *layouts)
        tree = Folder(path) if path.is_dir() else Archive.open(path)
        plain = (name for name, layout in layouts.items() if not auto or layout.is_plain(tree))
        return recognise(tree, layouts) or Place(next(plain), tree, recognised=False)
    suffix = path.suffix.lower()
    if fitting := [name for name, layout in layouts.items() if suffix in layout.suffixes]:
        return Place(fitting[0], Folder(path.parent), path.name)
    if not auto:
        (name,) = layouts
        raise InputError(f"{path}: layout {name} is not that of {suffix or 'such'} files; leave --layout out")
    suffixes = [suffix for layout in layouts.values() for suffix in layout.suffixes]
    raise InputError(
        f"{path}: give a folder, an archive ({', '.join(archive.SUFFIXES)}) or a file in {', '.join(suffixes)}"
    )


def _refuse_packed(path: Path, layout: str) -> None:
    """Raises InputError for an archive whose layout is not read from one."""
    if not LAYOUTS.find(layout).reads_archives:
        raise InputError(f"{path}: layout {layout} is not read from an archive; unpack it and give the folder")


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
