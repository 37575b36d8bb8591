"""What the tasks of a checkup have left behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ecgscale.errors import one_line
from ecgscale.files import read_json_if_there
from ecgscale_launch.checkup import Report
from ecgscale_launch.checkup_job import CheckupJob, results_of
from ecgscale_launch.diagnosis import Check, Found, node_of
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.job_record import versions


def collect(folder: JobFolder, job: CheckupJob, nodes: list[str], how_it_went: Check) -> Found:
    """All that is known of a checkup, to be judged."""
    cluster, results = job.cluster, results_of(folder)
    reports = reports_in(results)
    done = {report.rank for report in reports if not report.doing}
    silent = set(range(cluster.world_size)) - done
    words = {rank: last_words(results, rank, node_of(rank, nodes, cluster)) for rank in silent}
    own_python = cluster.container.kind == "none" and not cluster.python
    here = versions() if own_python else {}
    return Found(cluster, nodes, reports, how_it_went, str(folder.code), here, words, job.shards)


def doing_in(results: Path, nodes: int) -> str:
    """What the tasks are at."""
    doing = Counter(f"at {report.doing}" if report.doing else "done" for report in reports_in(results))
    where = f" on {nodes} node{'s' if nodes > 1 else ''}" if nodes else ""
    return f"running{where}: {', '.join(f'{count} {what}' for what, count in doing.most_common()) or 'starting'}"


def reports_in(results: Path) -> list[Report]:
    """The reports of the tasks that have written one, by rank."""
    trees = filter(None, map(read_json_if_there, results.glob("rank-*.json")))
    return sorted((Report(**tree) for tree in trees), key=lambda report: report.rank)


def last_words(results: Path, rank: int, node: str) -> str:
    """What a task said last, or else what srun says of it."""
    if (log := results / f"rank-{rank}.log").exists():
        return last_line([log])
    log = results / "srun.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    labelled = re.compile(rf"\s*0*{rank}: (?P<words>.*\S)")
    own = [match["words"] for line in lines if (match := labelled.match(line))]
    of_srun = [line for line in lines if re.match(r"(srun|slurmstepd|slurmd)\S*: error", line)]
    of_node = [line for line in of_srun if re.search(rf"\b{re.escape(node)}\b", line)]
    of_all = [line for line in of_srun if ": task" not in line]
    return one_line("; ".join([*own[-1:], *(of_node or of_all)[-1:]]))


def last_line(logs: Sequence[Path]) -> str:
    """The last line of logs that is not empty."""
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else ""
