"""What lies below a folder, without what systems and programs leave there, and why some of it is not read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ecgscale.errors import naming_file

# Of macOS, Windows, Synology, Jupyter, git and file systems; casefolded.
_JUNK = {
    ".ds_store",
    ".appledouble",
    ".documentrevisions-v100",
    ".fseventsd",
    ".git",
    ".ipynb_checkpoints",
    ".spotlight-v100",
    ".temporaryitems",
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
_OTHER_FORMATS = {".npz", ".h5", ".hdf5", ".edf", ".bdf", ".dcm", ".xml", ".scp", ".zip", ".tar", ".gz", ".tgz"}


def is_junk(name: str) -> bool:
    """Whether a file or folder of that name is nobody's data, such as .DS_Store, ._shadow, __MACOSX or Thumbs.db."""
    folded = name.casefold()
    return folded in _JUNK or folded.startswith(("._", ".trash", ".nfs"))


class Contents(NamedTuple):
    """What stands directly in a folder, without junk and without its folders."""

    folder: str
    """Path below the root, with slashes; "" for the root."""
    files: list[str]
    links: list[str]
    """Links to folders, which are not followed, and to files outside of the root."""


def contents_below(root: Path) -> Iterator[Contents]:
    """Of a folder and of all below it, in no order. Raises InputError or MachineError for what cannot be listed."""
    real_root = Path(os.path.realpath(root))
    to_do = [""]
    while to_do:
        folder = to_do.pop()
        contents = Contents(folder, [], [])
        with naming_file(root / folder, "cannot be listed"), os.scandir(root / folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    to_do.append(f"{folder}/{entry.name}" if folder else entry.name)
                elif entry.is_symlink() and _leads_out(Path(entry.path), real_root):
                    contents.links.append(entry.name)
                else:
                    contents.files.append(entry.name)
        yield contents


def header_names(folders: Iterable[Contents]) -> Iterator[str]:
    """WFDB headers by their path without suffix, segments of other records included; none is opened."""
    for folder, files, _ in folders:
        for name in files:
            if name.endswith(".hea") and name != ".hea":
                stem = name.removesuffix(".hea")
                yield f"{folder}/{stem}" if folder else stem


def _leads_out(link: Path, real_root: Path) -> bool:
    """Whether it leads to a folder, or to a file outside of the root."""
    return link.is_dir() or not Path(os.path.realpath(link)).is_relative_to(real_root)


def shared_names(items: Iterable[str]) -> str | None:
    """A line where folders of one name stand below several, as those of sessions do: no name of a patient then."""
    parents: dict[str, set[str]] = {}
    for folder in {item.rpartition("/")[0] for item in items}:
        above, _, name = folder.rpartition("/")
        parents.setdefault(name, set()).add(above)
    shared = {name: sorted(above) for name, above in parents.items() if len(above) > 1}
    if not shared:
        return None
    name = min(shared)
    one, other = (folder or "the root" for folder in shared[name][:2])
    return (
        f"--patient-key @folder: {len(shared)} folder names stand below several folders, each taken for one patient, "
        f"such as {name!r} below {one!r} and {other!r}; if these are sessions, the patients are "
        "mixed: move each patient's records into one folder, or name them in a table"
    )


def tables_left_out(folders: Iterable[Contents]) -> list[str]:
    """A line on the CSVs that lie there, where no table is given."""
    names = [f"{one.folder}/{name}".lstrip("/") for one in folders for name in one.files if _is_csv(name)]
    return [f"left out: {len(names)} CSVs, since no --labels is given; the first is {min(names)}"] if names else []


def _is_csv(name: str) -> bool:
    return name.lower().endswith(".csv")


def left_out(folders: Iterable[Contents], suffix: str) -> list[str]:
    """Lines on the files that are not read where those with ``suffix`` (.hea or .npy) are: how many, and why."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}

    def add(reason: str, contents: Contents, name: str) -> None:
        counts[reason] += 1
        first.setdefault(reason, f"{contents.folder}/{name}" if contents.folder else name)

    for contents in folders:
        heads = {name.removesuffix(".hea") for name in contents.files if name.endswith(".hea")}
        for name in contents.files:
            ending = Path(name).suffix
            if reason := _why_not(name, ending, suffix, heads):
                add(reason, contents, name)
        for name in contents.links:
            add(
                "links that lead out of the folder or to folders; they are not followed: copy what they lead to",
                contents,
                name,
            )
    return [f"left out: {counts[reason]} {reason}; the first is {first[reason]}" for reason in sorted(counts)]


def _why_not(name: str, ending: str, suffix: str, heads: set[str]) -> str:
    lower = ending.lower()
    if ending == suffix:
        return ""
    if lower == suffix:
        return f"files with the ending {ending}; rename them to {suffix}"
    if lower == ".npy":
        return "arrays (.npy) beside WFDB records; --layout npy reads them"
    if lower == ".hea":
        return "WFDB headers (.hea) beside arrays; --layout wfdb reads them"
    if lower in (".dat", ".mat") and suffix == ".hea" and not _is_of(name, heads):
        return f"data files ({lower}) without a header (.hea) of their name"
    if lower in _OTHER_FORMATS:
        return f"files of another format ({lower})"
    return ""


def _is_of(name: str, heads: set[str]) -> bool:
    """Whether a data file's name begins with that of a header: 0001_1.dat is one of 0001.hea."""
    return any(name[:n] in heads for n in range(len(name), 0, -1))
