"""A real SLURM in a folder: comes up, answers, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ecgscale.errors import InputError
from ecgscale_launch import daemons
from ecgscale_launch import devcluster as dev
from ecgscale_launch.cli import subcommand

needs_slurm = pytest.mark.usefixtures("slurm_installed")


def slurm(cluster: dev.DevCluster, *command: str) -> str:
    done = subprocess.run(
        command, env=os.environ | cluster.environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def processes_of(folder: Path) -> list[str]:
    """Without the module's own idea of what belongs to it."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join([*process.cmdline(), process.cwd(), *process.environ().values()]):
                found.append(f"{process.pid} {process.name()}")
        except psutil.Error:
            continue
    return found


@pytest.fixture
def small(short_folder: Path) -> Iterator[dev.DevCluster]:
    folder = short_folder / "small"
    yield dev.up(folder, nodes=1, cpus=2)
    dev.down(folder)


def test_nodes_are_idle_and_a_job_runs_on_two_of_them(devcluster: dev.DevCluster) -> None:
    found = dev.status(devcluster.folder)
    assert found.healthy
    assert found.node_states == dict.fromkeys(("n1", "n2", "n3", "n4"), "idle")
    printed = slurm(devcluster, "srun", "--nodes=2", "--ntasks=2", "printenv", "SLURMD_NODENAME")
    assert len(set(printed.split())) == 2
    assert set(printed.split()) <= set(devcluster.node_names)


def test_second_up_is_refused_in_one_line(devcluster: dev.DevCluster) -> None:
    with pytest.raises(InputError, match="a devcluster is here already") as refused:
        dev.up(devcluster.folder)
    assert "\n" not in str(refused.value)
    assert dev.status(devcluster.folder).healthy


def test_partitions(devcluster: dev.DevCluster) -> None:
    assert "MORE" not in slurm(devcluster, "sinfo")
    assert slurm(devcluster, "sinfo", "--noheader", "--format=%R %a").split() == [
        "main",
        "up",
        "urgent",
        "up",
        "elsewhere",
        "up",
    ]
    assert "NodeHostName=elsewhere.invalid" in slurm(devcluster, "scontrol", "show", "node", "ghost")


def test_private(devcluster: dev.DevCluster) -> None:
    assert devcluster.folder.stat().st_mode & 0o777 == 0o700
    assert (devcluster.folder / "munge.key").stat().st_mode & 0o777 == 0o600


@needs_slurm
def test_two_side_by_side_and_down_ends_only_its_own(devcluster: dev.DevCluster, small: dev.DevCluster) -> None:
    assert slurm(small, "srun", "printenv", "SLURM_CONF").strip() == str(small.slurm_conf)
    assert slurm(devcluster, "srun", "printenv", "SLURM_CONF").strip() == str(devcluster.slurm_conf)
    assert dev.down(small.folder)
    assert not dev.down(small.folder)
    assert dev.status(devcluster.folder).healthy


@needs_slurm
def test_down_leaves_nothing_after_sigkill_of_slurmctld_either(
    small: dev.DevCluster, wait_for: Callable[..., None], tmp_path: Path
) -> None:
    here = tmp_path / "started"
    script = f"#!/bin/sh\nsetsid env -i sleep 1000 &\nsetsid sleep 1000 &\nsrun sleep 1000 &\ntouch {here}\nwait\n"
    (tmp_path / "job.sh").write_text(script)
    slurm(small, "sbatch", "--ntasks=1", "--output=/dev/null", str(tmp_path / "job.sh"))
    wait_for(lambda: here.exists() and len(processes_of(small.folder)) >= 8)
    controller = int((small.folder / "slurmctld.pid").read_text())
    os.kill(controller, 9)
    wait_for(lambda: not psutil.pid_exists(controller))
    found = dev.status(small.folder)
    assert found.daemons == {"munged": True, "slurmctld": False, "n1": True}
    assert not found.healthy
    assert "slurmctld  dead" in found.table()
    assert dev.down(small.folder)
    assert not small.folder.exists()
    assert processes_of(small.folder) == []


@needs_slurm
def test_daemon_that_cannot_start_is_named_and_nothing_is_left(short_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(dev, "_slurm_conf", lambda *_: "Nonsense=1\n")
    with pytest.raises(InputError, match=r"(slurmctld|n1) has ended: .*Nonsense") as refused:
        dev.up(short_folder / "broken", nodes=1)
    assert "\n" not in str(refused.value)
    assert not (short_folder / "broken").exists()


@needs_slurm
def test_one_look_that_misses_a_daemon_ends_nothing(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process is being executed, /proc shows no command line of it."""
    alive, looks = daemons.alive, iter(range(10**6))
    monkeypatch.setattr(daemons, "alive", lambda folder: set() if next(looks) % 2 == 0 else alive(folder))
    # The socket is there before a first look on a quiet machine: so it is one that is asked for twice.
    monkeypatch.setattr(dev, "_all_idle", lambda cluster: next(looks) > 4 and dev.status(cluster.folder).healthy)
    folder = short_folder / "flicker"
    dev.up(folder, nodes=1)
    assert dev.down(folder)


@needs_slurm
def test_command_line(short_folder: Path, capsys) -> None:
    folder = ["--folder", str(short_folder / "cli")]
    assert subcommand("devcluster", ["up", *folder, "--nodes", "1"]) == 0
    out, err = capsys.readouterr()
    export = f"export SLURM_CONF={short_folder}/cli/slurm.conf\n"
    assert out == export
    assert "n1" in err
    assert err.endswith(f"1 nodes are idle; in another terminal: {export}")
    assert subcommand("devcluster", ["status", *folder]) == 0
    shown = capsys.readouterr().out
    assert "n1         idle" in shown
    assert shown.endswith(f"in another terminal: {export}")
    assert subcommand("devcluster", ["down", *folder]) == 0
    assert subcommand("devcluster", ["down", *folder]) == 0
    with pytest.raises(InputError, match="no devcluster is here"):
        subcommand("devcluster", ["status", *folder])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "--nodes", "0"], "--nodes 0"),
        (["up", "--cpus", "0"], "--cpus 0"),
        (["up", "--folder", "/tmp/" + "x" * 60], "60 bytes at most"),
        (["restart"], "what 'restart': give one of 'up', 'down', 'status'"),
    ],
)
def test_refusals(arguments: list[str], said: str, monkeypatch) -> None:
    monkeypatch.setattr(dev, "missing_programs", list)
    with pytest.raises(InputError, match=said):
        subcommand("devcluster", arguments)


def test_missing_programs_name_the_packages(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(daemons, "PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt-get install slurm-wlm munge"):
        dev.up(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_foreign_folder_is_left_alone(tmp_path: Path, short_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(dev, "missing_programs", list)
    (short_folder / "mine").mkdir()
    (short_folder / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not an empty folder of yours"):
        dev.up(short_folder / "mine")
    assert not dev.down(short_folder / "mine")
    assert (short_folder / "mine" / "thesis.txt").exists()
