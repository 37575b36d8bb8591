"""From commands and a cluster config to jobs: what is run where, after what, in which folders."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from ecgscale.config import FinetuneConfig, PretrainConfig
from ecgscale.config import dump as dump_config
from ecgscale.data.shards import MANIFEST
from ecgscale.errors import InputError, MachineError
from ecgscale.files import write_json
from ecgscale.stopping import STOPPED_EXIT_CODE
from ecgscale.training.environment import HANG_S, MEETING_TIMEOUT_S, SAVE_S, SUPERVISOR
from ecgscale_launch import slurm
from ecgscale_launch.folder import JobFolder, code_environment, read_json_if_there
from ecgscale_launch.job import Batch, Request, script, submit, test
from ecgscale_launch.local import LocalRanks, rank_environment
from ecgscale_launch.place import check_place
from ecgscale_launch.rank import OF_RANKS, QUIET
from ecgscale_launch.record import (
    Job,
    Where,
    check_job,
    load_command,
    make_job_folder,
    make_private,
    read_job,
    refuse_shared,
    rewrite,
)
from ecgscale_launch.resources import (
    ClusterConfig,
    container_prefix,
    container_srun_options,
    dump,
    host_python,
    job_name,
    load_cluster,
    rank_python,
    refuse_control_characters,
    script_lines,
)
from ecgscale_launch.results import SWEEP, collect_above
from ecgscale_launch.supervisor import Limits, Supervisor
from ecgscale_launch.watch import refuse_active

_RANK = "ecgscale_launch.rank"


_IN_PARTS = ("ingest", "reproduce", "scaling-law")  # the commands that know --part I/N and --merge


@dataclass(frozen=True)
class Piece:
    """One job: a command of ecgscale and its run folder."""

    run: Path
    command: list[str]
    config: PretrainConfig | FinetuneConfig | None = None  # that the command amounts to
    swept: dict[str, str] = field(default_factory=dict)  # what a sweep gave it


@dataclass(frozen=True)
class Stage:
    """Pieces that run side by side, as one job or as an array, after the stage before has succeeded."""

    run: Path
    pieces: list[Piece]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for beside the cluster."""

    commands: list[list[str]]
    run: str = ""
    sweeps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    parts: int = 0
    after: tuple[str, ...] = ()
    at_once: int = 0


def stages(wanted: Wanted) -> list[Stage]:
    """The stages of a job or a chain. Raises InputError where something does not go together."""
    if len(wanted.commands) > 1 and (wanted.run or wanted.sweeps or wanted.parts):
        raise InputError("--run, --sweep and --parts are for one command, not for a chain; launch it with --after")
    found = []
    for command in wanted.commands:
        config = load_command(command)
        run = _run_folder(command, config, wanted.run)
        if wanted.parts:
            if command[0] not in _IN_PARTS:
                raise InputError(f"--parts splits {', '.join(_IN_PARTS)}, not {command[0]}")
            parts = [f"{part}/{wanted.parts}" for part in range(1, wanted.parts + 1)]
            pieces = [Piece(run / f"part-{i:04d}", [*command, "--part", part]) for i, part in enumerate(parts, 1)]
            found += [Stage(run, pieces), Stage(run / "merge", [Piece(run / "merge", [*command, "--merge"])])]
        elif wanted.sweeps:
            if command[0] not in OF_RANKS:
                raise InputError(f"--sweep varies keys of {' or '.join(OF_RANKS)}, not of {command[0]}")
            found.append(Stage(run, list(_swept(run, command, wanted.sweeps))))
        else:
            found.append(Stage(run, [Piece(run, command, config)]))
    runs = [piece.run for stage in found for piece in stage.pieces]
    if again := next((run for run in runs if runs.count(run) > 1), None):
        raise InputError(f"{again}: two jobs would share this run folder; give each its own run.dir")
    return found


def _run_folder(command: list[str], config: PretrainConfig | FinetuneConfig | None, given: str) -> Path:
    if config is None:
        return Path(given or f"runs/{command[0]}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not (config.run.dir or given):
        raise InputError("run.dir is missing; give --run.dir FOLDER")
    return Path(config.run.dir or given)


def _swept(run: Path, command: list[str], sweeps: tuple[tuple[str, tuple[str, ...]], ...]) -> Iterator[Piece]:
    keys = [key for key, _ in sweeps]
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}
    for values in product(*(values for _, values in sweeps)):
        name = "_".join(f"{short[key]}={value}" for key, value in zip(keys, values, strict=True))
        varied = [*command, *(f"--{key}={value}" for key, value in zip(keys, values, strict=True))]
        folder = run / re.sub(r"[^A-Za-z0-9_.,+=-]", "-", name)
        yield Piece(folder, varied, load_command(varied), dict(zip(keys, values, strict=True)))


