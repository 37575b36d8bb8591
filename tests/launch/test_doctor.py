"""The preflight: what is judged of made-up results, and a real run here and on two nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.errors import InputError
from ecgscale.simulate import Simulation
from ecgscale_launch import checkup, doctor, measurements
from ecgscale_launch.checkup import Report
from ecgscale_launch.cli import subcommand
from ecgscale_launch.devcluster import DevCluster
from ecgscale_launch.diagnosis import Check, Found, judge
from ecgscale_launch.doctor_table import lines
from ecgscale_launch.findings import last_words
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.measurements import Task

NODES = ["n1", "n2", "n3"]
CODE = "/shared/run/launch/code"
DATA = "/data/ecg"


def healthy(rank: int) -> Report:
    """One of two tasks, with a GPU each, of one of three nodes."""
    node, first = NODES[rank // 2], rank % 2 == 0
    found: dict[str, dict[str, Any]] = {
        "software": {"executable": "python", "versions": {"python": "3.12.1", "torch": "2.13.0"}, "code": CODE},
        "machine": {
            "cpus": 16,
            "memory": 512e9,
            "memory_available": 500e9,
            "open_files": 1 << 20,
            "locked_memory": None,
            "environment": {"NCCL_SOCKET_IFNAME": "ib0"},
        },
        "gpus": {"names": ["H100", "H100"], "right": True, "free": 79e9, "total": 80e9},
        "meeting": {"seconds": 1.5, "address": "10.0.0.1", "backend": "nccl"},
        "shared_folder": {"seconds": 0.2, "unseen": []},
        "all_reduce": {"sizes": [{"mb": 1, "gb_per_s": 9.0}, {"mb": 64, "gb_per_s": 40.0}], "right": True},
    }
    if first:
        found["disk"] = {"write_mb_per_s": 900.0, "read_mb_per_s": 2000.0, "free": 5e12}
        about = {"place": DATA, "records": 1000, "read": 512, "open_s": 0.1, "records_per_s": 9e3, "mb_per_s": 400.0}
        found["shards"] = {"sets": [about]}
        found["clocks"] = {"ahead_s": 0.002 * rank, "plus_minus_s": 0.0005}
    return Report(rank, node, f"{node}.example.org", "", found)


def three_nodes() -> Found:
    cluster = LaunchConfig(nodes=3, tasks_per_node=2, gpus_per_node=2, cpus_per_task=8)
    reports = [healthy(rank) for rank in range(6)]
    job = Check("job", "pass", "job 7 on n1, n2, n3")
    return Found(cluster, NODES, reports, job, CODE, {"torch": "2.13.0"}, {}, [DATA])


def test_healthy() -> None:
    checks = judge(three_nodes())
    assert {check.result for check in checks} == {"pass"}
    assert all(check.measured and not check.advice for check in checks)
    assert [check.name for check in checks] == [
        "job", "tasks", "versions", "code", "cpus", "memory", "limits", "environment", "gpus", "meeting",
        "shared_folder", "write_speed", "read_speed", "disk_space", "shards", "clocks", "all_reduce",
    ]  # fmt: skip


def of_rank(rank: int, measurement: str, **values: Any) -> Callable[[Found], None]:
    def change(found: Found) -> None:
        found.reports[rank].found[measurement] |= values

    return change


def failing(rank: int, measurement: str) -> Callable[[Found], None]:
    def change(found: Found) -> None:
        del found.reports[rank].found[measurement]
        found.reports[rank].failed[measurement] = "OSError: boom"

    return change


def everywhere(measurement: str, **values: Any) -> Callable[[Found], None]:
    def change(found: Found) -> None:
        for _, about in found.of(measurement):
            about |= values

    return change


@pytest.mark.parametrize(
    ("change", "name", "result", "measured"),
    [
        (of_rank(2, "software", versions={"python": "3.12.1", "torch": "2.9"}), "versions", "fail", "torch n2: 2.9"),
        (of_rank(2, "software", versions={"python": "3.12.1"}), "versions", "fail", "torch n2: none; n1, n3: 2.13.0"),
        (everywhere("software", versions={"torch": "2.9.1"}), "versions", "warn", "2.9.1 there, 2.13.0 here"),
        (of_rank(4, "software", code="/home/me/ecgscale"), "code", "fail", "n3: /home/me/ecgscale"),
        (of_rank(0, "machine", cpus=1), "cpus", "warn", "n1: 1 of 8 asked"),
        (of_rank(2, "machine", memory_available=1e9), "memory", "warn", "n2: 0.5 GB per task"),
        (of_rank(2, "machine", open_files=1024), "limits", "warn", "n2: 1024 open files"),
        (of_rank(2, "machine", locked_memory=65536), "limits", "warn", "n2: 0 MiB lockable"),
        (of_rank(4, "machine", environment={}), "environment", "warn", "n3: no NCCL_"),
        (of_rank(2, "gpus", names=["H100"]), "gpus", "fail", "n2: 1 of 2 GPUs"),
        (of_rank(2, "gpus", names=[]), "gpus", "fail", "n2: 0 of 2 GPUs"),
        (of_rank(3, "gpus", right=False), "gpus", "fail", "n2: multiplies wrong"),
        (of_rank(3, "gpus", free=40e9), "gpus", "warn", "n2: 50% of a GPU's memory free"),
        (of_rank(4, "gpus", names=["A100", "A100"]), "gpus", "warn", "n3: 2 x A100; n1, n2: 2 x H100"),
        (everywhere("gpus", names=["H100", "A100"]), "gpus", "warn", "1 x H100, 1 x A100"),
        (of_rank(5, "meeting", seconds=99.0), "meeting", "warn", "99.0 s"),
        (failing(0, "meeting"), "meeting", "fail", "n1: rank 0: OSError: boom"),
        (of_rank(0, "shared_folder", unseen=[4, 5]), "shared_folder", "fail", "n3: rank 0 does not see its file"),
        (of_rank(2, "shared_folder", unseen=[0]), "shared_folder", "fail", "n2: does not see rank 0's file"),
        (of_rank(4, "disk", write_mb_per_s=30.0), "write_speed", "warn", "n3: 30 MB/s"),
        (of_rank(4, "disk", read_mb_per_s=30.0), "read_speed", "warn", "n3: 30 MB/s"),
        (everywhere("disk", free=5e9), "disk_space", "warn", "5.0 GB free"),
        (everywhere("disk", free=1e8), "disk_space", "fail", "0.1 GB free"),
        (failing(2, "disk"), "write_speed", "fail", "n2: rank 2: OSError: boom"),
        (
            of_rank(2, "shards", sets=[{"place": DATA, "error": f"{DATA}/manifest.json: no such file"}]),
            "shards", "fail", f"n2: {DATA}/manifest.json: no such file",
        ),
        (
            of_rank(2, "shards", sets=[{"place": DATA, "read": 9, "records_per_s": 20.0, "mb_per_s": 1.0}]),
            "shards", "warn", "n2: 20 records/s",
        ),
        (of_rank(4, "clocks", ahead_s=-7.25), "clocks", "warn", "n3: -7.2 s from n1"),
        (of_rank(3, "all_reduce", right=False), "all_reduce", "fail", "n2: wrong sums"),
        (
            of_rank(3, "all_reduce", sizes=[{"mb": 1, "gb_per_s": 0.1}, {"mb": 64, "gb_per_s": 0.11}]),
            "all_reduce", "warn", "0.1 GB/s at 1 MB, 0.11 GB/s at 64 MB",
        ),
    ],
)  # fmt: skip
def test_one_thing_wrong(change: Callable[[Found], None], name: str, result: str, measured: str) -> None:
    found = three_nodes()
    change(found)
    checks = {check.name: check for check in judge(found)}
    assert checks[name].result == result
    assert measured in checks[name].measured
    assert checks[name].advice
    assert {check.result for check in checks.values() if check.name != name} == {"pass"}


def test_clock_that_only_seems_off_passes() -> None:
    found = three_nodes()
    of_rank(4, "clocks", ahead_s=1.2, plus_minus_s=0.5)(found)
    assert {check.result for check in judge(found)} == {"pass"}


def test_silent_node_and_those_who_waited_for_it() -> None:
    found = three_nodes()
    reports = [replace(report, doing="meeting") for report in found.reports[:2]] + found.reports[4:]
    checks = {check.name: check for check in judge(replace(found, reports=reports, last_words={2: "Killed"}))}
    said = checks["tasks"]
    assert said.result == "fail"
    assert said.measured == "n2: rank 2 never answered: Killed; n1: rank 0 ended or hung in meeting"
    assert said.advice.endswith("--exclude n2")


def test_job_that_never_began() -> None:
    job = Check("job", "fail", "job 7: pending, Resources")
    assert judge(replace(three_nodes(), nodes=[], reports=[], job=job)) == [job]
    assert [check.name for check in judge(replace(three_nodes(), reports=[], job=job))] == ["job", "tasks"]


def test_no_gpus_asked_for_are_skipped_with_a_line_that_says_so() -> None:
    found = three_nodes()
    everywhere("gpus", names=[], right=None, free=None, total=None)(found)
    [gpus] = [
        one for one in judge(replace(found, cluster=LaunchConfig(nodes=3, tasks_per_node=2))) if one.name == "gpus"
    ]
    assert gpus.result == "skip"
    assert "gpus_per_node is 0" in gpus.measured


def test_lines_keep_to_the_terminal_and_hold_no_control_characters() -> None:
    checks = [Check("job", "pass", "fine"), Check("shards", "fail", "no \x1b[2J data " * 9, "copy them " * 9)]
    plain = lines(checks, 60, coloured=False)
    assert all(len(line) <= 60 for line in plain)
    assert not any("\x1b" in line for line in plain)
    assert plain[0] == "job     pass  fine"
    assert plain[1].startswith("shards  FAIL  no ")
    assert plain[-1] == "1 failed, 0 to look at, of 2 checks"
    assert "\x1b[32mpass\x1b[0m" in lines(checks, None, coloured=True)[0]


def test_failing_check_is_written_down_and_the_next_one_done(tmp_path: Path) -> None:
    def broken(_: Task) -> dict[str, Any]:
        raise RuntimeError("two\nlines")

    def whole(_: Task) -> dict[str, Any]:
        return {"seconds": 1.0}

    task, report = Task(tmp_path, [], 3, 1, 4, 2), Report(3, "n2", "host")
    checkup._do(broken, task, report)
    checkup._do(whole, task, report)
    assert json.loads((tmp_path / "rank-3.json").read_text())["doing"] == "whole"
    assert report.failed == {"broken": "RuntimeError: two lines"}
    assert report.found == {"whole": {"seconds": 1.0}}


def test_folder_that_another_rank_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_VISIBLE_S", 0.2)
    store, folders = HashStore(), [tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    for folder in folders[:2]:
        folder.mkdir()
    tasks = [Task(folder, [], rank, 0, 3, 1, store) for rank, folder in enumerate(folders)]
    with ThreadPoolExecutor(3) as pool:
        unseen = [about["unseen"] for about in pool.map(measurements.shared_folder, tasks)]
    assert unseen == [[1, 2], [0], [0]]


def test_last_words_of_a_task(tmp_path: Path) -> None:
    log = ["0: fine", "1: ImportError: libcuda", "srun: error: n2: task 1: Exited with exit code 1"]
    (tmp_path / "srun.log").write_text("\n".join(log))
    said = "ImportError: libcuda; srun: error: n2: task 1: Exited with exit code 1"
    assert last_words(tmp_path, 1, "n2") == said
    assert last_words(tmp_path, 0, "n1") == "fine"
    assert last_words(tmp_path, 2, "n3") == ""


# -- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "set"
    ingest(Simulation(patients=6, rate_hz=100), folder, IngestOptions(rate_hz=100))
    return folder


def test_two_processes_here(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, absent = tmp_path / "checked", tmp_path / "absent"
    options = ["--folder", str(folder), "--shards", str(data), str(absent), "--environment.GLOO_LOGLEVEL", "ERROR"]
    assert subcommand("doctor", ["--local", "2", *options, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in told["checks"]}
    assert [name for name, check in checks.items() if check["result"] == "fail"] == ["shards"]
    assert f"{absent}/manifest.json" in checks["shards"]["measured"]
    assert checks["gpus"]["result"] == "skip"
    assert checks["environment"]["measured"] == "GLOO_LOGLEVEL=ERROR"
    assert not told["ok"]
    assert [task["rank"] for task in told["tasks"]] == [0, 1]
    assert [task["doing"] for task in told["tasks"]] == ["", ""]
    assert told["tasks"][0]["found"]["shards"]["sets"][0]["read"] > 0
    assert folder.stat().st_mode & 0o777 == (folder / "launch").stat().st_mode & 0o777 == 0o700
    with pytest.raises(InputError, match="is there already"):
        subcommand("doctor", ["--local", "2", "--folder", str(folder)])


@pytest.fixture
def on_cluster(devcluster: DevCluster, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster config, in a folder of its own that all nodes see."""
    monkeypatch.setenv("SLURM_CONF", devcluster.environment["SLURM_CONF"])
    folder = short_folder / "doctor"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "cluster.yaml").write_text("{nodes: 2, environment: {OMP_NUM_THREADS: 1}, time: 5, save_s: 60}")
    return folder


