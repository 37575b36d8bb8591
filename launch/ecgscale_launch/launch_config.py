"""What a job asks of a cluster, and what is done when something fails: one YAML, checked before anything is submitted.

Every text that later reaches SLURM or a shell is checked here, beside its key. Names keep to SLURM's own characters;
values and paths may hold quotes, spaces and ``$(...)``: whoever writes them into a script quotes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from ecgscale import settings
from ecgscale.errors import InputError
from ecgscale_launch.slurm_words import (
    FEATURES,
    HOSTS,
    JOB_NAME,
    MEMORY,
    MODULE,
    OPTION,
    WORD,
    WORDS,
    minutes,
    refuse_control_characters,
    refuse_own_option,
)

_OF_EACH_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}  # read-only there

Check = Callable[[str, Any], None]
"""(key, value): raises InputError for a value that is wrong."""


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_fields(config: Any, prefix: str = "") -> None:
    """Each value by the checks that stand beside its type."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for check in getattr(hint, "__metadata__", ()):
            check(prefix + name, getattr(config, name))


def _at_least(least: int) -> Check:
    def check(key: str, value: int) -> None:
        if value < least:
            raise InputError(f"{key} {value}: give {least} or more")

    return check


def _like(form: str, right: str, may_be_empty: bool = True) -> Check:
    def check(key: str, value: str) -> None:
        if not re.fullmatch(form, value) and not (may_be_empty and value == ""):
            raise InputError(f"{key} {value!r}: give {right}")

    return check


def _each(check: Check) -> Check:
    def check_all(key: str, values: list[str]) -> None:
        for value in values:
            check(key, value)

    return check_all


def _check_save_s(key: str, value: int) -> None:
    if not 1 <= value <= 65535:  # what sbatch's --signal takes
        raise InputError(f"{key} {value}: give 1 to 65535")


def _check_time(_: str, value: str) -> None:
    minutes(value)


def _check_image(key: str, value: str) -> None:
    refuse_control_characters(key, value)
    if value.startswith("-"):
        raise InputError(f"{key} {value!r}: give a path or an address, no option")


def _check_mount(key: str, value: str) -> None:
    refuse_control_characters(key, value)
    if not value.startswith("/") or "," in value:
        raise InputError(f"{key} {value!r}: give SOURCE:TARGET, absolute and without a comma")


def _check_environment(key: str, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"{key} {name!r}: give a name of letters, digits and _")
        if name in _OF_EACH_RANK:
            raise InputError(f"{key}.{name}: ecgscale-launch sets it for each rank; leave it out")
        if name in _OF_BASH:
            raise InputError(f"{key}.{name}: cannot be set, it is bash's own; leave it out")
        refuse_control_characters(f"{key}.{name}", value)


def _check_sbatch(key: str, options: dict[str, str]) -> None:
    for name, value in options.items():
        if not re.fullmatch(OPTION, name):
            raise InputError(f"{key} {name!r}: give an option's long name without dashes, like mail-type")
        refuse_own_option(f"{key}.{name}", name)
        refuse_control_characters(f"{key}.{name}", value)
        if set(value) & set("'\"\\"):  # sbatch undoes quotes by rules that are not the shell's
            raise InputError(f"{key}.{name} {value!r}: sbatch cannot take quotes and backslashes; leave them out")


def _check_srun(key: str, option: str) -> None:
    refuse_control_characters(key, option)
    name = option.removeprefix("--").partition("=")[0]
    if not option.startswith("--") or not re.fullmatch(OPTION, name):
        raise InputError(f"{key} {option!r}: give --option=value, with the option's long name")
    refuse_own_option(f"{key} {option!r}", name)


_A_NAME = "a name of letters, digits, _ . + @ = -"


