"""What is written down when a job is submitted: its command, configs, commit, uncommitted diff, versions and code."""

from __future__ import annotations

import getpass
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ecgscale import provenance
from ecgscale.config import FinetuneConfig, PretrainConfig, RunConfig, build, dump, load
from ecgscale.data.shards import MANIFEST
from ecgscale.errors import InputError, file_error
from ecgscale.files import write_json, write_whole
from ecgscale.run import refuse_other_run
from ecgscale_launch.folder import JobFolder, read_json_if_there
from ecgscale_launch.resources import ClusterConfig, host_python, job_name, refuse_control_characters

FORMAT = "ecgscale-job/1"
PACKAGES = ("ecgscale", "ecgscale_kernels", "ecgscale_launch")
_VERSIONS_OF = ("ecgscale", "torch", "deepspeed", "submitit", "triton", "numpy")
CONFIGS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}
_DIFF_LIMIT = 10 * 2**20  # bytes
_GIT_LIMIT_S = 30.0

Where = Literal["slurm", "local"]


@dataclass(frozen=True)
class Job:
    """What job.json says."""

    folder: JobFolder
    name: str
    run: Path
    command: list[str]
    cluster: ClusterConfig
    where: Where
    cwd: Path
    time: float
    python: str
    commit: str | None
    dirty: bool
    versions: dict[str, str]
    user: str
    host: str

    @property
    def arguments(self) -> list[str]:
        """What the ranks run: the command, from the resolved config where there is one."""
        return [self.command[0], "--config", str(self.folder.config)] if self.command[0] in CONFIGS else self.command


def make_job_folder(run: Path, command: list[str], cluster: ClusterConfig, where: Where, name: str = "") -> Path:
    """Make RUN and RUN/launch (0700) and write what a job is made of; the job folder.

    ``command`` is the argv of ecgscale; ``name`` of the job, else the cluster config's, else command and run folder's.
    Raises InputError where the command's config is wrong, the run has another, or others can get at the folder.
    """
    config = check_job(run, command)
    folder = JobFolder.of(run)
    cluster = replace(cluster, name=name or cluster.name or job_name(command[0], folder.run))
    make_private(folder)
    sources = package_folders()
    snapshot(sources, folder.code)
    clone = describe_clone(sources["ecgscale_launch"])
    write_whole(folder.diff, clone.diff)
    write_whole(folder.cluster, dump(cluster).encode())
    if config is not None:
        write_whole(folder.config, dump(config).encode())
    job = {
        "format": FORMAT,
        "name": cluster.name,
        "run": str(folder.run),
        "command": command,
        "cluster": asdict(cluster),
        "where": where,
        "cwd": str(Path.cwd()),
        "time": time.time(),
        "python": host_python(cluster),
        "commit": clone.commit,
        "dirty": clone.dirty,
        "versions": versions(),
        "user": _user(),
        "host": socket.gethostname(),
    }
    write_json(folder.job, job)  # last: a folder with job.json is whole
    return folder.path


def check_job(run: Path, command: list[str]) -> PretrainConfig | FinetuneConfig | None:
    """The resolved config that the job of a run folder would run from, None for commands that have none.

    Writes nothing. Raises InputError as `make_job_folder` does.
    """
    refuse_control_characters("run folder", str(run))
    for argument in command:
        if "\0" in argument:
            raise InputError(f"{command[0]}: the argument {argument!r} holds NUL")
    folder = JobFolder.of(run)
    if (folder.run / MANIFEST).exists():
        raise InputError(f"{run}: is a data set; give a run folder of its own")
    config = load_command(command)
    if config is not None:
        config = replace(config, run=RunConfig(str(folder.run)))
        refuse_other_run(folder.run, config)
    return config


def rewrite(job: Job, new_code: bool) -> None:
    """Write a job's cluster config anew, and its code where that of today is wanted."""
    if new_code:
        snapshot(package_folders(), job.folder.code)
    write_whole(job.folder.cluster, dump(job.cluster).encode())
    write_json(job.folder.job, (read_json_if_there(job.folder.job) or {}) | {"cluster": asdict(job.cluster)})


