"""`ecgscale-launch doctor`: a short job on the allocation that a cluster config describes, and what it tells.

The job is started as training is, with the same options, interpreter, container and meeting point, and runs
`ecgscale_launch.checkup` as every task. `judge` turns what the tasks have found into a table; it touches nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ecgscale.cli import OneLineParser
from ecgscale.errors import InputError, one_line
from ecgscale_launch import slurm
from ecgscale_launch.checkup import MEETING_TIMEOUT_S, Report
from ecgscale_launch.folder import JobFolder, read_json, write_json
from ecgscale_launch.job import Request, script, submit
from ecgscale_launch.launching import Piece, Stage, rank_command, request_for, srun_command, with_processes
from ecgscale_launch.listing import duration, screen, short_path
from ecgscale_launch.place import check_place
from ecgscale_launch.record import code_environment, package_folders, refuse_shared, snapshot, versions
from ecgscale_launch.rendezvous import meeting_point
from ecgscale_launch.resources import ClusterConfig, load_cluster, minutes, refuse_control_characters
from ecgscale_launch.step import StepRanks

_JOB_MINUTES = 10
_MEETING_S = 120  # the most that the ranks wait for each other, whatever training allows them
_LOOK_S = 0.2
_SAY_S = 1.0
_ASK_S = 2.0  # between two questions to SLURM
_SETTLE_S = 10.0  # for files of the nodes to be seen here after the end of the job
_MODULE = "ecgscale_launch.checkup"
_NEEDED = ("torch", "deepspeed", "submitit")  # here, to submit what the nodes then run

# -- what is good enough ---------------------------------------------------------------------------------------------

SKEW_WARN_S = 1.0  # what nodes write down is compared in steps of seconds: heartbeats, log lines, saving times
WRITE_WARN_MB_PER_S = 50.0  # a checkpoint of 90 million parameters is 1.1 GB: 22 s, within the warning of 90 s
READ_WARN_MB_PER_S = 100.0  # every rank reads the checkpoint at a restart, and Python its packages
FREE_FAIL_BYTES = 2e9  # not one checkpoint of 90 million parameters beside the one before
FREE_WARN_BYTES = 20e9  # a run keeps several
SHARD_WARN_RECORDS_PER_S = 500.0  # a core decodes thousands per second: below, the storage holds it up
MEETING_WARN_S = 60.0  # nodes start within seconds of each other; each restart pays this again
OPEN_FILES_WARN = 4096  # a set of ten million records is thousands of shards, each mapped by every rank
MEMORY_WARN_BYTES = 2e9  # per task: PyTorch and its libraries alone take one
GPU_FREE_WARN = 0.95  # share of a GPU's memory that nobody else holds; a context takes a few hundred MB
NETWORK_WARN_GPU_GB_PER_S = 2.0  # 25 Gbit/s Ethernet gives 3, InfiniBand 20 and more, NVLink hundreds
NETWORK_WARN_CPU_GB_PER_S = 0.05  # half of what gigabit Ethernet gives

Result = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """A line of the table. Names and results are those of --json."""

    name: str
    result: Result
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Found:
    """What a checkup has left behind, and what it was to find."""

    cluster: ClusterConfig
    nodes: list[str]
    """Of the allocation, in the order of their ranks; empty where the job never began."""
    reports: list[Report]
    job: Check
    """How the job itself went."""
    code: str
    """The snapshot that the tasks are to run."""
    here: Mapping[str, str] = field(default_factory=dict)
    """Versions where the command was given; empty where the tasks have another interpreter on purpose."""
    last_words: Mapping[int, str] = field(default_factory=dict)
    """What tasks said last, by rank."""
    shards: Sequence[str] = ()

    def of(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """A measurement of all tasks that have it, with their nodes."""
        return ((report.node, report.found[name]) for report in self.reports if name in report.found)

    def per_node(self, name: str, key: str) -> dict[str, Any]:
        """A value of each node's first task."""
        values: dict[str, Any] = {}
        for node, about in self.of(name):
            values.setdefault(node, about[key])
        return values


