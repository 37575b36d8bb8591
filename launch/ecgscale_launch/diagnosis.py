"""What the doctor says of what its tasks have found: a pure function, and the thresholds it goes by."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ecgscale_launch.checkup import Report
from ecgscale_launch.launch_config import LaunchConfig

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

    cluster: LaunchConfig
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


Verdict = tuple[Result, str, str]  # what was measured, and what to do


def judge(found: Found) -> list[Check]:
    """The table, in the order in which things are worth mending."""
    if not found.nodes:
        return [found.job]
    checks = [found.job, Check("tasks", *_tasks(found))]
    if not found.reports:
        return checks
    why_not = "one task" if found.cluster.world_size == 1 else "not measured"
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
    expected = found.cluster.world_size
    for rank in range(expected):
        words = f": {found.last_words[rank]}" if found.last_words.get(rank) else ""
        if rank not in there:
            silent.setdefault(node_of(rank, found.nodes, found.cluster), f"rank {rank} never answered{words}")
        elif doing := there[rank].doing:
            stuck.setdefault(there[rank].node, f"rank {rank} ended or hung in {doing}{words}")
    if silent or stuck:  # who is stuck may have waited for who is silent
        advice = f"look at these nodes, or leave them out: --exclude {','.join(silent or stuck)}"
        return "fail", "; ".join(_on(one) for one in (silent, stuck) if one), advice
    return "pass", f"all {expected} answered, from {some(found.nodes)}", ""


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
            blind.setdefault(node_of(rank, found.nodes, found.cluster), "rank 0 does not see its file")
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
    said = [f"{some(nodes)}: {what}" for what, nodes in nodes_of.items()]
    return "; ".join(said[:shown]) + (f"; and {len(said) - shown} more" if len(said) > shown else "")


def _differing(of_node: Mapping[str, str]) -> str:
    """Who has what, the odd ones first; empty where all have the same."""
    count = Counter(of_node.values())
    if len(count) < 2:
        return ""
    return _on(dict(sorted(of_node.items(), key=lambda one: (count[one[1]], one[1]))))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _range(values: Iterable[float], unit: float = 1.0) -> str:
    low, *_, high = sorted(value / unit for value in [*values] * 2)
    return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"


def node_of(rank: int, nodes: list[str], cluster: LaunchConfig) -> str:
    at = rank // cluster.tasks_per_node
    return nodes[at] if at < len(nodes) else "?"
