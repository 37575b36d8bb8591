"""From stages to jobs: run here one after the other, or put into SLURM's queue."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ecgscale.errors import InputError, MachineError
from ecgscale.files import read_json_if_there, write_json
from ecgscale.settings import Given
from ecgscale.stopping import STOPPED_EXIT_CODE
from ecgscale_launch import batch, slurm
from ecgscale_launch.batch import Batch
from ecgscale_launch.job_folder import JobFolder, make_private, refuse_shared
from ecgscale_launch.job_record import (
    JobRecord,
    Source,
    Where,
    job_name,
    make_job,
    read_work,
    write_record,
    write_values,
)
from ecgscale_launch.launch_config import LaunchConfig, changed
from ecgscale_launch.places import supervise
from ecgscale_launch.preflight import check_place
from ecgscale_launch.snapshot import snapshot
from ecgscale_launch.stages import Stage, Wanted, check_data, check_ranks, stages
from ecgscale_launch.watch import refuse_active

_SUPERVISE = "ecgscale_launch.supervise"


def run_here(wanted: Wanted, cluster: LaunchConfig) -> int:
    """All stages and pieces one after the other on this machine; the first exit code that is not 0, or 0."""
    planned = checked_stages(wanted, cluster, "local")
    source = Source.today()
    for stage in planned:
        for job in make_jobs(stage, cluster, "local", source):
            code = supervise(job)
            if code == STOPPED_EXIT_CODE:
                print("ecgscale-launch: the same command goes on", file=sys.stderr)
            if code:
                return code
    return 0


def submit_all(wanted: Wanted, cluster: LaunchConfig) -> list[tuple[Stage, list[str]]]:
    """Put all stages into SLURM's queue, each after the one before; the stages with their job numbers."""
    planned = checked_stages(wanted, cluster, "slurm")
    if not wanted.after:
        check_data(planned[0])
    depends = [number for after in wanted.after if (number := number_of(after)) is not None]
    batches = [batch_of(stage, cluster, wanted.at_once) for stage in planned]
    for each in batches:  # what sbatch refuses leaves no folders
        batch.test(each)
    source = Source.today()
    jobs_of = [make_jobs(stage, cluster, "slurm", source) for stage in planned]
    done: list[tuple[Stage, list[str]]] = []
    for stage, each, jobs in zip(planned, batches, jobs_of, strict=True):
        try:
            numbers = _submit(replace(each, after=tuple(depends)), jobs)
        except (InputError, MachineError, OSError):
            if done:  # no half of a chain stays in the queue
                slurm.cancel(*(_of_array(numbers[0]) for _, numbers in done))
            raise
        depends = [_of_array(numbers[0])]
        done.append((stage, numbers))
    return done


def resubmit(job: JobRecord, changes: Given, new_code: bool) -> str:
    """Put a job that has ended into the queue again, as it lies in its folder but for what is given; its number."""
    if job.where == "local":
        raise InputError(f"{job.run}: ran on this machine, not in a queue; the same command with --local goes on")
    if (read_json_if_there(job.folder.state) or {}).get("phase") == "done":
        raise InputError(f"{job.run}: is done; to go on, launch its command again with more --train.steps")
    if not new_code and not (job.code / f"{_SUPERVISE.replace('.', '/')}.py").exists():
        raise InputError(f"{job.code}: packages of an earlier version, which start otherwise; give --new-code")
    job = replace(job, cluster=changed(Given(asdict(job.cluster)), changes))
    check_place(job.folder.run, job.cluster)
    for executed in (job.folder, JobFolder(job.code.parent)):
        refuse_shared(executed)
    code = job.folder.code if new_code else job.code
    again = Batch(job.name, job.folder, job.cluster, code, _SUPERVISE, [str(job.folder.path)], Path(job.cwd))
    batch.test(again)
    if new_code:
        snapshot(Source.today().packages, job.folder.code)
        if not job.folder.config.exists():  # of an earlier version, whose ranks read the words again
            write_values(job.folder, read_work(job.command))
    write_record(job)
    [number] = _submit(again, [job])
    return number


