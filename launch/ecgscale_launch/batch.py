"""Batch scripts, and sbatch: a job, or an array of several, into SLURM's queue.

The script says what is asked of SLURM, makes the environment, and `exec`s one process on the first node, so that the
warning signal, which goes to the script alone, reaches it. What that process is to do it reads from files.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from ecgscale.files import write_whole
from ecgscale_launch import slurm
from ecgscale_launch.commands import host_python
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.slurm_words import refuse_control_characters
from ecgscale_launch.snapshot import code_environment

SCRIPT = "batch.sh"
# Of what a shell inside of another job has, and what sites set for all: only this reaches a new job.
_OF_SITES = {"SBATCH_ACCOUNT": "account", "SBATCH_QOS": "qos", "SBATCH_RESERVATION": "reservation"}
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SAME_NAMES = (  # keys that are called like the options of sbatch
    "nodes", "mem", "time", "partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """What SLURM is asked to run on the first node of an allocation."""

    name: str
    folder: JobFolder
    """Where script and log are kept."""
    cluster: LaunchConfig
    code: Path
    """The packages that are imported."""
    module: str
    arguments: list[str]
    cwd: Path
    tasks: int = 1
    """More than one: an array."""
    at_once: int = 0
    """Tasks of an array that run at the same time; 0: all."""
    after: tuple[str, ...] = ()
    """Jobs that must have succeeded."""
    requeue: bool = True
    """Whether SLURM starts it again after a preemption or the loss of a node."""

    def script(self) -> str:
        """The batch script. Raises InputError for paths that cannot stand in one."""
        for what, path in (("current folder", self.cwd), ("run folder", self.folder.path)):
            refuse_control_characters(what, str(path))
        asked = [
            f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"
            for name, value in self._options().items()
            if value not in ("", 0)
        ]
        # Until the process listens, the warning would end the script.
        before = ["umask 077", "trap '' USR2", *script_lines(self.cluster)]
        code = code_environment(self.code, {})
        exports = [f"export {name}={shlex.quote(value)}" for name, value in code.items() if name != "PYTHONPATH"]
        exports.append(f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
        process = [host_python(self.cluster), "-u", "-m", self.module, *self.arguments]
        return "\n".join(["#!/bin/bash", *asked, *before, *exports, f"exec {shlex.join(process)}", ""])

    def _options(self) -> dict[str, str | int | bool]:
        cluster = self.cluster
        options: dict[str, str | int | bool] = {
            "job-name": self.name,
            "chdir": str(self.cwd),
            "output": f"{self.folder.batch}/{'%A_%a' if self.tasks > 1 else '%j'}.log",
            "open-mode": "append",
            "signal": f"B:USR2@{cluster.save_s}",
            "requeue" if self.requeue else "no-requeue": True,
            "ntasks-per-node": cluster.tasks_per_node,
            "gpus-per-node": cluster.gpus_per_node,
            "cpus-per-task": cluster.cpus_per_task,
        }
        options |= {key: getattr(cluster, key) for key in _SAME_NAMES}
        options |= {name: value or True for name, value in cluster.sbatch.items()}
        if self.tasks > 1:
            options["array"] = f"0-{self.tasks - 1}" + (f"%{self.at_once}" if self.at_once else "")
        if self.after:
            options |= {"dependency": f"afterok:{':'.join(self.after)}", "kill-on-invalid-dep": "yes"}
        return options


def script_lines(cluster: LaunchConfig) -> list[str]:
    """Shell lines before the job: modules, environment, the user's own lines."""
    lines = []
    if cluster.modules:  # sbatch starts a shell without the profile that defines `module` on many clusters
        lines.append("type module > /dev/null 2>&1 || . /etc/profile")
    for module in cluster.modules:
        lines.append(f"module load {shlex.quote(module)} || exit 1")
    interface = cluster.network.interface
    environment = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}
    environment |= cluster.environment
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return lines + cluster.setup


def test(batch: Batch) -> None:
    """Let sbatch look at a job without submitting it; InputError with its complaint."""
    slurm.run("sbatch", "--test-only", given=batch.script(), env=login_environment(batch.cluster))


def submit(batch: Batch) -> list[str]:
    """Put a job into the queue; its number, or that of each task of an array. InputError with sbatch's complaint."""
    path = batch.folder.batch / SCRIPT
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_whole(path, batch.script().encode())
    answer = slurm.run("sbatch", "--parsable", str(path), env=login_environment(batch.cluster))
    number = answer.strip().partition(";")[0]  # behind the semicolon: the cluster's name
    return [number] if batch.tasks == 1 else [f"{number}_{task}" for task in range(batch.tasks)]


def login_environment(cluster: LaunchConfig) -> dict[str, str]:
    """The environment without that of a job around this one, and without what sbatch would hold above the script."""
    kept = {"SLURM_CONF"} | {name for name, key in _OF_SITES.items() if not getattr(cluster, key)}

    def of_a_job(name: str) -> bool:
        return (name.startswith(("SLURM_", "SBATCH_")) and name not in kept) or name in _OF_A_RANK

    return {name: value for name, value in os.environ.items() if not of_a_job(name)}
