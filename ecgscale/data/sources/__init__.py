"""Where recordings come from: folders and archives of WFDB, known data sets, HDF5, .npy."""

from ecgscale.data.source_options import SourceOptions
from ecgscale.data.sources.opening import implausible_unit, open_source
from ecgscale.data.sources.protocol import OpenedSource, Source
from ecgscale.data.sources.wfdb_source import WfdbFolder, read_wfdb, wfdb

__all__ = [
    "OpenedSource",
    "Source",
    "SourceOptions",
    "WfdbFolder",
    "implausible_unit",
    "open_source",
    "read_wfdb",
    "wfdb",
]