def check_ranks(stage: Stage, cluster: ClusterConfig) -> None:
    """Raises InputError where a command knows no ranks, or cannot be shared by as many as the cluster config asks."""
    for piece in stage.pieces:
        if piece.config is not None:
            piece.config.train.lanes_for(cluster.world_size)
        elif cluster.world_size > 1:
            raise InputError(
                f"{piece.command[0]} does not run as several processes under ecgscale-launch: give nodes 1 and "
                f"tasks_per_node 1 (only {' and '.join(OF_RANKS)} do)"
            )


def check_data(stage: Stage) -> None:
    """Raises InputError where a data set that is to be here already is not."""
    for piece in stage.pieces:
        for place in piece.config.data.shards if piece.config is not None else ():
            if "://" not in place and not (Path(place) / MANIFEST).exists():
                raise InputError(f"data.shards: {place} is no data set: see `ecgscale ingest`")


# -- on this machine -------------------------------------------------------------------------------------------------


def run_here(wanted: Wanted, cluster: ClusterConfig) -> int:
    """All stages and pieces one after the other on this machine; the first exit code that is not 0, or 0."""
    _refuse_after(wanted, "local")
    planned = stages(wanted)
    for stage in planned:
        check_ranks(stage, cluster)
    for stage in planned:
        for folder in _folders(stage, cluster, "local"):
            code = _supervise_here(read_job(folder.run))
            if code:
                return code
    return 0


def _supervise_here(job: Job) -> int:
    cluster = job.cluster
    code = code_environment(job.folder, cluster.environment)

    def start(attempt: Path, env: dict[str, str]) -> LocalRanks:
        argv = [*_local_rank(), str(attempt), "--", *job.arguments]
        return LocalRanks(attempt, argv, env | code | {SAVE_S: str(cluster.save_s)}, cluster.world_size, shown=True)

    limits = Limits(cluster.save_s, cluster.hang_s, cluster.retries)
    supervisor = Supervisor(job.folder, limits, start, [job.host], None)
    ended = supervisor.run(cluster.network.interface, cluster.network.timeout_s, None)
    if ended == 0:
        collect_above(job.run)
    if ended == STOPPED_EXIT_CODE:
        print("ecgscale-launch: the same command goes on", file=sys.stderr)
    return ended


def _local_rank() -> list[str]:
    """The command of a rank of this machine, before its arguments."""
    return [sys.executable, "-u", "-m", _RANK]


# -- in the queue ----------------------------------------------------------------------------------------------------


def submit_all(wanted: Wanted, cluster: ClusterConfig) -> list[tuple[Stage, list[str]]]:
    """Put all stages into SLURM's queue, each after the one before; the stages with their job numbers."""
    planned = stages(wanted)
    for stage in planned:
        check_place(stage.run, cluster)
        check_ranks(stage, cluster)
    if not wanted.after:
        check_data(planned[0])
    depends = [number for one in wanted.after if (number := _number(one)) is not None]
    requests = [request_for(stage, cluster, wanted.at_once) for stage in planned]
    for stage, request in zip(planned, requests, strict=True):  # what sbatch refuses leaves no folders
        test(request, len(stage.pieces))
    folders_of = [_folders(stage, cluster, "slurm") for stage in planned]
    done: list[tuple[Stage, list[str]]] = []
    for stage, request, folders in zip(planned, requests, folders_of, strict=True):
        try:
            numbers = _submit(replace(request, after=tuple(depends)), [read_job(one.run) for one in folders])
        except (InputError, MachineError, OSError):
            if done:  # no half of a chain stays in the queue
                slurm.cancel(*(numbers[0].partition("_")[0] for _, numbers in done))
            raise
        depends = [numbers[0].partition("_")[0]]
        done.append((stage, numbers))
    return done


