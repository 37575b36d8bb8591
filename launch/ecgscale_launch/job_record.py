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

from ecgscale import provenance, yaml_text
from ecgscale.cli import COMMANDS
from ecgscale.commands.command import Values
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
    """As it was typed, for people: the ranks run what config.yaml beside this file says."""
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
    def code(self) -> Path:
        """The packages that it runs: its own, or those that the jobs of an array share."""
        of_array = self.folder.run.parent / LAUNCH / self.folder.code.name
        return self.folder.code if self.folder.code.exists() else of_array


@dataclass(frozen=True)
class Work:
    """What a job does: a command of `ecgscale`, and what it is given."""

    typed: list[str]
    """The command line that it was read from."""
    given: Values
    config: PretrainConfig | FinetuneConfig | None = None
    """In place of what is given, for commands of ranks."""

    @property
    def command(self) -> str:
        return self.typed[0]

    @property
    def values(self) -> Values:
        """What the command runs from."""
        return self.given if self.config is None else asdict(self.config)


def read_work(words: list[str]) -> Work:
    """What a command line asks for. Raises InputError."""
    command, *arguments = words
    for argument in arguments:
        if "\0" in argument:
            raise InputError(f"{command}: the argument {argument!r} holds NUL")
    values = COMMANDS[command].read(arguments)
    if command not in OF_RANKS:
        return Work(words, values)
    from ecgscale.config import build

    config_type = COMMANDS[command].config_type
    assert config_type is not None
    return Work(words, {}, build(config_type(), values))


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
    run: Path, work: Work, cluster: LaunchConfig, where: Where, source: Source, shares_code: bool = False
) -> JobRecord:
    """Make RUN and RUN/launch (0700) and write what a job is made of.

    ``shares_code``: the packages are copied for all jobs of an array at once. Raises InputError where the run has
    another config, or others can get at the folder.
    """
    work = placed(run, work)
    folder = JobFolder.of(run)
    record = JobRecord(
        format=FORMAT,
        name=cluster.name or job_name(work.command, folder.run),
        run=str(folder.run),
        command=work.typed,
        cluster=replace(cluster, name=cluster.name or job_name(work.command, folder.run)),
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
    write_values(folder, work)
    write_record(record)  # last: a folder with job.json is whole
    return record


def write_values(folder: JobFolder, work: Work) -> None:
    """Write config.yaml, which the ranks read."""
    write_whole(folder.config, yaml_text.written(work.values).encode())


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


def placed(run: Path, work: Work) -> Work:
    """The same with the run folder in its config, where it has one.

    Writes nothing. Raises InputError as `make_job` does.
    """
    from ecgscale.config import RunConfig
    from ecgscale.data.shards import MANIFEST
    from ecgscale.run import refuse_other_run

    refuse_control_characters("run folder", str(run))
    folder = JobFolder.of(run)
    if (folder.run / MANIFEST).exists():
        raise InputError(f"{run}: is a data set; give a run folder of its own")
    if work.config is None:
        return work
    config = replace(work.config, run=RunConfig(str(folder.run)))
    refuse_other_run(folder.run, config)
    return replace(work, config=config)


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
