"""A real SLURM on this machine, for trying and testing: munged, slurmctld and several slurmd in one private folder.

Nothing of the system is touched: key, sockets, logs, state and slurm.conf are in the folder, and `down` ends every
process and removes it. Needs Debian's slurm-wlm and munge, no root. Written against SLURM 22.05.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ecgscale.errors import InputError
from ecgscale.files import read_json, write_json
from ecgscale.settings import option
from ecgscale_launch import daemons
from ecgscale_launch.daemons import missing_programs
from ecgscale_launch.subcommand import Subcommand

DEFAULT_FOLDER = Path(tempfile.gettempdir()) / f"ecgscale-devcluster-{os.getuid()}"
_MARK = "devcluster.json"  # only a folder with this file is ever removed
_LONGEST_FOLDER = 60  # a Unix socket's path may have 107 bytes, and slurmstepd's adds up to 40
_GONE_S = 1.0  # a daemon that no look of so long a time has seen has ended


@dataclass(frozen=True)
class DevCluster:
    """A cluster as `up` has made it."""

    folder: Path
    nodes: int
    """Nodes n1 … nN, each a slurmd on this machine."""
    cpus: int
    """CPUs that each node claims, whatever this machine has."""
    kill_wait_s: int
    """Between SIGTERM and SIGKILL of a job that ends by its time limit or scancel."""
    grace_s: int
    """Between the warning and the end of a job in `main` that one in `urgent` displaces."""
    first_port: int
    """slurmctld's; the nodes have the next ones."""

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What sbatch, srun and the others need to talk to this cluster."""
        return {"SLURM_CONF": str(self.slurm_conf)}

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def export(self) -> str:
        """What a shell needs, to be typed or evaluated."""
        return f"export SLURM_CONF={self.slurm_conf}"


@dataclass(frozen=True)
class Status:
    """What runs of a cluster."""

    cluster: DevCluster
    daemons: dict[str, bool]
    """munged, slurmctld, n1 …: alive?"""
    node_states: dict[str, str]
    """As sinfo names them; empty where slurmctld does not answer."""

    @property
    def healthy(self) -> bool:
        return all(self.daemons.values()) and bool(self.node_states)

    def table(self) -> str:
        lines = [f"{self.cluster.folder}: {self.cluster.nodes} nodes of {self.cluster.cpus} CPUs"]
        for name, alive in self.daemons.items():
            lines.append(f"  {name:<10} {self.node_states.get(name, 'alive') if alive else 'dead'}")
        if not self.node_states:
            lines.append("  slurmctld does not answer")
        lines.append(f"in another terminal: {self.cluster.export}")
        return "\n".join(lines)


def up(
    folder: Path = DEFAULT_FOLDER,
    nodes: int = 4,
    cpus: int = 2,
    kill_wait_s: int = 30,
    grace_s: int = 60,
    start_limit_s: float = 60.0,
) -> DevCluster:
    """Start a cluster in a new folder and wait until all its nodes are idle.

    Raises InputError where one is there already, a program is missing, or a daemon ends or stays silent; what was
    started is ended then.
    """
    folder = _plain(folder)
    _check(folder, nodes, cpus)
    _claim(folder)
    try:
        cluster = DevCluster(folder, nodes, cpus, kill_wait_s, grace_s, _free_ports(nodes + 1))
        write_json(folder / _MARK, asdict(cluster) | {"folder": str(folder)})
        _write_settings(cluster)
        _start_daemons(cluster, time.monotonic() + start_limit_s)
    except BaseException:
        down(folder)
        raise
    return cluster


def down(folder: Path = DEFAULT_FOLDER) -> bool:
    """End all processes of a cluster, its jobs' included, and remove its folder; False where there is none.

    Needs no daemon to answer, so it also clears what a crash or a SIGKILL has left.
    """
    folder = _plain(folder)
    if not _is_ours(folder):
        return False
    daemons.end_all(folder)
    shutil.rmtree(folder)
    return True


def status(folder: Path = DEFAULT_FOLDER) -> Status:
    """Which daemons are alive and what slurmctld says of the nodes; InputError where no cluster is there."""
    cluster = load(folder)
    alive = daemons.alive(cluster.folder)
    names = ["munged", "slurmctld", *cluster.node_names]
    states = _node_states(cluster) if "slurmctld" in alive else {}
    return Status(cluster, {name: name in alive for name in names}, states)


def load(folder: Path = DEFAULT_FOLDER) -> DevCluster:
    """The cluster of a folder, alive or not."""
    folder = _plain(folder)
    if not _is_ours(folder) or not (folder / _MARK).stat().st_size:  # empty: it is just coming up
        raise InputError(f"{folder}: no devcluster is here; `ecgscale-launch devcluster up` starts one")
    return DevCluster(**read_json(folder / _MARK) | {"folder": folder})


def _plain(folder: Path) -> Path:
    """As the kernel names the working folder of a process; the last part may be no link."""
    return folder.parent.resolve() / folder.name


def _check(folder: Path, nodes: int, cpus: int) -> None:
    if missing := missing_programs():
        raise InputError(f"devcluster needs {', '.join(missing)}: on Debian, apt-get install slurm-wlm munge")
    if not 1 <= nodes <= 64:
        raise InputError(f"--nodes {nodes}: give 1 to 64")
    if not 1 <= cpus <= 256:
        raise InputError(f"--cpus {cpus}: give 1 to 256")
    path = str(folder)
    if len(os.fsencode(path)) > _LONGEST_FOLDER or not path.isprintable() or set(path) & set(" #=,%\"'\\"):
        raise InputError(f"--folder {folder}: give {_LONGEST_FOLDER} bytes at most, without spaces and quotes")


def _is_ours(folder: Path) -> bool:
    try:
        about = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and (folder / _MARK).is_file()


def _claim(folder: Path) -> None:
    """Make the folder, or take an empty one; what is in it decides who runs, so it must be nobody else's."""
    if _is_ours(folder):
        raise InputError(f"{folder}: a devcluster is here already; `ecgscale-launch devcluster down` ends it")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or any(folder.iterdir()):
            raise InputError(f"--folder {folder}: is there and not an empty folder of yours") from None
    folder.chmod(0o700)
    (folder / _MARK).touch(exist_ok=False)