def resubmit(job: Job, overrides: list[str], new_code: bool) -> str:
    """Put a job that has ended into the queue again, as it lies in its folder but for what is given; its number."""
    if job.where == "local":
        raise InputError(f"{job.run}: ran on this machine, not in a queue; the same command with --local goes on")
    if (read_json_if_there(job.folder.state) or {}).get("phase") == "done":
        raise InputError(f"{job.run}: is done; to go on, launch its command again with more --train.steps")
    job = replace(job, cluster=load_cluster(job.folder.cluster, overrides))
    stage = Stage(job.run, [Piece(job.run, job.command)])
    check_place(job.run, job.cluster)
    refuse_shared(job.folder)
    request = request_for(stage, job.cluster, cwd=job.cwd)
    test(request, 1)
    rewrite(job, new_code)
    [number] = _submit(request, [job])
    return number


def _submit(request: Request, jobs: Sequence[Job]) -> list[str]:
    """Put a job, or an array of several, into the queue; their numbers, which are also written down."""
    numbers = submit(request, [batch_of(job) for job in jobs])
    for job, number in zip(jobs, numbers, strict=True):
        write_json(job.folder.submitted, {"job_id": number, "time": time.time()})
    return numbers


def dry_run(wanted: Wanted, cluster: ClusterConfig, where: Where) -> str:
    """What would be submitted, or run here, with all that is checked before: nothing is written or started.

    Resolved configs, the batch scripts, the ranks' commands and what their environment has of its own.
    """
    _refuse_after(wanted, where)
    planned = stages(wanted)
    for stage in planned:
        if where == "slurm":
            check_place(stage.run, cluster)
        check_ranks(stage, cluster)
        for piece in stage.pieces:
            refuse_active(piece.run)
    if not wanted.after:
        check_data(planned[0])
    said = ["# --- cluster ---", dump(cluster), *_missing_mounts(cluster)]
    for number, stage in enumerate(planned):
        if where == "slurm":
            after = ("JOB_BEFORE",) if number else wanted.after
            request = replace(request_for(stage, cluster, wanted.at_once), after=after)
            said += [f"# --- {stage.run}: batch script ---", script(request, len(stage.pieces))]
        for piece in stage.pieces:
            said += _dry_piece(piece, cluster, where)
    return "\n".join(said)


def _dry_piece(piece: Piece, cluster: ClusterConfig, where: Where) -> list[str]:
    folder, config = JobFolder.of(piece.run), check_job(piece.run, piece.command)
    lines = [] if config is None else [f"# --- {piece.run}: config ---", dump_config(config)]
    command = piece.command if config is None else [piece.command[0], "--config", str(folder.config)]
    if where == "slurm":
        ranks = [*srun_command(cluster, folder), *rank_command(cluster, folder)]
        own = {"RANK": "$SLURM_PROCID", "LOCAL_RANK": "$SLURM_LOCALID", "WORLD_SIZE": str(cluster.world_size)}
        own |= {"LOCAL_WORLD_SIZE": str(cluster.tasks_per_node)}
    else:
        ranks = [*QUIET, *_local_rank()]
        last = cluster.world_size - 1
        own = rank_environment(0, cluster.world_size, cluster.environment)
        own |= dict.fromkeys(("RANK", "LOCAL_RANK"), f"0..{last}" if last else "0") | {SUPERVISOR: "(the launcher)"}
    own |= {"MASTER_ADDR": "(the first node's)", "MASTER_PORT": "(one that is free then)"}
    own |= {MEETING_TIMEOUT_S: f"{cluster.network.timeout_s:g}", HANG_S: f"{cluster.hang_s:g}"}
    lines.append(f"# {piece.run} runs: {shlex.join([*ranks, 'ATTEMPT', '--', *command])}")
    lines.append(f"# {piece.run}: environment of a rank: {' '.join(f'{name}={value}' for name, value in own.items())}")
    return lines


def _missing_mounts(cluster: ClusterConfig) -> list[str]:
    """Of what a container is to show; a node may have what this machine has not, so none is refused."""
    sources = [Path(mount.partition(":")[0]) for mount in cluster.container.mounts]
    return [f"# container.mounts: {one} is not there on this machine" for one in sources if not one.exists()]


def _refuse_after(wanted: Wanted, where: Where) -> None:
    if wanted.after and where == "local":
        raise InputError("--after is for jobs in a queue; --local runs at once")


def _folders(stage: Stage, cluster: ClusterConfig, where: Where) -> list[JobFolder]:
    folders = []
    for piece in stage.pieces:
        refuse_active(piece.run)
        folders.append(JobFolder(make_job_folder(piece.run, piece.command, cluster, where)))
    of_stage = JobFolder.of(stage.run)
    make_private(of_stage)
    if any(piece.swept for piece in stage.pieces):
        runs = [{"run": piece.run.name, "swept": piece.swept} for piece in stage.pieces]
        write_json(of_stage.path / SWEEP, {"runs": runs})
    return folders