def read_job(run: Path) -> Job:
    """The job of a run folder; raises InputError where there is none or job.json is damaged."""
    folder = JobFolder.of(run)
    tree = read_json_if_there(folder.job)
    if tree is None:
        raise InputError(f"{run}: no job of ecgscale-launch; give a run folder that it made")
    if tree.get("format") != FORMAT:
        raise InputError(f"{folder.job}: format {tree.get('format')!r}; this ecgscale-launch reads {FORMAT}")
    for key, right in _JOB_KEYS.items():
        if not right(tree.get(key)):
            raise InputError(f"{folder.job}: damaged, {key} is {tree.get(key)!r}; submit the job again")
    try:
        cluster = build(ClusterConfig, tree["cluster"])
    except InputError as error:
        raise InputError(f"{folder.job}: damaged, cluster: {error}; submit the job again") from error
    given = {key: tree[key] for key in _JOB_KEYS}
    return Job(**given | {"folder": folder, "run": Path(tree["run"]), "cwd": Path(tree["cwd"]), "cluster": cluster})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_JOB_KEYS = {
    "name": _is_text,
    "run": _is_text,
    "command": lambda value: isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value),
    "cluster": lambda value: isinstance(value, dict),
    "where": lambda value: value in ("slurm", "local"),
    "cwd": _is_text,
    "time": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "python": _is_text,
    "commit": lambda value: value is None or isinstance(value, str),
    "dirty": lambda value: isinstance(value, bool),
    "versions": lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
    "user": _is_text,
    "host": _is_text,
}


def refuse_shared(folder: JobFolder) -> None:
    """Raises InputError where others can get at a job folder: what lies there is executed."""
    try:
        found = folder.path.lstat()
    except OSError as error:
        raise file_error(folder.path, "cannot read", error) from error
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{folder.path}: not a folder; remove it or give another run folder")
    if found.st_uid != os.geteuid():
        raise InputError(f"{folder.path}: belongs to another user; give another run folder")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise InputError(f"{folder.path}: open to others (mode {mode:04o}); chmod 700 it or give another run folder")


def make_private(folder: JobFolder) -> None:
    """Make RUN and RUN/launch, for this user alone; raises InputError where others can get at it."""
    try:
        folder.run.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder.run, folder.path):
            path.mkdir(mode=0o700, exist_ok=path == folder.run or path.is_dir())
    except FileExistsError as error:
        raise InputError(f"{error.filename}: not a folder; remove it or give another run folder") from error
    except OSError as error:
        raise file_error(error.filename, "cannot make the folder", error) from error
    refuse_shared(folder)


def load_command(command: list[str]) -> PretrainConfig | FinetuneConfig | None:
    """The config that a command of pretrain or finetune amounts to; None for other commands."""
    config_type = CONFIGS.get(command[0])
    if config_type is None:
        return None
    return load(config_type, command[1:])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user in its passwd
        return str(os.getuid())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on, where they are installed."""
    return provenance.versions(_VERSIONS_OF)


# -- code ------------------------------------------------------------------------------------------------------------


def package_folders() -> dict[str, Path]:
    """Where the packages are imported from."""
    folders = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(f"{package}: not installed; pip install ecgscale")
        folders[package] = Path(spec.origin).parent
    return folders


def snapshot(sources: Mapping[str, Path], target: Path) -> None:
    """Copy packages, so that later edits do not reach the job; a snapshot from before is replaced when all is there."""
    fresh, stale = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    try:
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)
        for package, source in sources.items():
            _copy(source, fresh / package)
        if target.exists():
            target.rename(stale)
        fresh.rename(target)
        shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise file_error(error.filename or target, "cannot copy the code", error) from error


def _copy(source: Path, target: Path) -> None:
    """Content only: an installed package may be read-only, its snapshot must be removable."""
    for folder, folders, files in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        copied = target / Path(folder).relative_to(source)
        copied.mkdir(parents=True)
        for name in files:
            if (Path(folder) / name).is_file():  # an editor's lock is a link to nowhere
                shutil.copyfile(Path(folder) / name, copied / name)


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
