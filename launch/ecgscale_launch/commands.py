"""The command lines of a job: of srun, and of a rank in its container where there is one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ecgscale.errors import InputError
from ecgscale_launch.launch_config import ContainerConfig, LaunchConfig

RANK = "ecgscale_launch.rank"  # the module that a rank runs
OF_RANKS = ("pretrain", "finetune")  # the commands that have a config, run as several processes and save when asked
# Before a rank's argv: srun starts tasks with all signals as by default, and a warning before Python listens ends them.
QUIET = ("sh", "-c", 'trap "" USR2 TERM; exec "$@"', "rank")


def host_python(cluster: LaunchConfig) -> str:
    """The interpreter on the nodes, outside of any container."""
    return cluster.python if cluster.python and cluster.container.kind == "none" else sys.executable


def rank_python(cluster: LaunchConfig) -> str:
    """The interpreter of the ranks."""
    return cluster.python or (sys.executable if cluster.container.kind == "none" else "python3")


def srun_command(cluster: LaunchConfig, run: Path, cwd: Path) -> list[str]:
    """srun with its options. Nothing ends the other ranks but the supervisor; no GPU is hidden from any rank."""
    options = ["--export=ALL", "--kill-on-bad-exit=0", "--wait=0"]
    options += [f"--nodes={cluster.nodes}", f"--ntasks-per-node={cluster.tasks_per_node}"]
    options.append(f"--ntasks={cluster.world_size}")
    if cluster.cpus_per_task:  # srun does not take it over from sbatch
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.gpus_per_node:
        options.append("--gpu-bind=none")
    if cluster.container.kind == "pyxis":
        options += _pyxis_options(cluster.container, run, cwd)
    return ["srun", *options, *cluster.srun]


def rank_command(cluster: LaunchConfig, run: Path, cwd: Path, module: str = RANK) -> list[str]:
    """The command of a task that srun starts, before its arguments."""
    container = _apptainer(cluster, run, cwd) if cluster.container.kind == "apptainer" else []
    return [*QUIET, *container, rank_python(cluster), "-u", "-m", module]


def local_rank_command(module: str = RANK) -> list[str]:
    """The command of a rank on this machine, before its arguments."""
    return [*QUIET, sys.executable, "-u", "-m", module]


def _pyxis_options(container: ContainerConfig, run: Path, cwd: Path) -> list[str]:
    mounts = ",".join(_mounts(container, (cwd, run)))
    return [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={cwd}"]


def _apptainer(cluster: LaunchConfig, run: Path, cwd: Path) -> list[str]:
    gpus = ["--nv"] if cluster.gpus_per_node else []
    binds = [argument for mount in _mounts(cluster.container, (cwd, run)) for argument in ("--bind", mount)]
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(cwd), cluster.container.image]


def _mounts(container: ContainerConfig, folders: Sequence[Path]) -> list[str]:
    """Folders that the container must show, and those that the user wants."""
    for folder in folders:
        if "," in str(folder) or ":" in str(folder):
            raise InputError(f"{folder}: a container cannot mount a path with a comma or colon; give another folder")
    return [*(f"{folder}:{folder}" for folder in folders), *container.mounts]
