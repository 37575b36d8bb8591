"""What can be said of a job before it is submitted: does its partition exist, has it nodes enough, do they see the
run folder?"""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from ecgscale.errors import InputError
from ecgscale_launch import slurm
from ecgscale_launch.launch_config import LaunchConfig

# File systems of one machine alone.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "vfat", "f2fs", "squashfs"}


def check_place(run: Path, cluster: LaunchConfig) -> None:
    """Raises InputError, one line that says what would be right; asks SLURM, submits nothing."""
    if "%" in str(run.absolute()) or "\\" in str(run.absolute()):
        raise InputError(f"run folder {run}: SLURM replaces % and \\ in paths; give a folder without them")
    known = {one.name: one for one in slurm.partitions()}
    usual = [one.name for one in known.values() if one.default]
    chosen = cluster.partition.split(",") if cluster.partition else usual
    for name in chosen:
        if name not in known:
            raise InputError(f"partition {name!r} is unknown; this cluster has {', '.join(sorted(known))}")
    if not chosen:
        raise InputError(f"partition: this cluster has no default one; give one of {', '.join(sorted(known))}")
    most = max(known[name].nodes for name in chosen)
    if cluster.nodes > most:
        raise InputError(f"nodes {cluster.nodes}: partition {', '.join(chosen)} has {most}; give fewer")
    hosts = frozenset[str]().union(*(known[name].hosts for name in chosen))
    others = hosts - {socket.gethostname(), socket.gethostname().split(".")[0]}
    if cluster.shared_folder == "checked" and others and (kind := _kind(run)) in _LOCAL:
        raise InputError(
            f"run folder {run}: is on {kind} of this machine, which {min(others)} does not see; "
            "give a folder on a shared file system, or shared_folder trusted where the nodes do see it"
        )


def _kind(path: Path) -> str:
    """The type of the file system that a path, there or not, lies on."""
    real = path.absolute()
    while not real.exists():
        real = real.parent
    real = real.resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if real.is_relative_to(one.mountpoint)]
    return max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""
