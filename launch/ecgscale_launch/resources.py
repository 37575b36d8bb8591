"""What a job asks of a cluster: one typed YAML, checked before anything is submitted.

Every text that later reaches SLURM or a shell is checked here. Names keep to SLURM's own characters; values and paths
may hold quotes, spaces and ``$(...)``, and whoever writes them into a script quotes them with ``shlex.quote``.
"""

from __future__ import annotations

import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from ecgscale.config import dump, load, read_yaml
from ecgscale.errors import InputError

__all__ = [
    "ClusterConfig",
    "ContainerConfig",
    "NetworkConfig",
    "container_prefix",
    "container_srun_options",
    "dump",
    "host_python",
    "job_name",
    "load_cluster",
    "minutes",
    "rank_python",
    "refuse_control_characters",
    "script_lines",
]

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]*"
_HOSTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*")
_WORDS = re.compile(rf"{_WORD}(,{_WORD})*")
_GRAMMAR = {  # key: what SLURM takes there, how to say it
    "partition": (_WORDS, "a name or names with commas"),
    "account": (re.compile(_WORD), "a name of letters, digits, _ . + @ = -"),
    "qos": (_WORDS, "a name of letters, digits, _ . + @ = -"),
    "reservation": (_WORDS, "a name of letters, digits, _ . + @ = -"),
    "name": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=:-]{0,127}"), "up to 128 letters, digits, _ . + @ = : -"),
    "constraint": (
        re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:=+*&|()\[\]-]*"),
        "features of nodes, like a100&ib or [rack1|rack2]",
    ),
    "exclude": (_HOSTS, "nodes, like n1,n[3-5]"),
    "nodelist": (_HOSTS, "nodes, like n1,n[3-5]"),
    "mem": (re.compile(r"[0-9]+[KMGTkmgt]?"), "memory per node, like 64G"),
}
_OF_60 = r"[0-5]?\d"
_TIME_FORMS = (
    rf"(?P<m>\d{{1,7}})(:(?P<s>{_OF_60}))?",
    rf"(?P<h>\d{{1,5}}):(?P<m>{_OF_60}):(?P<s>{_OF_60})",
    rf"(?P<d>\d{{1,4}})-(?P<h>[01]?\d|2[0-3])(:(?P<m>{_OF_60})(:(?P<s>{_OF_60}))?)?",
)
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@:=-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTERFACE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")

_OF_EACH_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OF_BASH = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}  # read-only there

# Options of sbatch and srun that ecgscale-launch sets: what to use instead.
_INSTEAD = {
    "nodes": "nodes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "ntasks-per-gpu": "tasks_per_node",
    "ntasks-per-core": "tasks_per_node",
    "ntasks-per-socket": "tasks_per_node",
    "tasks-per-node": "tasks_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "gpus-per-socket": "gpus_per_node",
    "gpu-bind": "gpus_per_node",
    "cpus-per-task": "cpus_per_task",
    "cpus-per-gpu": "cpus_per_task",
    "mem": "mem",
    "mem-per-cpu": "mem",
    "mem-per-gpu": "mem",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "nodelist": "nodelist",
    "nodefile": "nodelist",
    "reservation": "reservation",
    "job-name": "name",
    "signal": "save_s",
    "requeue": "retries",
    "no-requeue": "retries",
    "kill-on-bad-exit": "retries",
    "wait": "retries",
    "export": "environment",
    "export-file": "environment",
    "network": "network.interface",
    "container": "container",
    "container-image": "container.image",
    "container-mounts": "container.mounts",
    "container-workdir": "container",
    "array": "",
    "dependency": "",
    "kill-on-invalid-dep": "",
    "output": "",
    "error": "",
    "input": "",
    "open-mode": "",
    "chdir": "",
    "wrap": "",
    "batch": "",
    "parsable": "",
    "test-only": "",
    "jobid": "",
    "multi-prog": "",
    "pty": "",
    "version": "",
    "help": "",
    "usage": "",
}


