"""`ecgscale-launch doctor`: a short job on the allocation that a cluster config describes, and what it tells.

`ecgscale_launch.checkup_job` runs the tasks; `judge` turns what they have found into a table and touches nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ecgscale.errors import InputError, one_line
from ecgscale.files import write_json
from ecgscale.settings import Given, option
from ecgscale_launch import batch, slurm
from ecgscale_launch.batch import Batch
from ecgscale_launch.checkup_job import JOB, CheckupJob, results_at, start_tasks
from ecgscale_launch.diagnosis import Check, Found, judge
from ecgscale_launch.doctor_table import lines
from ecgscale_launch.findings import collect, doing_in
from ecgscale_launch.job_folder import JobFolder, refuse_shared
from ecgscale_launch.job_record import versions
from ecgscale_launch.launch_config import LaunchConfig, load_cluster
from ecgscale_launch.launching import with_processes
from ecgscale_launch.listing import duration, screen, short_path
from ecgscale_launch.preflight import check_place
from ecgscale_launch.slurm_words import minutes, refuse_control_characters
from ecgscale_launch.snapshot import package_folders, snapshot
from ecgscale_launch.subcommand import ClusterSubcommand
from ecgscale_launch.watched_job import SEE_TASKS, WatchedJob, wait

_JOB_MINUTES = 10
_SETTLE_S = 10.0  # for files of the nodes to be seen here after the end of the job
_NEEDED = ("torch", "deepspeed")  # here, to submit what the nodes then run


@dataclass(frozen=True, kw_only=True)
class Doctor(ClusterSubcommand):
    """Run a short job on the allocation that CLUSTER.yaml describes, and say what is wrong with it.

    Exit code 1 where something fails. Further options change the cluster config, as in launching: --nodes 4
    --partition long.
    """

    cluster: Path | None = option(None, positional=True)
    """YAML file of the cluster."""
    local: int | None = option(None, metavar="N")
    """N processes of this machine, no SLURM."""
    shards: list[str] = option(default_factory=list, several=True, repeated=True, metavar="DATASET [DATASET ...]")
    """Read these too."""
    folder: str = ""
    """New folder for all files; by default runs/doctor-TIME."""
    timeout_s: float = option(600.0, metavar="S")
    """The queue included."""
    json: bool = False
    """For programs: {"folder", "job_id", "ok", "checks": [{"name", "result", "measured", "advice"}], "tasks"}."""

    def __post_init__(self) -> None:
        if self.cluster is None and self.local is None:
            raise InputError("give CLUSTER.yaml, or --local N to look at this machine")
        if self.local is not None and self.local < 1:
            raise InputError(f"--local {self.local}: give 1 or more processes")
        if not self.timeout_s > 0:
            raise InputError(f"--timeout-s {self.timeout_s:g}: give more than 0 seconds")
        for place in self.shards:
            refuse_control_characters("--shards", place)

    def run(self, changes: Given) -> int:
        run = Path(self.folder or f"runs/doctor-{time.strftime('%Y%m%d-%H%M%S')}")
        cluster = load_cluster(self.cluster, changes)
        shards = [place if "://" in place else os.path.abspath(place) for place in self.shards]  # noqa: PTH100
        deadline = time.monotonic() + self.timeout_s
        if self.local is not None:
            job = CheckupJob(with_processes(cluster, self.local), "local", str(Path.cwd()), shards)
            job_id, found = None, _here(run, job, deadline)
        else:
            job_id, found = _in_queue(run, CheckupJob(_short(cluster), "slurm", str(Path.cwd()), shards), deadline)
        checks = judge(found)
        ok = all(check.result != "fail" for check in checks)
        if self.json:
            tasks = [asdict(report) for report in found.reports]
            about = {"folder": str(run.absolute()), "job_id": job_id, "ok": ok}
            print(json.dumps(about | {"checks": [asdict(check) for check in checks], "tasks": tasks}, indent=1))
        else:
            print("\n".join(lines(checks, *screen(sys.stdout))))
            print(one_line(f"files are in {short_path(str(run))}"))
        return 0 if ok else 1


def _make_folder(run: Path, job: CheckupJob) -> JobFolder:
    """RUN/launch with a snapshot of the code, 0700, as a job has it; not listed by `status`, having no job.json."""
    refuse_control_characters("--folder", str(run))
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"--folder {run}: is there already; give a new folder")
    folder = JobFolder.of(run)
    folder.run.parent.mkdir(parents=True, exist_ok=True)
    folder.run.mkdir(mode=0o700, exist_ok=True)
    folder.path.mkdir(mode=0o700)
    refuse_shared(folder)
    snapshot(package_folders(), folder.code)
    write_json(folder.path / JOB, asdict(job))
    return folder


def _here(run: Path, job: CheckupJob, deadline: float) -> Found:
    folder = _make_folder(run, job)
    results, node, began = results_at(folder, 0), socket.gethostname(), time.monotonic()
    results.mkdir(mode=0o700)
    tasks = start_tasks(job, folder, results, [node])
    try:
        ended = wait(tasks.ended, lambda: doing_in(results, 0), deadline)
    finally:
        tasks.kill()
    lasted, count = duration(time.monotonic() - began), job.cluster.world_size
    if ended:
        how_it_went = Check("job", "pass", f"{count} process{'es' * (count > 1)} on {node}, {lasted}")
    else:
        how_it_went = Check("job", "fail", f"not done after {lasted}", SEE_TASKS)
    return collect(folder, job, [node], how_it_went)


def _short(cluster: LaunchConfig) -> LaunchConfig:
    """The same for a job of some minutes."""
    limit = minutes(cluster.time)
    time = cluster.time if limit is not None and limit <= _JOB_MINUTES else str(_JOB_MINUTES)
    return replace(cluster, name="doctor", time=time, save_s=min(cluster.save_s, 30))


def _in_queue(run: Path, job: CheckupJob, deadline: float) -> tuple[str, Found]:
    """Raises InputError for what can be said before the job is submitted."""
    if missing := [package for package in _NEEDED if package not in versions()]:
        raise InputError(f"{', '.join(missing)}: not installed for {sys.executable}; pip install {' '.join(missing)}")
    check_place(run, job.cluster)
    folder, module = JobFolder.of(run), "ecgscale_launch.checkup_job"
    asked = Batch("doctor", folder, job.cluster, folder.code, module, [str(folder.path)], Path.cwd(), requeue=False)
    batch.test(asked)
    _make_folder(run, job)
    [job_id] = batch.submit(asked)
    watched = WatchedJob(job_id, folder)
    try:
        ended = wait(watched.over, watched.told, deadline)
    finally:
        if not watched.over():
            with suppress(InputError):  # over by now
                slurm.cancel(job_id)
    if ended:
        wait(lambda: watched.ended is not None, lambda: "waiting for the results", time.monotonic() + _SETTLE_S)
    return job_id, collect(folder, job, watched.nodes, watched.judged(ended))
