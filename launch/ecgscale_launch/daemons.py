"""The processes of a devcluster: started as nobody's children, known by the folder that all of them run in."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from ecgscale.errors import InputError

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"))
_NEEDED = ("munged", "slurmctld", "slurmd", "slurmstepd", "sinfo", "srun")
_DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd", "setsid")  # setsid starts them
_KILL_LIMIT_S = 20.0


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that are not installed."""
    return [name for name in _NEEDED if shutil.which(name, path=PATH) is None]


def start(folder: Path, environment: Mapping[str, str], program: str, *arguments: str) -> None:
    """Start a daemon that is no child of ours, so that it neither ends with this process nor becomes a zombie."""
    # Nothing of a SLURM job around us may reach the daemons.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    who = arguments[-1] if program == "slurmd" else program
    with (folder / "log" / f"{who}.out").open("ab") as out:
        subprocess.run(
            ["setsid", "--fork", str(shutil.which(program, path=PATH)), *arguments],
            cwd=folder,
            env=env | {"PATH": PATH, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            check=True,
        )


def last_words(folder: Path, who: str) -> str:
    """The last errors that a daemon has written, or else its last lines."""
    lines = (folder / "log" / f"{who}.out").read_text(errors="replace").splitlines()
    wrong = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return " | ".join((wrong or lines)[-3:]) or "it has written nothing"


def alive(folder: Path) -> set[str]:
    """munged, slurmctld, n1 … as far as they run."""
    names = set()
    for process in _daemons(folder):
        with suppress(psutil.Error):
            command = process.cmdline()
            programs = (name for name in ("munged", "slurmctld") if any(part.endswith(f"/{name}") for part in command))
            names.add(command[-1] if "-N" in command else next(programs, ""))
    return names


def end_all(folder: Path) -> None:
    """End the daemons and the processes of jobs. Raises InputError where even SIGKILL does not."""
    deadline = time.monotonic() + _KILL_LIMIT_S
    while processes := _processes(folder):
        if time.monotonic() > deadline:
            raise InputError(f"{folder}: SIGKILL does not end {', '.join(str(one.pid) for one in processes)}")
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)


def _processes(folder: Path) -> set[psutil.Process]:
    """The daemons, all below them, and processes of jobs that have left their parents."""
    daemons = _daemons(folder)
    processes = set(daemons)
    for daemon in daemons:
        with suppress(psutil.Error):
            processes.update(daemon.children(recursive=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            env = process.environ()
            # A shell in which SLURM_CONF was set is no job: only slurmstepd sets the other.
            if env.get("SLURM_CONF") == str(folder / "slurm.conf") and "SLURMD_NODENAME" in env:
                processes.add(process)
    return {process for process in processes if process.pid != os.getpid()}


def _daemons(folder: Path) -> list[psutil.Process]:
    """Known by the folder in which all of them run: slurmstepd overwrites its arguments and part of its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() in _DAEMONS and Path(process.cwd()) == folder:
                found.append(process)
    return found
