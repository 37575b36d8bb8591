"""Long trials of the launcher on a real SLURM of this machine: `make endurance`, about an hour and a half.

- matrix: 2 and 4 nodes, 1 and 2 tasks per node, ZeRO 1 to 3, each against the same job on this machine without SLURM;
- preemptions: 20 at random moments of one run, by every way there is, some twice in a row;
- kills: a random rank killed every three minutes with a checkpoint every 30 s, mended by starting again in the
  allocation and by requeueing; the share of time spent on steps that count.

Writes a table in markdown to OUT/endurance.md as it goes, and ends with 1 where something was not as it must be.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.files import read_json_if_there
from ecgscale.simulate import Simulation
from ecgscale_launch import devcluster, slurm
from ecgscale_launch.job_folder import JobFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_jobs import events, losses, recordings

TOLERANCE = 2e-5  # of losses between world sizes
SMALL = [
    "--model.preset=tiny", "--model.dropout=0", "--model.attention_dropout=0", "--model.feature_dropout=0",
    "--objective.codes=64", "--objective.code_width=64", "--objective.negatives=50", "--engine.learning_rate=2e-3",
    "--engine.clip_norm=1", "--engine.whole_below=0", "--train.log_every=1", "--train.log_recordings=true",
    "--train.keep_last=2",
]  # fmt: skip


class Trials:
    """A cluster, a data set, and what came out so far."""

    def __init__(self, out: Path) -> None:
        self.out, self.shards, self.failed = out, out / "shards", False
        out.mkdir(parents=True, exist_ok=True)
        if not (self.shards / "manifest.json").exists():
            ingest(Simulation(patients=400), self.shards, IngestOptions(records_per_shard=64))
        self.table = out / "endurance.md"
        versions = f"torch {torch.__version__}, SLURM {slurm.run('sinfo', '--version').split()[-1]}"
        date, cores = time.strftime("%Y-%m-%d"), os.cpu_count()
        self.table.write_text(f"{date}, {cores} cores, Python {platform.python_version()}, {versions}\n\n")

    def say(self, line: str) -> None:
        print(line, flush=True)
        with self.table.open("a") as table:
            table.write(line + "\n")

    def check(self, holds: bool, what: str) -> None:
        self.failed |= not holds
        self.say(f"- {'ok' if holds else 'FAILED'}: {what}")

    def command(self, run: Path, *more: str) -> list[str]:
        shutil.rmtree(run, ignore_errors=True)
        return ["pretrain", *SMALL, *more, f"--data.shards={self.shards}", f"--run.dir={run}"]

    def here(self, run: Path, processes: int, *more: str) -> Path:
        """A run on this machine, undisturbed."""
        launch("--local", processes, "--", *self.command(run, *more))
        return run

    def submitted(self, run: Path, cluster: dict[str, int | str], *more: str) -> JobFolder:
        options = [f"--{name}={value}" for name, value in cluster.items()]
        config = self.out / "cluster.yaml"
        config.write_text("{environment: {OMP_NUM_THREADS: '1'}, save_s: 60, hang_s: 300, time: 12:00:00}\n")
        launch(config, *options, "--", *self.command(run, *more))
        return JobFolder.of(run)


def launch(*arguments: object) -> None:
    command = [sys.executable, "-m", "ecgscale_launch.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def number(folder: JobFolder) -> str:
    return str((read_json_if_there(folder.submitted) or {})["job_id"])


def state(folder: JobFolder) -> dict:
    return read_json_if_there(folder.state) or {"phase": "queued", "attempts": []}


def until(condition: Callable[[], bool], limit_s: float = 1800) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited too long")
        time.sleep(0.2)


def until_over(folder: JobFolder) -> str:
    """Wait until SLURM is done with a job; its last state there."""
    until(lambda: slurm.state(number(folder)) in slurm.OVER, 4 * 3600)
    return slurm.state(number(folder)) or ""


def difference(one: Path, other: Path) -> float:
    """Greatest relative difference of the losses of two runs; infinite where they have other steps."""
    a, b = losses(one), losses(other)
    return max(abs(a[step] - b[step]) / abs(b[step]) for step in b) if a.keys() == b.keys() else float("inf")


def matrix(trials: Trials) -> None:
    trials.say(
        "\n## Nodes, tasks, ZeRO stages\n\n| nodes × tasks | ZeRO | greatest relative difference of 8 losses |\n"
        "|---|---|---|"
    )
    worst = 0.0
    more = ("--train.steps=8", "--train.global_batch=32", "--train.lanes=8")
    for stage in (1, 2, 3):
        here = trials.here(trials.out / f"here-{stage}", 2, *more, f"--engine.zero_stage={stage}")
        for nodes, tasks in ((2, 1), (2, 2), (4, 1), (4, 2)):
            run = trials.out / f"matrix-{stage}-{nodes}x{tasks}"
            shape = {"nodes": nodes, "tasks_per_node": tasks}
            folder = trials.submitted(run, shape, *more, f"--engine.zero_stage={stage}")
            ended = until_over(folder)
            off = difference(run, here) if ended == "COMPLETED" else float("inf")
            worst = max(worst, off)
            trials.say(f"| {nodes} × {tasks} | {stage} | {off:.1e} |")
    trials.say("")
    trials.check(worst <= TOLERANCE, f"equal to the same job on this machine: {worst:.1e} (limit {TOLERANCE:g})")


def preemptions(trials: Trials, times: int) -> None:
    """Each at a random moment after a start: while it imports, trains, validates or saves."""
    trials.say(f"\n## {times} preemptions of one run on two nodes\n")
    steps = 20 * times
    more = (
        f"--train.steps={steps}",
        "--train.global_batch=32",
        "--train.checkpoint_every=7",
        "--train.validate_every=5",
    )
    here = trials.out / "preempted-here"
    if not (here / "export").exists():
        trials.here(here, 2, *more)
    folder = trials.submitted(trials.out / "preempted", {"nodes": 2}, *more)
    job, chosen = number(folder), random.Random(0)
    ways = []
    for turn in range(times):
        before = starts(folder)
        until(lambda: slurm.state(job) in {"RUNNING", *slurm.OVER})
        if slurm.state(job) in slurm.OVER:
            trials.check(False, f"the run was over before preemption {turn + 1}")
            break
        # A tenth right after the start, before anything listens; others anywhere in 12 s, of which 4 s are start-up.
        time.sleep(chosen.uniform(0, 0.5) if turn % 10 == 9 else chosen.uniform(0, 12))
        way = ("warning", "requeue", "urgent job")[turn % 3]
        ways.append(way)
        if way == "warning":
            subprocess.run(["scancel", "--signal=USR2", "--batch", job], check=True)
        elif way == "requeue":
            slurm.run("scontrol", "requeue", job)
        else:
            slurm.run(
                "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
            )
        if turn % 5 == 4:  # twice in a row
            warn_again(job)
        until(lambda before=before: starts(folder) > before or slurm.state(job) in slurm.OVER, 300)
        if starts(folder) != before + 1:
            trials.check(False, f"preemption {turn + 1} ({way}): {starts(folder) - before} starts after it")
    ended = until_over(folder)
    torn = list((folder.run / "checkpoints").glob("*.partial"))
    read, wanted = set(recordings(folder.run)), set(recordings(here))
    trials.check(
        ended == "COMPLETED", f"the run ended {ended} after {starts(folder)} requeues for {len(ways)} preemptions"
    )
    trials.check(starts(folder) == len(ways), "exactly one requeue each")
    trials.check(not torn, "no torn checkpoint")
    off = difference(folder.run, here)
    trials.check(off == 0, f"losses of all {steps} steps equal those of the undisturbed run (difference {off:.1e})")
    trials.check(read == wanted, f"the same recording at each of {len(wanted)} positions")
    times_to_step(trials, folder)


def warn_again(job: str) -> None:
    """At once or not at all: left alone, scancel goes on until the job has started again, and warns that start."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--signal=USR2", "--batch", job], check=False, capture_output=True, timeout=1)


