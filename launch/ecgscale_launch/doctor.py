"""`ecgscale-launch doctor`: a short job on the allocation that a cluster config describes, and what it tells.

The job is started as training is, with the same options, interpreter, container and meeting point, and runs
`ecgscale_launch.checkup` as every task. `judge` turns what the tasks have found into a table; it touches nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ecgscale.cli import OneLineParser
from ecgscale.errors import InputError, one_line
from ecgscale.files import write_json
from ecgscale_launch import slurm
from ecgscale_launch.checkup import Report
from ecgscale_launch.diagnosis import Check, Found, judge, node_of, some
from ecgscale_launch.folder import JobFolder, code_environment, read_json_if_there
from ecgscale_launch.job import Request, shown_id, submit, test
from ecgscale_launch.launching import Piece, Stage, rank_command, request_for, srun_command, with_processes
from ecgscale_launch.listing import duration, screen, short_path
from ecgscale_launch.local import LocalRanks
from ecgscale_launch.place import check_place
from ecgscale_launch.record import package_folders, refuse_shared, snapshot, versions
from ecgscale_launch.rendezvous import meeting_environment
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
    env |= meeting_environment([node], cluster.network.interface, _meeting_s(cluster))
    count = cluster.world_size
    tasks = LocalRanks(results, argv, env, count, shown=False)
    try:
        ended = _wait(tasks.ended, lambda: _told(results, 0), deadline)
    finally:
        tasks.kill()
    lasted = duration(time.monotonic() - began)
    if ended:
        job = Check("job", "pass", f"{count} process{'es' * (count > 1)} on {node}, {lasted}")
    else:
        job = Check("job", "fail", f"not done after {lasted}", _SEE_TASKS)
    return _collect(folder, results, cluster, [node], job, shards)


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
            env = meeting_environment(nodes, self.interface, self.meeting_timeout_s)
        except InputError as refusal:
            error = str(refusal)
        else:
            argv = [*self.srun, *self.task, str(results), *self.options]
            ranks = StepRanks(shown_id(os.environ), results, argv, env, self.world_size)
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
    request = request_for(Stage(run, [Piece(run, ["doctor"])]), asked)
    test(request, 1)
    _make_folder(run)
    checkup = Checkup(
        folder=str(folder.path),
        srun=[*srun_command(asked, folder), "--label"],
        task=rank_command(asked, folder, _MODULE),
        options=_shard_options(shards),
        world_size=asked.world_size,
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
        return read_json_if_there(self.results / "began.json")

    @property
    def ended(self) -> dict[str, Any] | None:
        return read_json_if_there(self.results / "ended.json")

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
            nodes = f"{some(began['nodes'])}, {duration(ran)} after {duration(queued)} in the queue"
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
    found = [about for path in results.glob("rank-*.json") if (about := read_json_if_there(path)) is not None]
    return sorted((Report(**about) for about in found), key=lambda report: report.rank)


def _collect(
    folder: JobFolder, results: Path, cluster: ClusterConfig, nodes: list[str], job: Check, shards: list[str]
) -> Found:
    reports = _reports(results)
    done = {report.rank for report in reports if not report.doing}
    silent = set(range(cluster.world_size)) - done
    words = {rank: said for rank in silent if (said := _last_words(results, rank, node_of(rank, nodes, cluster)))}
    own_python = cluster.container.kind == "none" and not cluster.python
    here = versions() if own_python else {}
    return Found(cluster, nodes, reports, job, str(folder.code), here, words, shards)


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