# -- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Check the allocation that CLUSTER.yaml describes; 1 where something fails.

    --json prints {"folder", "job_id", "ok", "checks": [{"name", "result", "measured", "advice"}], "tasks": [...]}.
    """
    parser = OneLineParser(
        prog="ecgscale-launch doctor",
        usage="%(prog)s CLUSTER.yaml [--key VALUE ...] [options]",
        description="Run a short job on the allocation that CLUSTER.yaml describes, and say what is wrong with it.",
        epilog="Further options change the cluster config, as in launching: --nodes 4 --partition long",
        allow_abbrev=False,
    )
    parser.add_argument("--local", type=int, metavar="N", help="N processes of this machine, no SLURM")
    parser.add_argument("--shards", nargs="+", action="extend", default=[], metavar="DATASET", help="read these too")
    parser.add_argument("--folder", metavar="FOLDER", help="new folder for all files (runs/doctor-TIME)")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="the queue included (600)")
    parser.add_argument("--json", action="store_true", help="for programs")
    rest = list(argv)
    file = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    options, overrides = parser.parse_known_args(rest)
    if file is None and options.local is None:
        raise InputError("doctor: give CLUSTER.yaml, or --local N to look at this machine")
    if options.local is not None and options.local < 1:
        raise InputError(f"--local {options.local}: give 1 or more processes")
    if not options.timeout_s > 0:
        raise InputError(f"--timeout-s {options.timeout_s:g}: give more than 0 seconds")
    for place in options.shards:
        refuse_control_characters("--shards", place)
    run = Path(options.folder or f"runs/doctor-{time.strftime('%Y%m%d-%H%M%S')}")
    cluster = load_cluster(file, overrides)
    shards = [place if "://" in place else os.path.abspath(place) for place in options.shards]  # noqa: PTH100
    deadline = time.monotonic() + options.timeout_s
    if options.local is not None:
        job_id, found = None, _here(run, with_processes(cluster, options.local), shards, deadline)
    else:
        job_id, found = _in_queue(run, cluster, shards, deadline)
    checks = judge(found)
    ok = all(check.result != "fail" for check in checks)
    if options.json:
        tasks = [asdict(report) for report in found.reports]
        about = {"folder": str(run.absolute()), "job_id": job_id, "ok": ok}
        print(json.dumps(about | {"checks": [asdict(check) for check in checks], "tasks": tasks}, indent=1))
    else:
        print("\n".join(lines(checks, *screen(sys.stdout))))
        print(one_line(f"files are in {short_path(str(run))}"))
    return 0 if ok else 1


def _make_folder(run: Path) -> JobFolder:
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
    return folder


# -- on this machine -------------------------------------------------------------------------------------------------


def _here(run: Path, cluster: ClusterConfig, shards: list[str], deadline: float) -> Found:
    folder = _make_folder(run)
    results, node, began = folder.path / "checkup", socket.gethostname(), time.monotonic()
    results.mkdir(mode=0o700)
    argv = [sys.executable, "-u", "-m", _MODULE, str(results), *_shard_options(shards)]
    env = code_environment(folder, cluster.environment)
    env |= _meeting_environment([node], cluster.network.interface, _meeting_s(cluster))
    tasks = [_start_here(argv, env, rank, cluster.tasks_per_node, results) for rank in range(cluster.tasks_per_node)]
    ended = False
    try:
        ended = _wait(lambda: all(task.poll() is not None for task in tasks), lambda: _told(results, 0), deadline)
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    if ended:
        job = Check(
            "job",
            "pass",
            f"{len(tasks)} process{'es' * (len(tasks) > 1)} on {node}, {duration(time.monotonic() - began)}",
        )
    else:
        job = Check("job", "fail", f"not done after {duration(time.monotonic() - began)}", _SEE_TASKS)
    return _collect(folder, results, cluster, [node], job, shards)


def _start_here(
    argv: list[str], env: dict[str, str], rank: int, world_size: int, folder: Path
) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    own |= {"LOCAL_WORLD_SIZE": str(world_size)}
    with (folder / f"rank-{rank}.log").open("ab") as log:
        return subprocess.Popen(
            argv, env=os.environ | env | own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


# -- in the queue ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkup:
    """What submitit keeps and runs on the first node of the job. Plain values: the snapshot's code reads them."""

    folder: str
    srun: list[str]
    task: list[str]
    options: list[str]
    world_size: int
    interface: str
    meeting_timeout_s: float

    def __call__(self) -> None:
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))  # others may preempt and so requeue the job
        results = Path(self.folder) / f"checkup-{start}"
        results.mkdir(mode=0o700, exist_ok=True)
        nodes = slurm.expand(os.environ["SLURM_JOB_NODELIST"])
        write_json(results / "began.json", {"nodes": nodes, "time": time.time()})
        error = ""
        try:
            env = _meeting_environment(nodes, self.interface, self.meeting_timeout_s)
        except InputError as refusal:
            error = str(refusal)
        else:
            ranks = StepRanks(results, [*self.srun, *self.task, str(results), *self.options], env, self.world_size)
            while not ranks.ended():
                time.sleep(_LOOK_S)
        write_json(results / "ended.json", {"error": error, "time": time.time()})
        sys.stderr.flush()
        os._exit(0)  # submitit would pickle a result