def starts(folder: JobFolder) -> int:
    """How often SLURM has started the job again."""
    return int(slurm.queued(number(folder)).get("Restarts", "0"))


def times_to_step(trials: Trials, folder: JobFolder) -> None:
    attempts = state(folder)["attempts"]
    first = spread([one["first_step"] - one["began"] for one in attempts if one["first_step"]])
    again = spread([b["first_step"] - a["ended"] for a, b in pairwise(attempts) if a["ended"] and b["first_step"]])
    trials.say(f"- from the start of the ranks to their first step: {first}")
    trials.say(f"- from the end of the ranks to the first step of the next attempt: {again}")


def spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    return f"median {statistics.median(seconds):.1f} s ({min(seconds):.1f} - {max(seconds):.1f}, {len(seconds)} times)"


def kills(trials: Trials, times: int, every_s: float, after_failure: str) -> None:
    """A random rank is killed every so often; how much of the time counted."""
    trials.say(f"\n## {times} SIGKILLs of a random rank, every {every_s:g} s, then {after_failure}\n")
    run = trials.out / f"killed-{after_failure}"
    more = ("--train.steps=1000000", "--train.global_batch=32", "--train.checkpoint_every=1000000")
    cluster = {"nodes": 2, "tasks_per_node": 1, "after_failure": after_failure}
    folder = trials.submitted(run, cluster, *more, "--train.checkpoint_every_s=30")
    until(lambda: any(one["first_step"] for one in state(folder)["attempts"]))
    began, chosen, lost = time.time(), random.Random(1), []
    for turn in range(times):
        time.sleep(max(0.0, began + (turn + 1) * every_s - time.time()))
        attempt = folder.latest_attempt()
        assert attempt is not None
        about = read_json_if_there(attempt / f"rank-{chosen.randrange(2)}.alive.json")
        before = events(run)[-1]["time"]
        os.kill(about["pid"], signal.SIGKILL)
        until(lambda turn=turn: len(state(folder)["attempts"]) == turn + 2)
        saved = max((line["time"] for line in events(run) if line["event"] == "saved"), default=began)
        lost.append(before - saved)
    time.sleep(max(0.0, began + (times + 1) * every_s - time.time()))
    ended = time.time()
    launch("cancel", run)
    until_over(folder)
    share = counted_s(run, began, ended) / (ended - began)
    trials.check(
        max(lost) <= 30 + 5, f"work lost by a kill: median {statistics.median(lost):.0f} s, most {max(lost):.0f} s"
    )
    limit = 0.8 if after_failure == "relaunch" else 0.0
    trials.check(share >= limit, f"share of the time spent on steps that count: {share:.3f} ({ended - began:.0f} s)")
    times_to_step(trials, folder)


