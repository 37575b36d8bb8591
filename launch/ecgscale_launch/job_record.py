"""job.json: all that a job is made of, written when it is submitted, and what its supervisor runs."""

from __future__ import annotations

import getpass
import os
import re
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ecgscale import provenance
from ecgscale.errors import InputError
from ecgscale.files import read_json_if_there, write_json, write_whole
from ecgscale.run_folder import LAUNCH
from ecgscale.settings import from_tree
from ecgscale_launch.commands import OF_RANKS, host_python
from ecgscale_launch.job_folder import JobFolder, make_private
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.slurm_words import refuse_control_characters
from ecgscale_launch.snapshot import package_folders, snapshot

if TYPE_CHECKING:  # imports PyTorch, for which a supervisor need not wait
    from ecgscale.config import PretrainConfig
    from ecgscale.downstream.finetune_config import FinetuneConfig

FORMAT = "ecgscale-job/1"
_VERSIONS_OF = ("ecgscale", "torch", "deepspeed", "triton", "numpy")

Where = Literal["slurm", "local"]


@dataclass(frozen=True)
class JobRecord:
    """What job.json says."""

    format: str
    name: str
    run: str
    """The run folder."""
    command: list[str]
    """Arguments of `ecgscale`, as they were given."""
    cluster: LaunchConfig
    where: Where
    cwd: str
    time: float
    """Of the submission, Unix time."""
    python: str
    """Of the supervisor."""
    commit: str | None
    """Of the clone that the packages lie in; what was not committed is in diff.patch."""
    dirty: bool
    versions: dict[str, str]
    user: str
    host: str

    def __post_init__(self) -> None:
        for name in ("name", "run", "command", "cwd", "python", "user", "host"):
            if not getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)!r}")

    @property
    def folder(self) -> JobFolder:
        return JobFolder.of(Path(self.run))

    @property
    def arguments(self) -> list[str]:
        """What the ranks run: the command, from the resolved config where there is one."""
        return arguments_of(self.command, self.folder)

    @property
    def code(self) -> Path:
        """The packages that it runs: its own, or those that the jobs of an array share."""
        of_array = self.folder.run.parent / LAUNCH / self.folder.code.name
        return self.folder.code if self.folder.code.exists() else of_array


def arguments_of(command: list[str], folder: JobFolder) -> list[str]:
    """What the ranks of a job run: its command, from the resolved config where there is one."""
    return [command[0], "--config", str(folder.config)] if command[0] in OF_RANKS else command


@dataclass(frozen=True)
class Source:
    """The code of today: where its packages lie, and the state of their clone."""

    packages: dict[str, Path]
    clone: provenance.Clone

    @classmethod
    def today(cls) -> Source:
        packages = package_folders()
        return cls(packages, provenance.describe_clone(packages["ecgscale_launch"]))


def make_job(
    run: Path, command: list[str], cluster: LaunchConfig, where: Where, source: Source, shares_code: bool = False
) -> JobRecord:
    """Make RUN and RUN/launch (0700) and write what a job is made of.

    ``command`` is the argv of ecgscale; ``shares_code``: the packages are copied for all jobs of an array at once.
    Raises InputError where the command's config is wrong, the run has another, or others can get at the folder.
    """
    config = check_job(run, command)
    folder = JobFolder.of(run)
    record = JobRecord(
        format=FORMAT,
        name=cluster.name or job_name(command[0], folder.run),
        run=str(folder.run),
        command=command,
        cluster=replace(cluster, name=cluster.name or job_name(command[0], folder.run)),
        where=where,
        cwd=str(Path.cwd()),
        time=time.time(),
        python=host_python(cluster),
        commit=source.clone.commit,
        dirty=source.clone.dirty,
        versions=versions(),
        user=_user(),
        host=socket.gethostname(),
    )
    make_private(folder)
    if not shares_code:
        snapshot(source.packages, folder.code)
    write_whole(folder.diff, source.clone.diff)
    if config is not None:
        from ecgscale.config import dump

        write_whole(folder.config, dump(config).encode())
    write_record(record)  # last: a folder with job.json is whole
    return record


def write_record(record: JobRecord) -> None:
    """Write job.json."""
    write_json(record.folder.job, asdict(record))


def read_job(run: Path) -> JobRecord:
    """The job of a run folder; raises InputError where there is none or job.json is damaged."""
    folder = JobFolder.of(run)
    tree = read_json_if_there(folder.job)
    if tree is None:
        raise InputError(f"{run}: no job of ecgscale-launch; give a run folder that it made")
    if tree.get("format") != FORMAT:
        raise InputError(f"{folder.job}: format {tree.get('format')!r}; this ecgscale-launch reads {FORMAT}")
    try:
        return replace(from_tree(JobRecord, tree), run=str(folder.run))
    except InputError as error:
        raise InputError(f"{folder.job}: damaged, {error}; submit the job again") from error


def check_job(run: Path, command: list[str]) -> PretrainConfig | FinetuneConfig | None:
    """The resolved config that the job of a run folder would run from, None for commands that have none.

    Writes nothing. Raises InputError as `make_job` does.
    """
    from ecgscale.config import RunConfig
    from ecgscale.data.shards import MANIFEST
    from ecgscale.run import refuse_other_run

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


def load_command(command: list[str]) -> PretrainConfig | FinetuneConfig | None:
    """The config that a command of pretrain or finetune amounts to; None for other commands."""
    if command[0] not in OF_RANKS:
        return None
    from ecgscale.config import PretrainConfig, load
    from ecgscale.downstream.finetune_config import FinetuneConfig

    return load(PretrainConfig, command[1:]) if command[0] == "pretrain" else load(FinetuneConfig, command[1:])


def job_name(command: str, run: Path) -> str:
    """The default name of a job; characters that SLURM's names do not have become _."""
    return re.sub(r"[^A-Za-z0-9_.+@=:-]", "_", f"{command}-{run.name}")[:128]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on, where they are installed."""
    return provenance.versions(_VERSIONS_OF)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user in its passwd
        return str(os.getuid())