def request_for(stage: Stage, cluster: ClusterConfig, at_once: int = 0, cwd: Path | None = None) -> Request:
    """What sbatch is asked for a stage. The script imports the first piece's snapshot; all pieces have the same."""
    cwd = cwd or Path.cwd()
    for what, path in (("current folder", cwd), ("run folder", JobFolder.of(stage.run).path)):
        refuse_control_characters(what, str(path))
    first = JobFolder.of(stage.pieces[0].run)
    code = code_environment(first, {})
    exports = [f"export {name}={shlex.quote(value)}" for name, value in code.items() if name != "PYTHONPATH"]
    exports.append(f"export PYTHONPATH={shlex.quote(str(first.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    options = {
        "chdir": str(cwd),
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.tasks_per_node,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "nodelist": cluster.nodelist,
        "reservation": cluster.reservation,
    }
    options |= {name: value or True for name, value in cluster.sbatch.items()}
    return Request(
        name=cluster.name or job_name(stage.pieces[0].command[0], stage.run),
        folder=JobFolder.of(stage.run).submitit,
        python=host_python(cluster),
        # Until the supervisor listens, the warning would end the script.
        setup=["umask 077", "trap '' USR2", *script_lines(cluster), *exports],
        options=options,
        signal_s=cluster.save_s,
        at_once=at_once,
    )


def batch_of(job: Job) -> Batch:
    """What the supervisor of a job needs to know."""
    cluster, folder = job.cluster, job.folder
    return Batch(
        folder=str(folder.path),
        srun=srun_command(cluster, folder),
        rank=rank_command(cluster, folder),
        command=job.arguments,
        world_size=cluster.world_size,
        interface=cluster.network.interface,
        meeting_timeout_s=cluster.network.timeout_s,
        save_s=cluster.save_s,
        hang_s=cluster.hang_s,
        retries=cluster.retries,
        requeue_crashed=cluster.after_failure == "requeue",
    )


def srun_command(cluster: ClusterConfig, folder: JobFolder) -> list[str]:
    """srun with its options. Nothing ends the other ranks but the supervisor; no GPU is hidden from any rank."""
    sizes = [f"--nodes={cluster.nodes}", f"--ntasks-per-node={cluster.tasks_per_node}"]
    sizes.append(f"--ntasks={cluster.world_size}")
    if cluster.cpus_per_task:  # srun does not take it over from sbatch
        sizes.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.gpus_per_node:
        sizes.append("--gpu-bind=none")
    container = container_srun_options(cluster, Path.cwd(), _seen(folder))
    return ["srun", "--export=ALL", "--kill-on-bad-exit=0", "--wait=0", *sizes, *container, *cluster.srun]


def rank_command(cluster: ClusterConfig, folder: JobFolder, module: str = _RANK) -> list[str]:
    """The command of a rank, in the container where there is one."""
    prefix = container_prefix(cluster, Path.cwd(), _seen(folder))
    return [*QUIET, *prefix, rank_python(cluster), "-u", "-m", module]


def _seen(folder: JobFolder) -> list[Path]:
    """Folders that a container must show."""
    return [Path.cwd(), folder.run]


def _number(given: str) -> str | None:
    """The number of a job that is to be waited for, itself given or by its run folder; None where it is done."""
    number = given
    if not re.fullmatch(r"\d+(_\d+)?", given):
        folder = JobFolder.of(Path(given))
        sweep = read_json_if_there(folder.path / SWEEP)
        if sweep is not None:
            folder = JobFolder.of(Path(given) / sweep["runs"][0]["run"])
        submitted = read_json_if_there(folder.submitted)
        if submitted is None:
            raise InputError(f"--after {given}: neither a job's number nor a run folder whose job was submitted")
        number = str(submitted["job_id"])
        number = number.partition("_")[0] if sweep is not None else number
        if sweep is None and (read_json_if_there(folder.state) or {}).get("phase") == "done":
            return None
    state = slurm.state(number)
    if state == "COMPLETED":
        return None
    if state is None or state in slurm.OVER:
        raise InputError(
            f"--after {given}: job {number} is {state or 'unknown to SLURM'}; give one that may still succeed"
        )
    return number


def with_processes(cluster: ClusterConfig, processes: int) -> ClusterConfig:
    """The config of the same job as ``processes`` processes of one machine."""
    return replace(cluster, nodes=1, tasks_per_node=processes, gpus_per_node=0)