def counted_s(run: Path, began: float, ended: float) -> float:
    """Seconds of the steps that no later attempt did again: each from the event before it in its own attempt."""
    spent: dict[int, float] = {}
    before: dict | None = None
    for line in events(run):
        if line["event"] == "step" and "train/loss" in line and began <= line["time"] <= ended:
            follows = before is not None and before.get("step", -1) in (line["step"] - 1, line["step"])
            spent[line["step"]] = line["time"] - before["time"] if follows and before["event"] != "stopped" else 0.0
        before = line
    return sum(spent.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/endurance"))
    parser.add_argument("--only", nargs="+", choices=("matrix", "preemptions", "kills", "requeues"), default=[])
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10, help="mended in the allocation (default 10)")
    parser.add_argument("--kills-requeued", type=int, default=4, help="mended by a requeue (default 4)")
    parser.add_argument("--kill-every-s", type=float, default=180.0)
    options = parser.parse_args()
    cluster = devcluster.up(devcluster.DEFAULT_FOLDER.with_name("ecgscale-endurance"), grace_s=60)
    os.environ.update(cluster.environment)
    try:
        trials = Trials(options.out.absolute())
        chosen = options.only or ("matrix", "preemptions", "kills", "requeues")
        if "matrix" in chosen:
            matrix(trials)
        if "preemptions" in chosen:
            preemptions(trials, options.preemptions)
        if "kills" in chosen:
            kills(trials, options.kills, options.kill_every_s, "relaunch")
        if "requeues" in chosen:
            kills(trials, options.kills_requeued, options.kill_every_s, "requeue")
    finally:
        devcluster.down(cluster.folder)
    return int(trials.failed)


if __name__ == "__main__":
    sys.exit(main())