@dataclass(frozen=True)
class ContainerConfig:
    """The container that the ranks run in."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """How it is started: by srun (pyxis and enroot), or as a command (apptainer)."""
    image: str = ""
    """Image: a path, or an address as the tool writes it."""
    mounts: list[str] = field(default_factory=list)
    """More folders to see inside, SOURCE:TARGET each; the run folder and the code are there anyway."""

    def __post_init__(self) -> None:
        refuse_control_characters("container.image", self.image)
        if self.kind != "none" and not self.image:
            raise InputError(f"container.image is missing; container.kind {self.kind} needs one")
        if self.kind == "none" and self.image:
            raise InputError(f"container.image {self.image!r}: give container.kind too, pyxis or apptainer")
        if self.image.startswith("-"):
            raise InputError(f"container.image {self.image!r}: give a path or an address, no option")
        for mount in self.mounts:
            refuse_control_characters("container.mounts", mount)
            if not mount.startswith("/") or "," in mount:
                raise InputError(f"container.mounts {mount!r}: give SOURCE:TARGET, absolute and without a comma")


@dataclass(frozen=True)
class NetworkConfig:
    """How the ranks find and reach each other."""

    interface: str = ""
    """Network interface for NCCL, gloo and the meeting address, like ib0 (empty: theirs to choose)."""
    timeout_s: int = 300
    """Seconds until all ranks must have met."""

    def __post_init__(self) -> None:
        if self.interface and not _INTERFACE.fullmatch(self.interface):
            raise InputError(f"network.interface {self.interface!r}: give one interface's name, like ib0")
        if self.timeout_s < 1:
            raise InputError(f"network.timeout_s {self.timeout_s}: give 1 or more")


@dataclass(frozen=True)
class ClusterConfig:
    """What a job asks of the cluster, and what is done when something fails."""

    nodes: int = 1
    """Nodes."""
    tasks_per_node: int = 1
    """Processes per node: one per GPU, or per share of the cores."""
    gpus_per_node: int = 0
    """GPUs per node."""
    cpus_per_task: int = 0
    """Cores per process (0: SLURM's default)."""
    mem: str = ""
    """Memory per node, like 64G (empty: SLURM's default; 0: all of it)."""
    time: str = ""
    """Time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS (empty: the partition's default)."""
    partition: str = ""
    """Partition, or several with commas."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that the nodes must have, like a100&ib."""
    exclude: str = ""
    """Nodes not to use, like n1,n[3-5]."""
    nodelist: str = ""
    """Nodes to use."""
    reservation: str = ""
    """Reservation."""
    name: str = ""
    """Job name (empty: the command and the run folder's name)."""
    modules: list[str] = field(default_factory=list)
    """`module load` of each, before the job."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job; --environment.NAME VALUE gives one."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """More options of sbatch by their long name without dashes, like mail-type: END (empty value: a bare option)."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, --option=value each."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before the job, as they stand (on the command line as [one, two] where one has commas)."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The container that the ranks run in."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """How the ranks find each other."""
    save_s: int = 90
    """Seconds of warning before the time limit or preemption ends the job; a save must fit in."""
    hang_s: int = 1800
    """Without a step for so many seconds stacks are dumped and the job is requeued (0: never)."""
    retries: int = 3
    """Failures in a row without a new checkpoint before the job fails."""
    after_failure: Literal["relaunch", "requeue"] = "relaunch"
    """After a crash: start again on the same nodes, or give them back and queue again (a hang always requeues)."""
    shared_folder: Literal["checked", "trusted"] = "checked"
    """Whether the nodes see the run folder: checked as far as can be before submission, or trusted to be so."""
    python: str = ""
    """Python on the nodes, or in the container (empty: this one; python3 in a container)."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("tasks_per_node", 1), ("gpus_per_node", 0), ("cpus_per_task", 0)):
            _at_least(key, getattr(self, key), least)
        _at_least("retries", self.retries, 0)
        _at_least("hang_s", self.hang_s, 0)
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise InputError(
                f"tasks_per_node {self.tasks_per_node}: differs from gpus_per_node {self.gpus_per_node}; "
                "give the same number, one process drives one GPU"
            )
        if not 1 <= self.save_s <= 65535:  # what sbatch's --signal takes
            raise InputError(f"save_s {self.save_s}: give 1 to 65535")
        limit = minutes(self.time)
        if limit is not None and self.save_s >= limit * 60:
            raise InputError(f"save_s {self.save_s}: not within time {self.time}; give less, or more time")
        for key, (grammar, right) in _GRAMMAR.items():
            value = getattr(self, key)
            if value and not grammar.fullmatch(value):
                raise InputError(f"{key} {value!r}: give {right}")
        refuse_control_characters("python", self.python)
        for module in self.modules:
            if not _MODULE.fullmatch(module):
                raise InputError(f"modules {module!r}: give names of modules, like cuda/12.4")
        for line in self.setup:
            refuse_control_characters("setup", line)
        self._check_environment()
        self._check_options()

    def _check_environment(self) -> None:
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name):
                raise InputError(f"environment {name!r}: give a name of letters, digits and _")
            if name in _OF_EACH_RANK:
                raise InputError(f"environment.{name}: ecgscale-launch sets it for each rank; leave it out")
            if name in _OF_BASH:
                raise InputError(f"environment.{name}: cannot be set, it is bash's own; leave it out")
            refuse_control_characters(f"environment.{name}", value)

    def _check_options(self) -> None:
        for name, value in self.sbatch.items():
            if not _OPTION.fullmatch(name):
                raise InputError(f"sbatch {name!r}: give an option's long name without dashes, like mail-type")
            _refuse_own_option(f"sbatch.{name}", name)
            refuse_control_characters(f"sbatch.{name}", value)
            if set(value) & set("'\"\\"):  # sbatch undoes quotes by rules that are not the shell's
                raise InputError(f"sbatch.{name} {value!r}: sbatch cannot take quotes and backslashes; leave them out")
        for option in self.srun:
            refuse_control_characters("srun", option)
            name = option.removeprefix("--").partition("=")[0]
            if not option.startswith("--") or not _OPTION.fullmatch(name):
                raise InputError(f"srun {option!r}: give --option=value, with the option's long name")
            _refuse_own_option(f"srun {option!r}", name)


def load_cluster(path: Path | None, overrides: list[str]) -> ClusterConfig:
    """A cluster's YAML with ``--any.key value`` on top; raises InputError, which names the file where that is wrong."""
    given = _as_arguments(path) if path else []
    try:
        return load(ClusterConfig, [*given, *_entries_as_groups(overrides)])
    except InputError as error:
        if path and _refusal(given) == str(error):
            raise InputError(f"{path}: {error}") from error
        raise


def minutes(time: str) -> int | None:
    """Minutes, rounded up, of a time limit in SLURM's forms; None where it is empty."""
    if not time:
        return None
    form = next((found for form in _TIME_FORMS if (found := re.fullmatch(form, time, re.ASCII))), None)
    part = {name: int(digits or 0) for name, digits in form.groupdict().items()} if form else {}
    seconds = sum(part.get(name, 0) * unit_s for name, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)))
    if not seconds:
        raise InputError(f"time {time!r}: give minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, 1 second or more")
    return -(-seconds // 60)


def script_lines(config: ClusterConfig) -> list[str]:
    """Shell lines for the batch script, before the job: modules, environment, the user's own lines."""
    lines = []
    if config.modules:  # sbatch starts a shell without the profile that defines `module` on many clusters
        lines.append("type module > /dev/null 2>&1 || . /etc/profile")
    for module in config.modules:
        lines.append(f"module load {shlex.quote(module)} || exit 1")
    environment = {"NCCL_SOCKET_IFNAME": config.network.interface, "GLOO_SOCKET_IFNAME": config.network.interface}
    environment = (environment if config.network.interface else {}) | config.environment
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return lines + config.setup


def container_prefix(config: ClusterConfig, workdir: Path, folders: Sequence[Path]) -> list[str]:
    """What goes before python in the command of a rank: apptainer's, with ``folders`` visible inside; else nothing."""
    container = config.container
    if container.kind != "apptainer":
        return []
    binds = [argument for mount in _mounts(container, folders) for argument in ("--bind", mount)]
    gpus = ["--nv"] if config.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(workdir), container.image]


