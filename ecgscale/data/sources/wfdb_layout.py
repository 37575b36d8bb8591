"""Plain WFDB records: all headers of a folder or an archive."""

from __future__ import annotations

from ecgscale.data.description import Description
from ecgscale.data.source_options import LAYOUTS, SourceOptions
from ecgscale.data.sources.archive import Archive
from ecgscale.data.sources.catalogued import CataloguedWfdb, all_headers, catalogued
from ecgscale.data.sources.layout import Layout, Place
from ecgscale.data.sources.tree import Tree
from ecgscale.data.sources.wfdb_source import WfdbFolder


class PlainWfdb(Layout):
    """What no other layout is."""

    options = ("--labels", "--label-columns", "--record-column", "--patient-key", "--ignore-leads", "--rename-leads")
    reads_archives = True

    @classmethod
    def is_plain(cls, tree: Tree) -> bool:
        return True

    @classmethod
    def open(cls, place: Place, options: SourceOptions) -> WfdbFolder | CataloguedWfdb:
        tree, forced = place.tree, options.layout != "auto"
        hints = [line for name in LAYOUTS for line in LAYOUTS.find(name).why_not(tree, forced)]
        if isinstance(tree, Archive):
            records = ((item, Description(None, {}, {})) for item in tree.headers())
            description = f"{tree.where}: an archive of {{n}} WFDB records"
            return catalogued(tree, tree.disk, records, description, options, hints, all_headers)
        return WfdbFolder(
            tree.where,
            options.dataset or "",
            options.labels_csv,
            options.record_column,
            options.patient_key,
            options.ignore_leads,
            hints=tuple(hints),
            rename_leads=options.rename_leads,
            label_columns=options.label_columns,
        )