def _free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the kernel gives to outgoing connections."""
    for _ in range(100):
        first = random.SystemRandom().randrange(16000, 32000 - count)
        with ExitStack() as stack, suppress(OSError):  # one is taken
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise InputError(f"no {count} free ports in a row between 16000 and 32000")


def _write_settings(cluster: DevCluster) -> None:
    for name in ("state", "spool", "log"):
        (cluster.folder / name).mkdir()
    key = cluster.folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    cluster.slurm_conf.write_text(
        _slurm_conf(cluster, pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().split(".")[0])
    )


def _slurm_conf(cluster: DevCluster, user: str, host: str) -> str:
    folder, nodes, port = cluster.folder, cluster.nodes, cluster.first_port
    return f"""\
ClusterName=dev
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# No CommunicationParameters=NoInAddrAny: where the host name is not 127.0.0.1, srun and slurmd would miss each other.
# A requeued job is held for a second longer than cred_expire, of which SLURM refuses less than 5.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_continue
JobRequeue=1
KillWait={cluster.kill_wait_s}
OverTimeLimit=0
InactiveLimit=0
MinJobAge=600
ReturnToService=2
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port + 1}-{port + nodes}] \
CPUs={cluster.cpus} RealMemory=4000 State=UNKNOWN
NodeName=ghost NodeHostname=elsewhere.invalid NodeAddr=127.0.0.1 Port=1 CPUs={cluster.cpus} RealMemory=4000 State=DOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={cluster.grace_s}
PartitionName=urgent Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF
PartitionName=elsewhere Nodes=ghost PriorityTier=1 PreemptMode=OFF
"""


def _start_daemons(cluster: DevCluster, deadline: float) -> None:
    folder = cluster.folder
    munge = [
        f"--{what}={folder}/munge.{what.split('-')[0]}" for what in ("socket", "key-file", "pid-file", "seed-file")
    ]
    # --force: nobody else reaches the socket, on purpose.
    start = partial(daemons.start, folder, cluster.environment)
    start("munged", "--foreground", "--force", "--num-threads=2", "--origin=127.0.0.1", *munge)
    _wait_until(cluster, deadline, ["munged"], lambda: (folder / "munge.socket").exists())
    start("slurmctld", "-D", "-f", str(cluster.slurm_conf))
    for name in cluster.node_names:
        start("slurmd", "-D", "-f", str(cluster.slurm_conf), "-N", name)
    _wait_until(cluster, deadline, ["slurmctld", *cluster.node_names], lambda: _all_idle(cluster))


def _wait_until(cluster: DevCluster, deadline: float, names: list[str], ready: Callable[[], bool]) -> None:
    print(f"devcluster: waiting for {', '.join(names)}", file=sys.stderr)
    last_alive = dict.fromkeys(names, time.monotonic())
    while not ready():
        now = time.monotonic()
        last_alive |= dict.fromkeys(daemons.alive(cluster.folder) & set(names), now)
        # One look proves nothing: a daemon that is being executed has neither a command line nor its name for a moment.
        if dead := [name for name in names if now - last_alive[name] > _GONE_S]:
            raise InputError(f"{dead[0]} has ended: {daemons.last_words(cluster.folder, dead[0])}")
        if time.monotonic() > deadline:
            states = _node_states(cluster)
            silent = next((name for name in names if states.get(name) != "idle"), names[0])
            raise InputError(f"{silent} is not ready in time: {daemons.last_words(cluster.folder, silent)}")
        time.sleep(0.1)


def _all_idle(cluster: DevCluster) -> bool:
    states = _node_states(cluster)
    return all(states.get(name) == "idle" for name in cluster.node_names)


def _node_states(cluster: DevCluster) -> dict[str, str]:
    """Name and state of each node; empty where slurmctld does not answer."""
    command = [
        str(shutil.which("sinfo", path=daemons.PATH)),
        "--noheader",
        "--Node",
        "--partition=main",
        "--format=%N %T",
    ]
    env = os.environ | cluster.environment
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=env)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return {}
    return dict(line.split() for line in done.stdout.splitlines())


@dataclass(frozen=True, kw_only=True)
class DevClusterCommand(Subcommand):
    """A real SLURM on this machine in one private folder, to try and test with.

    `up` prints what the shell needs: eval "$(ecgscale-launch devcluster up)"
    """

    what: Literal["up", "down", "status"] = option(positional=True)
    """up, down or status."""
    folder: Path = DEFAULT_FOLDER
    """Where all of it lies."""
    nodes: int = 4
    """Nodes to start."""
    cpus: int = 2
    """CPUs that each node claims."""
    kill_wait_s: int = 30
    """From SIGTERM to SIGKILL of a job."""
    grace_s: int = 60
    """Notice that a preempted job gets."""

    def run(self) -> int:
        if self.what == "up":
            cluster = up(self.folder, self.nodes, self.cpus, self.kill_wait_s, self.grace_s)
            print(f"devcluster: {cluster.nodes} nodes are idle; in another terminal: {cluster.export}", file=sys.stderr)
            print(cluster.export)
        elif self.what == "down":
            gone = down(self.folder)
            print(f"devcluster: {self.folder} is gone" if gone else f"devcluster: nothing in {self.folder}")
        else:
            found = status(self.folder)
            print(found.table())
            return 0 if found.healthy else 1
        return 0