def container_srun_options(config: ClusterConfig, workdir: Path, folders: Sequence[Path]) -> list[str]:
    """Options of srun that start the ranks in pyxis's container, with ``folders`` visible inside; else none."""
    container = config.container
    if container.kind != "pyxis":
        return []
    mounts = _mounts(container, folders)
    return [
        f"--container-image={container.image}",
        *([f"--container-mounts={','.join(mounts)}"] if mounts else []),
        f"--container-workdir={workdir}",
    ]


def host_python(config: ClusterConfig) -> str:
    """The interpreter on the nodes, outside of any container."""
    return config.python if config.python and config.container.kind == "none" else sys.executable


def rank_python(config: ClusterConfig) -> str:
    """The interpreter of the ranks."""
    return config.python or (sys.executable if config.container.kind == "none" else "python3")


def job_name(command: str, run: Path) -> str:
    """The default name of a job; characters that SLURM's names do not have become _."""
    return re.sub(r"[^A-Za-z0-9_.+@=:-]", "_", f"{command}-{run.name}")[:128]


def refuse_control_characters(key: str, text: str) -> None:
    """Raises InputError where a text holds a line break, NUL, another control character or what is no UTF-8."""
    if any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in text):
        raise InputError(f"{key} {text!r}: holds a line break or another control character; give one line of text")


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{key} {value}: give {least} or more")