def _in_queue(run: Path, cluster: ClusterConfig, shards: list[str], deadline: float) -> tuple[str, Found]:
    """Raises InputError for what can be said before the job is submitted."""
    if missing := [package for package in _NEEDED if package not in versions()]:
        raise InputError(f"{', '.join(missing)}: not installed for {sys.executable}; pip install {' '.join(missing)}")
    check_place(run, cluster)
    limit = minutes(cluster.time)
    short = cluster.time if limit is not None and limit <= _JOB_MINUTES else str(_JOB_MINUTES)
    asked = replace(cluster, name="doctor", time=short, save_s=min(cluster.save_s, 30))
    folder = JobFolder.of(run)
    request = request_for(Stage(run, [Piece(run, ["doctor"], {})]), [folder], asked, [], 0, Path.cwd())
    slurm.test(script(request))
    _make_folder(run)
    checkup = Checkup(
        folder=str(folder.path),
        srun=[*srun_command(asked, folder), "--label"],
        task=[*rank_command(asked, folder)[:-1], _MODULE],
        options=_shard_options(shards),
        world_size=asked.nodes * asked.tasks_per_node,
        interface=asked.network.interface,
        meeting_timeout_s=_meeting_s(asked),
    )
    job_id = _submit(request, checkup)
    watched = _Watched(job_id, folder)
    try:
        ended = _wait(watched.over, watched.told, deadline)
    finally:
        if not watched.over():
            with suppress(InputError):  # over by now
                slurm.cancel(job_id)
    if ended:
        _wait(lambda: watched.ended is not None, lambda: "waiting for the results", time.monotonic() + _SETTLE_S)
    return job_id, _collect(folder, watched.results, asked, watched.nodes, watched.judged(ended), shards)


def _submit(request: Request, checkup: Checkup) -> str:
    [job_id] = submit(replace(request, requeue=False), [checkup])
    return job_id


