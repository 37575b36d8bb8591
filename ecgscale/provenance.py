"""Versions and code of what has made something, to be written down beside it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import ecgscale

_DIFF_LIMIT = 10 * 2**20  # bytes
_GIT_LIMIT_S = 30.0


def package_version(package: str) -> str | None:
    """Version of a package, None where it is not there.

    Also of one that is only on PYTHONPATH, about which no metadata is installed: our own always, others once imported.
    """
    if package == ecgscale.__name__:
        return ecgscale.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        own: str | None = getattr(sys.modules.get(package), "__version__", None)
        return own


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of Python and of those of the packages that are there."""
    of_packages = {package: package_version(package) for package in packages}
    return {"python": platform.python_version()} | {name: one for name, one in of_packages.items() if one is not None}


# -- git -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clone:
    """The state of a git clone."""

    commit: str | None
    dirty: bool
    diff: bytes


def describe_clone(package: Path) -> Clone:
    """Commit and uncommitted diff, untracked files included, of the clone that a package lies in.

    Nothing in the clone is written. Where git or the clone is missing or takes too long, less is known; never raises.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    ignored = _git(package, "check-ignore", "-q", str(package / "__init__.py")) is not None
    if top is None or ignored:  # ignored: installed into a clone of something else
        return Clone(None, False, b"")
    root = Path(os.fsdecode(top.removesuffix(b"\n")))
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    commit = head.decode().strip() if head else None
    base = head or _git(root, "hash-object", "-t", "tree", os.devnull)  # no commits: all is new
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        notes = _index_with_untracked(root, index)
        diff, cut = _diff(root, base.decode().strip() if base else "HEAD", index)
    notes += cut
    header = "".join(f"# ecgscale-launch: {note}\n" for note in notes)
    return Clone(commit, bool(diff or notes), header.encode() + diff)


def commit_of(package: Path) -> str | None:
    """The commit of the clone that tracks a package, with a plus where the clone was changed; None without one."""
    if not _git(package, "ls-files", "__init__.py"):
        return None
    head = _git(package, "rev-parse", "--verify", "--quiet", "HEAD")
    return head.decode().strip() + ("+" if _git(package, "status", "--porcelain", "..") else "") if head else None


def _index_with_untracked(root: Path, index: Path) -> list[str]:
    """A copy of the clone's index in which untracked files are announced, so that one diff shows them too."""
    used = _git(root, "rev-parse", "--git-path", "index")
    if used is None:
        return ["git shows no index, the diff may lack files"]
    try:
        # With its time, by which git knows which files may have been changed since without another size or time.
        shutil.copy2(root / os.fsdecode(used.removesuffix(b"\n")), index)
    except FileNotFoundError:
        pass  # nothing was ever added
    except OSError as error:
        return [f"git's index cannot be read ({error.strerror}), the diff may lack files"]
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z", index=index)
    if listed is None:
        return ["git lists no untracked files in time"]
    chosen, notes, total = [], [], 0
    for name in filter(None, listed.split(b"\0")):
        path = root / os.fsdecode(name)
        size = path.lstat().st_size if path.exists() else 0
        if name.endswith(b"/") or total + size > _DIFF_LIMIT:
            notes.append(f"left out, {'a clone of its own' if name.endswith(b'/') else 'too large'}: {name!r}")
            continue
        total += size
        chosen.append(name)
    if chosen:
        paths = ("--pathspec-from-file=-", "--pathspec-file-nul")
        if _git(root, "add", "--intent-to-add", *paths, index=index, given=b"\0".join(chosen)) is None:
            notes.append("untracked files could not be added to the diff")
    return notes


def _diff(root: Path, base: str, index: Path) -> tuple[bytes, list[str]]:
    """Binary diff of the working tree from ``base``, cut where it is too long, and notes."""
    plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
    command = ["git", "-C", str(root), "diff", "--binary", *plain, base]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_git_environment(index)
        )
    except OSError as error:
        return b"", [f"no diff: {error.strerror}"]
    timer = threading.Timer(_GIT_LIMIT_S, process.kill)
    timer.start()
    with process:
        assert process.stdout is not None
        diff = process.stdout.read(_DIFF_LIMIT + 1)
        if len(diff) > _DIFF_LIMIT:
            process.kill()
    timer.cancel()
    if len(diff) > _DIFF_LIMIT:
        return diff[: diff.rfind(b"\n", 0, _DIFF_LIMIT) + 1], [f"cut at {_DIFF_LIMIT // 2**20} MB, does not apply"]
    if process.returncode:
        return diff, [f"git diff ended with {process.returncode}, may be incomplete"]
    return diff, []


def _git(folder: Path, *arguments: str, index: Path | None = None, given: bytes = b"") -> bytes | None:
    """What git prints; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            input=given,
            capture_output=True,
            env=_git_environment(index),
            timeout=_GIT_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def _git_environment(index: Path | None) -> dict[str, str]:
    """Without what a hook's surroundings would say about another clone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    kept["GIT_OPTIONAL_LOCKS"] = "0"
    # check-ignore, which needs no index, refuses literal paths
    return kept | ({"GIT_INDEX_FILE": str(index), "GIT_LITERAL_PATHSPECS": "1"} if index else {})
