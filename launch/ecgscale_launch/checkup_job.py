"""The job of `ecgscale-launch doctor`: ``python -m ecgscale_launch.checkup_job JOB_FOLDER``, on the first node.

It starts `ecgscale_launch.checkup` as training starts its ranks (same options, interpreter, container and meeting
point) and waits for all of them: one that fails or hangs says what is wrong, and ends no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ecgscale.cli import run_as_command
from ecgscale.errors import InputError
from ecgscale.files import read_json, write_json
from ecgscale.settings import from_tree
from ecgscale_launch import slurm
from ecgscale_launch.commands import local_rank_command, rank_command, srun_command
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.job_record import Where
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.local import LocalRanks
from ecgscale_launch.rendezvous import meeting_environment
from ecgscale_launch.snapshot import code_environment
from ecgscale_launch.step import StepRanks

JOB = "checkup.json"  # in the job folder: what CheckupJob says
BEGAN, ENDED = "began.json", "ended.json"  # beside the reports of tasks
_CHECKUP = "ecgscale_launch.checkup"
_MEETING_S = 120  # the most that the ranks wait for each other, whatever training allows them
_LOOK_S = 0.2


@dataclass(frozen=True)
class CheckupJob:
    """What is to be looked at, and how its tasks are started."""

    cluster: LaunchConfig
    where: Where
    cwd: str
    shards: list[str]


def results_of(folder: JobFolder) -> Path:
    """Where the tasks of the newest start write; others may preempt the job, and so start it again."""
    starts = [int(path.name.rpartition("-")[2]) for path in folder.path.glob("checkup-*")]
    return results_at(folder, max(starts, default=0))


def results_at(folder: JobFolder, start: int) -> Path:
    """Where the tasks of one start write."""
    return folder.path / f"checkup-{start}"


def start_tasks(job: CheckupJob, folder: JobFolder, results: Path, nodes: list[str]) -> LocalRanks | StepRanks:
    """Start a checkup on ``nodes``. Raises InputError where they have no meeting point."""
    cluster, run, cwd = job.cluster, folder.run, Path(job.cwd)
    env = meeting_environment(nodes, cluster.network.interface, min(cluster.network.timeout_s, _MEETING_S))
    arguments = [str(results), json.dumps(job.shards)]
    if job.where == "local":
        own = code_environment(folder.code, cluster.environment)
        argv = [*local_rank_command(_CHECKUP), *arguments]
        return LocalRanks(results, argv, own | env, cluster.world_size, shown=False)
    # --label: what tasks say comes through srun, also where a node does not see the folder.
    srun = [*srun_command(cluster, run, cwd), "--label"]
    argv = [*srun, *rank_command(cluster, run, cwd, _CHECKUP), *arguments]
    return StepRanks(slurm.own_id(), results, argv, env, cluster.world_size)


def main(arguments: list[str]) -> int:
    """Run the checkup that a job folder describes, on the nodes of this SLURM job; 0, whatever it finds."""
    folder = JobFolder(Path(arguments[0]))
    job = from_tree(CheckupJob, read_json(folder.path / JOB))
    results = results_at(folder, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    results.mkdir(mode=0o700, exist_ok=True)
    nodes, error = slurm.own_nodes(), ""
    write_json(results / BEGAN, {"nodes": nodes, "time": time.time()})
    try:
        tasks = start_tasks(job, folder, results, nodes)
        while not tasks.ended():
            time.sleep(_LOOK_S)
    except InputError as refusal:
        error = str(refusal)
    write_json(results / ENDED, {"error": error, "time": time.time()})
    return 0


if __name__ == "__main__":
    sys.exit(run_as_command("ecgscale-launch", main, sys.argv[1:]))
