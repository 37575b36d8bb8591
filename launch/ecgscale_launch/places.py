"""Where a job runs, by what its job.json says: on the nodes of an allocation, or on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ecgscale.training.environment import SAVE_S
from ecgscale_launch import slurm
from ecgscale_launch.commands import local_rank_command, rank_command, srun_command
from ecgscale_launch.job_record import JobRecord
from ecgscale_launch.local import LocalRanks
from ecgscale_launch.snapshot import code_environment
from ecgscale_launch.step import StepRanks
from ecgscale_launch.supervisor import Place, Supervisor
from ecgscale_launch.sweep_table import collect_above


def supervise(job: JobRecord, asked: Sequence[int] = ()) -> int:
    """Run a job to its end; its exit code. ``asked``: signals that came before anybody listened."""
    place = in_allocation(job) if job.where == "slurm" else on_this_machine(job)
    supervisor = Supervisor(job.folder, job.cluster, place, asked)
    code = supervisor.run()
    if supervisor.done:
        collect_above(job.folder.run)
    return code


def on_this_machine(job: JobRecord) -> Place:
    """Ranks as processes beside this one, of which the first shows here what it says."""
    own = code_environment(job.code, job.cluster.environment) | {SAVE_S: str(job.cluster.save_s)}

    def start(attempt: Path, env: dict[str, str]) -> LocalRanks:
        argv = [*local_rank_command(), str(attempt), job.command[0]]
        return LocalRanks(attempt, argv, env | own, job.cluster.world_size, shown=True)

    return Place([job.host], start)


def in_allocation(job: JobRecord) -> Place:
    """Ranks as tasks of a step of the SLURM job that this process is in."""
    job_id, run, cwd = slurm.own_id(), job.folder.run, Path(job.cwd)
    own = code_environment(job.code, os.environ)

    def start(attempt: Path, env: dict[str, str]) -> StepRanks:
        srun = [*srun_command(job.cluster, run, cwd), f"--output={attempt}/rank-%t.log"]
        rank = [*rank_command(job.cluster, run, cwd), str(attempt), job.command[0]]
        return StepRanks(job_id, attempt, [*srun, *rank], own | env, job.cluster.world_size)

    return Place(slurm.own_nodes(), start, job_id, lambda: slurm.requeue(job_id))