def _refuse_own_option(shown: str, name: str) -> None:
    """SLURM takes the beginning of an option's name for the option, so the beginnings are refused too."""
    own = name if name in _INSTEAD else next((option for option in _INSTEAD if option.startswith(name)), None)
    if own is not None:
        instead = f"use the key {_INSTEAD[own]}" if _INSTEAD[own] else "leave it out"
        raise InputError(f"{shown}: ecgscale-launch sets --{own} itself; {instead}")


def _mounts(container: ContainerConfig, folders: Sequence[Path]) -> list[str]:
    for folder in folders:
        if "," in str(folder) or ":" in str(folder):
            raise InputError(f"{folder}: a container cannot mount a path with a comma or colon; give another folder")
    return [*(f"{folder}:{folder}" for folder in folders), *container.mounts]


# -- reading ---------------------------------------------------------------------------------------------------------


class _AsWritten(yaml.SafeLoader):
    """Scalars stay text: YAML reads ``time: 1:30:00`` as the number 5400, ``3.10`` as 3.1 and ``0123`` as 83."""


_AsWritten.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))])
}


def _as_arguments(path: Path) -> list[str]:
    """A cluster's YAML as the arguments that say the same."""
    read_yaml(path, ClusterConfig)  # refuses what cannot be read and unknown keys
    loader = _AsWritten(path.read_text())
    try:
        return [f"--{key}={text}" for key, text in _leaves(loader.get_single_data(), ClusterConfig)]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    finally:
        loader.dispose()


def _leaves(tree: dict[str, Any], config_type: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    hints = get_type_hints(config_type)
    for name, value in tree.items():
        key, hint = prefix + name, hints[name]
        if value is None:
            raise InputError(f"{key}: a value is missing; give one or leave the key out")
        if is_dataclass(hint):
            yield from _leaves(value, hint, f"{key}.")  # type: ignore[arg-type]
        elif hint == list[str] or hint == dict[str, str]:
            texts = value.values() if isinstance(value, dict) else value
            what = "texts, like [one, two]" if hint == list[str] else "names with a text each, like {name: text}"
            if not isinstance(value, hint.__origin__) or not all(isinstance(text, str) for text in [*value, *texts]):
                raise InputError(f"{key} {value!r}: give {what}")
            yield key, _one_line_yaml(value)
        elif isinstance(value, str):
            yield key, value
        else:
            raise InputError(f"{key} {value!r}: give one value")


def _entries_as_groups(overrides: list[str]) -> list[str]:
    """``--environment.NAME VALUE`` -> ``--environment={NAME: VALUE}``, which adds to what is there."""
    arguments, rest = [], list(overrides)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        group, dot, name = option.partition(".")
        if dot and group in ("--environment", "--sbatch"):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise InputError(f"{option}: a value is missing; give {option} VALUE")
                text = rest.pop(0)
            word = f"{group}={_one_line_yaml({name: text})}"
        arguments.append(word)
    return arguments


def _one_line_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True).strip()


def _refusal(arguments: list[str]) -> str | None:
    try:
        load(ClusterConfig, arguments)
    except InputError as error:
        return str(error)
    return None