# -- keys ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContainerConfig:
    """The container that the ranks run in."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """How it is started: by srun (pyxis and enroot), or as a command (apptainer)."""
    image: Annotated[str, _check_image] = ""
    """Image: a path, or an address as the tool writes it."""
    mounts: Annotated[list[str], _each(_check_mount)] = field(default_factory=list)
    """More folders to see inside, SOURCE:TARGET each; the run folder and the code are there anyway."""

    def __post_init__(self) -> None:
        _check_fields(self, "container.")
        if self.kind != "none" and not self.image:
            raise InputError(f"container.image is missing; container.kind {self.kind} needs one")
        if self.kind == "none" and self.image:
            raise InputError(f"container.image {self.image!r}: give container.kind too, pyxis or apptainer")


@dataclass(frozen=True)
class NetworkConfig:
    """How the ranks find and reach each other."""

    interface: Annotated[str, _like(r"[A-Za-z0-9_.@-]{1,15}", "one interface's name, like ib0")] = ""
    """Network interface for NCCL, gloo and the meeting address, like ib0 (empty: theirs to choose)."""
    timeout_s: Annotated[int, _at_least(1)] = 300
    """Seconds until all ranks must have met."""

    def __post_init__(self) -> None:
        _check_fields(self, "network.")


@dataclass(frozen=True)
class LaunchConfig:
    """What a job asks of the cluster, and what is done when something fails."""

    nodes: Annotated[int, _at_least(1)] = 1
    """Nodes."""
    tasks_per_node: Annotated[int, _at_least(1)] = 1
    """Processes per node: one per GPU, or per share of the cores."""
    gpus_per_node: Annotated[int, _at_least(0)] = 0
    """GPUs per node."""
    cpus_per_task: Annotated[int, _at_least(0)] = 0
    """Cores per process (0: SLURM's default)."""
    mem: Annotated[str, _like(MEMORY, "memory per node, like 64G")] = ""
    """Memory per node, like 64G (empty: SLURM's default; 0: all of it)."""
    time: Annotated[str, _check_time] = ""
    """Time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS (empty: the partition's default)."""
    partition: Annotated[str, _like(WORDS, "a name or names with commas")] = ""
    """Partition, or several with commas."""
    account: Annotated[str, _like(WORD, _A_NAME)] = ""
    """Account that pays."""
    qos: Annotated[str, _like(WORDS, _A_NAME)] = ""
    """Quality of service."""
    constraint: Annotated[str, _like(FEATURES, "features of nodes, like a100&ib or [rack1|rack2]")] = ""
    """Features that the nodes must have, like a100&ib."""
    exclude: Annotated[str, _like(HOSTS, "nodes, like n1,n[3-5]")] = ""
    """Nodes not to use, like n1,n[3-5]."""
    nodelist: Annotated[str, _like(HOSTS, "nodes, like n1,n[3-5]")] = ""
    """Nodes to use."""
    reservation: Annotated[str, _like(WORDS, _A_NAME)] = ""
    """Reservation."""
    name: Annotated[str, _like(JOB_NAME, "up to 128 letters, digits, _ . + @ = : -")] = ""
    """Job name (empty: the command and the run folder's name)."""
    modules: Annotated[list[str], _each(_like(MODULE, "names of modules, like cuda/12.4", may_be_empty=False))] = field(
        default_factory=list
    )
    """`module load` of each, before the job."""
    environment: Annotated[dict[str, str], _check_environment] = field(default_factory=dict)
    """Environment variables of the job; --environment.NAME VALUE gives one."""
    sbatch: Annotated[dict[str, str], _check_sbatch] = field(default_factory=dict)
    """More options of sbatch by their long name without dashes, like mail-type: END (empty value: a bare option)."""
    srun: Annotated[list[str], _each(_check_srun)] = field(default_factory=list)
    """More options of srun, --option=value each."""
    setup: Annotated[list[str], _each(refuse_control_characters)] = field(default_factory=list)
    """Shell lines that run before the job, as they stand (on the command line as [one, two] where one has commas)."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The container that the ranks run in."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """How the ranks find each other."""
    save_s: Annotated[int, _check_save_s] = 90
    """Seconds of warning before the time limit or preemption ends the job; a save must fit in."""
    hang_s: Annotated[int, _at_least(0)] = 1800
    """Without a step for so many seconds stacks are dumped and the job is requeued (0: never)."""
    retries: Annotated[int, _at_least(0)] = 3
    """Failures in a row without a new checkpoint before the job fails."""
    after_failure: Literal["relaunch", "requeue"] = "relaunch"
    """After a crash: start again on the same nodes, or give them back and queue again (a hang always requeues)."""
    shared_folder: Literal["checked", "trusted"] = "checked"
    """Whether the nodes see the run folder: checked as far as can be before submission, or trusted to be so."""
    python: Annotated[str, refuse_control_characters] = ""
    """Python on the nodes, or in the container (empty: this one; python3 in a container)."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise InputError(
                f"tasks_per_node {self.tasks_per_node}: differs from gpus_per_node {self.gpus_per_node}; "
                "give the same number, one process drives one GPU"
            )
        limit = minutes(self.time)
        if limit is not None and self.save_s >= limit * 60:
            raise InputError(f"save_s {self.save_s}: not within time {self.time}; give less, or more time")


# -- reading ---------------------------------------------------------------------------------------------------------


def load_cluster(path: Path | None, changes: settings.Given) -> LaunchConfig:
    """A cluster's YAML with what a command line changes. Raises InputError, which names the line that is wrong."""
    return changed(settings.read_texts(LaunchConfig, path) if path else settings.Given(), changes)


def changed(given: settings.Given, changes: settings.Given) -> LaunchConfig:
    """A config with changes on top. Raises InputError."""
    given.update(changes)
    return settings.build(LaunchConfig, given)