def checked_stages(wanted: Wanted, cluster: LaunchConfig, where: Where) -> list[Stage]:
    """The stages of what is wanted. Raises InputError for what can be said before anything is made."""
    if wanted.after and where == "local":
        raise InputError("--after is for jobs in a queue; --local runs at once")
    planned = stages(wanted)
    for stage in planned:
        if where == "slurm":
            check_place(stage.run, cluster)
        check_ranks(stage, cluster)
    return planned


def make_jobs(stage: Stage, cluster: LaunchConfig, where: Where, source: Source) -> list[JobRecord]:
    """Make the job folders of a stage: of its pieces, and its own where it is an array, with what they share."""
    of_stage, shares_code = JobFolder.of(stage.run), len(stage.pieces) > 1
    for piece in stage.pieces:
        refuse_active(piece.run)
    make_private(of_stage)
    if shares_code:
        snapshot(source.packages, of_stage.code)
    jobs = []
    for piece in stage.pieces:
        if shares_code:  # its own, of another launch, would be taken
            shutil.rmtree(JobFolder.of(piece.run).code, ignore_errors=True)
        jobs.append(make_job(piece.run, piece.work, cluster, where, source, shares_code))
    if any(piece.swept for piece in stage.pieces):
        runs = [{"run": piece.run.name, "swept": piece.swept} for piece in stage.pieces]
        write_json(of_stage.sweep, {"runs": runs})
    return jobs


def batch_of(stage: Stage, cluster: LaunchConfig, at_once: int = 0) -> Batch:
    """What SLURM is asked to run for a stage: a supervisor for each piece."""
    folder, folders = JobFolder.of(stage.run), [JobFolder.of(piece.run) for piece in stage.pieces]
    return Batch(
        name=cluster.name or job_name(stage.pieces[0].work.command, folder.run),
        folder=folder,
        cluster=cluster,
        code=folder.code if len(folders) > 1 else folders[0].code,
        module=_SUPERVISE,
        arguments=[str(each.path) for each in folders],
        cwd=Path.cwd(),
        tasks=len(folders),
        at_once=at_once,
    )


def with_processes(cluster: LaunchConfig, processes: int) -> LaunchConfig:
    """The config of the same job as ``processes`` processes of one machine."""
    return replace(cluster, nodes=1, tasks_per_node=processes, gpus_per_node=0)


def number_of(after: str) -> str | None:
    """The number of a job that is to be waited for, itself given or by its run folder; None where it is done."""
    number = after
    if not re.fullmatch(r"\d+(_\d+)?", after):
        folder = JobFolder.of(Path(after))
        sweep = read_json_if_there(folder.sweep)
        if sweep is not None:
            folder = JobFolder.of(Path(after) / sweep["runs"][0]["run"])
        submitted = read_json_if_there(folder.submitted)
        if submitted is None:
            raise InputError(f"--after {after}: neither a job's number nor a run folder whose job was submitted")
        number = str(submitted["job_id"]) if sweep is None else _of_array(str(submitted["job_id"]))
        if sweep is None and (read_json_if_there(folder.state) or {}).get("phase") == "done":
            return None
    state = slurm.state(number)
    if state == "COMPLETED":
        return None
    if state is None or state in slurm.OVER:
        raise InputError(
            f"--after {after}: job {number} is {state or 'unknown to SLURM'}; give one that may still succeed"
        )
    return number


def _submit(each: Batch, jobs: Sequence[JobRecord]) -> list[str]:
    """Put a job, or an array of several, into the queue; their numbers, which are also written down."""
    numbers = batch.submit(each)
    for job, number in zip(jobs, numbers, strict=True):
        write_json(job.folder.submitted, {"job_id": number, "time": time.time()})
    return numbers


def _of_array(number: str) -> str:
    """The number of the whole array that a task belongs to."""
    return number.partition("_")[0]