def test_two_nodes(
    on_cluster: Path, data: Path, wait_for: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, said in (
        (["--partition", "nowhere"], "partition 'nowhere' is unknown"),
        (["--nodes", "9"], "nodes 9: "),
        (["--qos", "nowhere", "--account", "nobody", "--nodelist", "n9"], "sbatch: "),
    ):
        with pytest.raises(InputError, match=said):
            subcommand("doctor", ["cluster.yaml", *wrong, "--folder", "refused"])
    assert not (on_cluster / "refused").exists()

    code = subcommand("doctor", ["cluster.yaml", "--shards", str(data), "--folder", "checked"])
    out, err = capsys.readouterr()
    assert code == 0, out
    shown = {line.split()[0]: line.split()[1] for line in out.splitlines()[:-2] if line[0] != " "}
    assert set(shown) == {check.name for check in judge(three_nodes())}
    assert shown["gpus"] == "skip"
    assert "all 2 answered, from n" in out
    assert out.splitlines()[-1] == "files are in checked"
    assert "running on 2 nodes" in err
    running = ["squeue", "--noheader", "--name=doctor", "--states=PENDING,RUNNING"]
    wait_for(lambda: subprocess.run(running, capture_output=True, check=True).stdout == b"")  # a moment later


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give CLUSTER.yaml"),
        (["--local", "0"], "--local 0"),
        (["--local", "1", "--timeout-s", "0"], "--timeout-s 0"),
        (["--local", "1", "--shards", "a\nb"], "control character"),
        (["--local", "1", "--nodez", "2"], "nodez"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        subcommand("doctor", arguments)
    assert "\n" not in str(refused.value)


def test_package_that_is_missing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": "2.13.0"})
    (tmp_path / "cluster.yaml").write_text("nodes: 2")
    with pytest.raises(InputError, match="deepspeed: not installed"):
        subcommand("doctor", [str(tmp_path / "cluster.yaml"), "--folder", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