class _Watched:
    """A submitted job, by what SLURM says and by what it writes."""

    def __init__(self, job_id: str, folder: JobFolder) -> None:
        self._job_id, self._folder = job_id, folder
        self._submitted, self._asked = time.time(), 0.0
        self._known: slurm.Known | None = slurm.Known("PENDING")
        self._complaint = ""

    @property
    def results(self) -> Path:
        """Of the newest start of the job."""
        starts = sorted(self._folder.path.glob("checkup-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return starts[-1] if starts else self._folder.path / "checkup-0"

    @property
    def began(self) -> dict[str, Any] | None:
        return read_json(self.results / "began.json")

    @property
    def ended(self) -> dict[str, Any] | None:
        return read_json(self.results / "ended.json")

    @property
    def nodes(self) -> list[str]:
        """In the order of their ranks; empty where no rank was started."""
        refused = self.ended is not None and self.ended["error"]
        nodes: list[str] = [] if self.began is None or refused else self.began["nodes"]
        return nodes

    def over(self) -> bool:
        if self.ended is not None:
            return True
        if time.monotonic() - self._asked > _ASK_S:
            self._asked = time.monotonic()
            try:
                self._known, self._complaint = slurm.known([self._job_id]).get(self._job_id), ""
            except InputError as error:  # slurmctld restarts
                self._complaint = str(error)
        return self._known is None or self._known.state in slurm.OVER

    def told(self) -> str:
        if self._complaint or self._known is None:
            return f"job {self._job_id}: {self._complaint or 'SLURM has forgotten it'}"
        if self.began is None:
            reason = f", {self._known.reason}" if self._known.reason else ""
            return f"job {self._job_id}: {self._known.state.lower()}{reason}"
        return f"job {self._job_id}: {_told(self.results, len(self.began['nodes']))}"

    def judged(self, in_time: bool) -> Check:
        """How the job itself went."""
        began, ended = self.began, self.ended
        lasted = duration(time.time() - self._submitted)
        if ended is not None and began is not None and ended["error"]:
            return Check("job", "fail", one_line(ended["error"]), "mend network.interface in CLUSTER.yaml")
        if ended is not None and began is not None:
            queued, ran = (max(0.0, one) for one in (began["time"] - self._submitted, ended["time"] - began["time"]))
            nodes = f"{_some(began['nodes'])}, {duration(ran)} after {duration(queued)} in the queue"
            return Check("job", "pass", f"job {self._job_id} on {nodes}")
        if not in_time:
            where = f"not done after {lasted}, cancelled: {self.told()}"
            return Check("job", "fail", where, _GIVE_TIME if began is None else _SEE_TASKS)
        state = "GONE" if self._known is None else self._known.state
        said = _last_line(sorted(self._folder.submitit.glob("*_log.out")))
        advice = "check python, modules and setup in CLUSTER.yaml, and that the nodes see the folder"
        return Check("job", "fail", f"job {self._job_id} ended {state}" + (f": {said}" if said else ""), advice)


_SEE_TASKS = "see the tasks below"
_GIVE_TIME = "try again with a longer --timeout-s, or ask for less: fewer nodes, another partition"


def _meeting_s(cluster: ClusterConfig) -> float:
    return min(cluster.network.timeout_s, _MEETING_S)


def _meeting_environment(nodes: list[str], interface: str, timeout_s: float) -> dict[str, str]:
    address, port = meeting_point(interface, alone=len(nodes) == 1)
    env = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "ECGSCALE_NODES": ",".join(nodes)}
    return env | {MEETING_TIMEOUT_S: f"{timeout_s:g}"}


def _shard_options(shards: Iterable[str]) -> list[str]:
    return [f"--shards={place}" for place in shards]


def _wait(over: Callable[[], bool], told: Callable[[], str], deadline: float) -> bool:
    """Whether it is over before the deadline; what it is at appears on stderr whenever that changes."""
    shown, said_at, rewritten = "", 0.0, sys.stderr.isatty()
    try:
        while not over():
            now = time.monotonic()
            if now > deadline:
                return False
            if now - said_at > _SAY_S:  # it reads a file of each task
                said_at, line = now, one_line(told())
                if line != shown:
                    print(
                        *("\r\x1b[K", line) if rewritten else (line, "\n"), sep="", end="", file=sys.stderr, flush=True
                    )
                shown = line
            time.sleep(_LOOK_S)
        return True
    finally:
        if rewritten and shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _told(results: Path, nodes: int) -> str:
    """What the tasks are at."""
    doing = Counter(f"at {report.doing}" if report.doing else "done" for report in _reports(results))
    where = f" on {nodes} node{'s' if nodes > 1 else ''}" if nodes else ""
    return f"running{where}: {', '.join(f'{count} {what}' for what, count in doing.most_common()) or 'starting'}"


def _reports(results: Path) -> list[Report]:
    found = [about for path in results.glob("rank-*.json") if (about := read_json(path)) is not None]
    return sorted((Report(**about) for about in found), key=lambda report: report.rank)


def _collect(
    folder: JobFolder, results: Path, cluster: ClusterConfig, nodes: list[str], job: Check, shards: list[str]
) -> Found:
    reports = _reports(results)
    done = {report.rank for report in reports if not report.doing}
    silent = set(range(cluster.nodes * cluster.tasks_per_node)) - done
    words = {rank: said for rank in silent if (said := _last_words(results, rank, _node_of(rank, nodes, cluster)))}
    own_python = cluster.container.kind == "none" and not cluster.python
    here = versions() if own_python else {}
    return Found(cluster, nodes, reports, job, str(folder.code), here, words, shards)


def _node_of(rank: int, nodes: list[str], cluster: ClusterConfig) -> str:
    at = rank // cluster.tasks_per_node
    return nodes[at] if at < len(nodes) else "?"


def _last_words(results: Path, rank: int, node: str) -> str:
    """What a task said last, or else what srun says of it."""
    if (log := results / f"rank-{rank}.log").exists():
        return _last_line([log])
    log = results / "srun.log"
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    labelled = re.compile(rf"\s*0*{rank}: (?P<said>.*\S)")
    own = [match["said"] for line in said if (match := labelled.match(line))]
    of_srun = [line for line in said if re.match(r"(srun|slurmstepd|slurmd)\S*: error", line)]
    of_node = [line for line in of_srun if re.search(rf"\b{re.escape(node)}\b", line)]
    of_all = [line for line in of_srun if ": task" not in line]
    return one_line("; ".join([*own[-1:], *(of_node or of_all)[-1:]]))


def _last_line(logs: Sequence[Path]) -> str:
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(said[-1]) if said else ""


# -- judging ---------------------------------------------------------------------------------------------------------

Verdict = tuple[Result, str, str]  # what was measured, and what to do


def judge(found: Found) -> list[Check]:
    """The table, in the order in which things are worth mending."""
    if not found.nodes:
        return [found.job]
    checks = [found.job, Check("tasks", *_tasks(found))]
    if not found.reports:
        return checks
    why_not = "one task" if found.cluster.nodes * found.cluster.tasks_per_node == 1 else "not measured"
    for measurement, (parts, advice) in _PARTS.items():
        broken: dict[str, str] = {}
        for report in found.reports:
            if measurement in report.failed:
                broken.setdefault(report.node, f"rank {report.rank}: {report.failed[measurement]}")
        if broken:
            checks.append(Check(next(iter(parts)), "fail", _on(broken), advice))
        elif any(found.of(measurement)):
            checks += [Check(name, *judged(found)) for name, judged in parts.items()]
        elif measurement != "shards" or found.shards:
            checks += [Check(name, "skip", why_not) for name in parts]
    return checks


def _tasks(found: Found) -> Verdict:
    there = {report.rank: report for report in found.reports}
    silent, stuck = dict[str, str](), dict[str, str]()
    expected = found.cluster.nodes * found.cluster.tasks_per_node
    for rank in range(expected):
        words = f": {found.last_words[rank]}" if found.last_words.get(rank) else ""
        if rank not in there:
            silent.setdefault(_node_of(rank, found.nodes, found.cluster), f"rank {rank} never answered{words}")
        elif doing := there[rank].doing:
            stuck.setdefault(there[rank].node, f"rank {rank} ended or hung in {doing}{words}")
    if silent or stuck:  # who is stuck may have waited for who is silent
        advice = f"look at these nodes, or leave them out: --exclude {','.join(silent or stuck)}"
        return "fail", "; ".join(_on(one) for one in (silent, stuck) if one), advice
    return "pass", f"all {expected} answered, from {_some(found.nodes)}", ""


def _versions(found: Found) -> Verdict:
    of_node: dict[str, dict[str, str]] = found.per_node("software", "versions")
    odd = []
    for package in sorted({package for known in of_node.values() for package in known}):
        if said := _differing({node: known.get(package, "none") for node, known in of_node.items()}):
            odd.append(f"{package} {said}")
    if odd:
        return "fail", "; ".join(odd), "install the same versions on all nodes, or give one shared python"
    known = next(iter(of_node.values()))
    away = [package for package, version in found.here.items() if known.get(package) != version]
    if away:
        said = "; ".join(
            f"{package} {known.get(package, 'none')} there, {found.here[package]} here" for package in away
        )
        return "warn", said, "the nodes find other packages than this machine: check modules and python"
    return "pass", ", ".join(f"{package} {version}" for package, version in known.items()), ""


def _code(found: Found) -> Verdict:
    codes = found.per_node("software", "code")
    elsewhere = {node: code for node, code in codes.items() if os.path.realpath(code) != os.path.realpath(found.code)}
    if elsewhere:
        advice = "something sets PYTHONPATH after the job's own: look at setup, modules and the container"
        return "fail", f"not the snapshot: {_on(elsewhere)}", advice
    return "pass", "all run the snapshot of this code", ""


def _cpus(found: Found) -> Verdict:
    asked, cpus = found.cluster.cpus_per_task, found.per_node("machine", "cpus")
    if few := {node: f"{count} of {asked} asked" for node, count in cpus.items() if count < asked}:
        return "warn", _on(few), "tasks share cores: check the cluster's task binding, or ask for fewer cpus_per_task"
    return "pass", f"{_range(cpus.values())} per task" + (f", {asked} asked" if asked else ""), ""


def _memory(found: Found) -> Verdict:
    limit, free = found.per_node("machine", "memory"), found.per_node("machine", "memory_available")
    of_task = {node: min(limit[node], free[node]) / found.cluster.tasks_per_node for node in limit}
    if low := {node: f"{part / 1e9:.1f} GB per task" for node, part in of_task.items() if part < MEMORY_WARN_BYTES}:
        return "warn", _on(low), "give more mem, or fewer tasks_per_node"
    return "pass", f"{_range(limit.values(), 1e9)} GB per node, {_range(free.values(), 1e9)} free", ""


def _limits(found: Found) -> Verdict:
    files, locked = found.per_node("machine", "open_files"), found.per_node("machine", "locked_memory")
    shown = {node: "any number of open files" if most is None else f"{most} open files" for node, most in files.items()}
    if few := {node: shown[node] for node, most in files.items() if most is not None and most < OPEN_FILES_WARN}:
        return "warn", _on(few), f"raise `ulimit -n` on the nodes to {OPEN_FILES_WARN} or more"
    low = {node: f"{most / 2**20:.0f} MiB lockable" for node, most in locked.items() if most is not None}
    if low and found.cluster.gpus_per_node and found.cluster.nodes > 1:
        return "warn", _on(low), "set `ulimit -l unlimited` on the nodes: InfiniBand needs it"
    return "pass", _differing(shown) or next(iter(shown.values())), ""


def _environment(found: Found) -> Verdict:
    of_node = {}
    for node, variables in found.per_node("machine", "environment").items():
        of_node[node] = ", ".join(f"{name}={value}" for name, value in variables.items()) or "no NCCL_*, no GLOO_*"
    if odd := _differing(of_node):
        return "warn", odd, "give them in CLUSTER.yaml's environment, the same for all nodes"
    return "pass", next(iter(of_node.values())), ""


def _gpus(found: Found) -> Verdict:
    asked, names = found.cluster.gpus_per_node, found.per_node("gpus", "names")
    if not asked and not any(names.values()):
        return "skip", "gpus_per_node is 0 and none is visible", ""
    if few := {node: f"{len(there)} of {asked} GPUs" for node, there in names.items() if len(there) < asked}:
        return "fail", _on(few), "check the driver (nvidia-smi) and SLURM's gres there, or --exclude the node"
    if wrong := {node: "multiplies wrong" for node, about in found.of("gpus") if about["right"] is False}:
        return "fail", _on(wrong), "have the GPU looked at, and --exclude the node until then"
    shares = [(node, about["free"] / about["total"]) for node, about in found.of("gpus") if about["total"]]
    if held := {node: f"{share:.0%} of a GPU's memory free" for node, share in shares if share < GPU_FREE_WARN}:
        return "warn", _on(held), "somebody else computes there (nvidia-smi)"
    kinds = {}
    for node, there in names.items():
        kinds[node] = ", ".join(f"{count} x {name}" for name, count in Counter(there).items()) or "none"
    if (odd := _differing(kinds)) or any(len(set(there)) > 1 for there in names.values()):
        return "warn", odd or _on(kinds), "the slowest sets the pace: choose one kind by constraint"
    return "pass", f"{next(iter(kinds.values()))} per node, all multiply right", ""


def _meeting(found: Found) -> Verdict:
    _, slowest = max(found.of("meeting"), key=lambda one: one[1]["seconds"])
    measured = f"{slowest['seconds']:.1f} s at {slowest['address']}, {slowest['backend']}"
    if slowest["seconds"] > MEETING_WARN_S:
        return "warn", measured, "some nodes start late: look for slow imports (python on a slow file system)"
    return "pass", measured, ""


def _shared_folder(found: Found) -> Verdict:
    blind = {}
    for report in found.reports:
        unseen = report.found.get("shared_folder", {}).get("unseen", [])
        if unseen and report.rank:
            blind[report.node] = "does not see rank 0's file"
        for rank in unseen if report.rank == 0 else []:
            blind.setdefault(_node_of(rank, found.nodes, found.cluster), "rank 0 does not see its file")
    if blind:
        return "fail", _on(blind), "give --folder (and run.dir) on a file system that all nodes share"
    slowest = max(about["seconds"] for _, about in found.of("shared_folder"))
    return "pass", f"all see each other's files, after {slowest:.1f} s", ""


def _write_speed(found: Found) -> Verdict:
    return _speed(found, "write_mb_per_s", WRITE_WARN_MB_PER_S, "checkpoints take long: use a faster file system")


def _read_speed(found: Found) -> Verdict:
    return _speed(found, "read_mb_per_s", READ_WARN_MB_PER_S, "restarts take long: use a faster file system")


def _speed(found: Found, key: str, least: float, advice: str) -> Verdict:
    speeds = found.per_node("disk", key)
    if slow := {node: f"{speed:.0f} MB/s" for node, speed in speeds.items() if speed < least}:
        return "warn", f"{_on(slow)} (all nodes at once)", advice
    return "pass", f"{_range(speeds.values())} MB/s per node, all at once", ""


def _disk_space(found: Found) -> Verdict:
    free = min(found.per_node("disk", "free").values())
    measured = f"{free / 1e9:.1f} GB free"
    if free < FREE_WARN_BYTES:
        advice = "make room: a checkpoint takes 12 bytes per parameter"
        return "fail" if free < FREE_FAIL_BYTES else "warn", measured, advice
    return "pass", measured, ""


def _shards(found: Found) -> Verdict:
    absent, slow, speeds = dict[str, str](), dict[str, str](), list[str]()
    for place in found.shards:
        of_node = {node: one for node, about in found.of("shards") for one in about["sets"] if one["place"] == place}
        absent |= {node: one["error"] for node, one in of_node.items() if "error" in one}
        read = {node: one for node, one in of_node.items() if one.get("read")}
        for node, one in read.items():
            if one["records_per_s"] < SHARD_WARN_RECORDS_PER_S:
                slow[node] = f"{one['records_per_s']:.0f} records/s of {place}"
        if read:
            rates, bytes_ = (_range([one[key] for one in read.values()]) for key in ("records_per_s", "mb_per_s"))
            speeds.append(f"{Path(place).name}: {rates} records/s, {bytes_} MB/s per node")
    if absent:
        return "fail", _on(absent), "copy the data set to where all nodes see it, or mount it there"
    if slow:
        return "warn", _on(slow), "training may wait for data: use a faster or a local disk"
    return "pass", "; ".join(speeds) or "no records", ""


def _clocks(found: Found) -> Verdict:
    clocks = dict(found.of("clocks"))
    sure = {node: abs(one["ahead_s"]) - one["plus_minus_s"] for node, one in clocks.items()}
    if off := {node: f"{clocks[node]['ahead_s']:+.1f} s" for node, by in sure.items() if by > SKEW_WARN_S}:
        return "warn", f"{_on(off)} from {found.nodes[0]}", "let chrony or ntpd run on these nodes"
    most, unsure = (1000 * max(abs(one[key]) for one in clocks.values()) for key in ("ahead_s", "plus_minus_s"))
    return "pass", f"within {most:.2f} ms (± {unsure:.2f})", ""


def _all_reduce(found: Found) -> Verdict:
    if wrong := {node: "wrong sums" for node, about in found.of("all_reduce") if not about["right"]}:
        return "fail", _on(wrong), "a network card or GPU corrupts data: --exclude nodes in turn to find it"
    backend = next((about["backend"] for _, about in found.of("meeting")), "gloo")
    sizes = zip(*(about["sizes"] for _, about in found.of("all_reduce")), strict=True)
    slowest = [min(of_size, key=lambda one: float(one["gb_per_s"])) for of_size in sizes]
    shown = ", ".join(f"{one['gb_per_s']:.2g} GB/s at {one['mb']} MB" for one in slowest)
    measured = f"{shown} ({backend}), sums right"
    if slowest[-1]["gb_per_s"] < (NETWORK_WARN_GPU_GB_PER_S if backend == "nccl" else NETWORK_WARN_CPU_GB_PER_S):
        return "warn", measured, "set network.interface to the fast network (ip link, ibstat)"
    return "pass", measured, ""


Judge = Callable[[Found], Verdict]
# Measurement: the lines that are made of it, and what to do where it could not be taken.
_PARTS: dict[str, tuple[dict[str, Judge], str]] = {
    "software": ({"versions": _versions, "code": _code}, "mend the installation there"),
    "machine": (
        {"cpus": _cpus, "memory": _memory, "limits": _limits, "environment": _environment},
        "mend the installation there",
    ),
    "gpus": ({"gpus": _gpus}, "check the driver there (nvidia-smi) and PyTorch's CUDA version"),
    "meeting": (
        {"meeting": _meeting},
        "see the tasks above; if all answered, give network.interface, by which all reach the first node",
    ),
    "shared_folder": ({"shared_folder": _shared_folder}, "give --folder on a file system that all nodes share"),
    "disk": (
        {"write_speed": _write_speed, "read_speed": _read_speed, "disk_space": _disk_space},
        "check permissions, quota and room of the folder's file system",
    ),
    "shards": ({"shards": _shards}, "check the data set's permissions and file system there"),
    "clocks": ({"clocks": _clocks}, "the node was lost after the start: look at its network"),
    "all_reduce": (
        {"all_reduce": _all_reduce},
        "give network.interface; NCCL_DEBUG=INFO in environment tells what NCCL chose",
    ),
}


def _on(of_node: Mapping[str, str], shown: int = 4) -> str:
    """``n2: what``, nodes of the same together, the first few of many."""
    nodes_of: dict[str, list[str]] = {}
    for node, what in of_node.items():
        nodes_of.setdefault(what, []).append(node)
    said = [f"{_some(nodes)}: {what}" for what, nodes in nodes_of.items()]
    return "; ".join(said[:shown]) + (f"; and {len(said) - shown} more" if len(said) > shown else "")


def _differing(of_node: Mapping[str, str]) -> str:
    """Who has what, the odd ones first; empty where all have the same."""
    count = Counter(of_node.values())
    if len(count) < 2:
        return ""
    return _on(dict(sorted(of_node.items(), key=lambda one: (count[one[1]], one[1]))))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _range(values: Iterable[float], unit: float = 1.0) -> str:
    low, *_, high = sorted(value / unit for value in [*values] * 2)
    return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"


# -- showing ---------------------------------------------------------------------------------------------------------

_COLOURS = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}
_NARROWEST = 30  # characters for the text of a check, whatever the terminal


def lines(checks: Sequence[Check], width: int | None, coloured: bool) -> list[str]:
    """The table for people: one line per check, and below it what to do."""
    name_width = max(len(check.name) for check in checks)
    margin = " " * (name_width + 8)
    shown = []
    for check in checks:
        word = "FAIL" if check.result == "fail" else check.result
        code = _COLOURS[check.result]
        marked = f"\x1b[{code}m{word}\x1b[0m" if coloured else word
        texts = [check.measured] + ([f"-> {check.advice}"] if check.advice and check.result != "pass" else [])
        text_lines = []
        for text in map(one_line, texts):
            room = None if width is None else max(_NARROWEST, width - len(margin))
            text_lines += [text] if room is None else textwrap.wrap(text, room) or [""]
        shown.append(f"{check.name:<{name_width}}  {marked}  {text_lines[0]}")
        shown += [margin + line for line in text_lines[1:]]
    failed, warned = (sum(check.result == result for check in checks) for result in ("fail", "warn"))
    return [*shown, f"{failed} failed, {warned} to look at, of {len(checks)} checks"]
