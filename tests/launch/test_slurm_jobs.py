"""Jobs on a real SLURM of four nodes: disturbed in every way, and what comes out in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ecgscale.cli import main as ecgscale_main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.files import read_json_if_there
from ecgscale.simulate import Simulation
from ecgscale_launch import slurm
from ecgscale_launch.cli import main
from ecgscale_launch.job_folder import JobFolder
from small_jobs import NO_DROPOUT, SMALL, logged, losses, recordings

FAULT = """

_begin = at


def at(step, phase):
    import os

    if phase == "forward" and os.environ["RANK"] == "1":
        raise MemoryError("no room left")
    _begin(step, phase)
"""
TOLERANCE = 2e-5  # fp32 sums over more ranks are added up in another order


@pytest.fixture(autouse=True)
def on_the_cluster(devcluster, monkeypatch, tmp_path) -> None:
    for name, value in devcluster.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cluster(tmp_path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text("{time: 20, save_s: 30, environment: {OMP_NUM_THREADS: '1'}}")
    return path


@pytest.fixture
def over(wait_for) -> Callable[..., str]:
    """Waits until the job of a run folder will not run again; what SLURM calls its end."""

    def wait(run: Path) -> str:
        wait_for(lambda: (slurm.state(number(run)) or "") in slurm.OVER)
        return slurm.state(number(run)) or ""

    return wait


@pytest.fixture(scope="module")
def labelled_shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("labelled") / "simulated"
    ingest(Simulation(patients=32, duration_s=6, rate_hz=250), out, IngestOptions(rate_hz=250, test_fraction=0.4))
    return out


def launch(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def number(run: Path) -> str:
    return str((read_json_if_there(JobFolder.of(run).submitted) or {})["job_id"])


def known_jobs() -> set[str]:
    """Numbers of all jobs that SLURM has not forgotten; it forgets those that have ended at any time."""
    return set(slurm.run("squeue", "--noheader", "--states=all", "--format=%A").split())


def state(run: Path) -> dict:
    return read_json_if_there(JobFolder.of(run).state) or {"attempts": []}


def pid_of(run: Path, rank: int) -> int:
    attempt = JobFolder.of(run).latest_attempt()
    return int((read_json_if_there(attempt / f"rank-{rank}.alive.json") or {})["pid"])


def test_a_run_in_spite_of_everything(cluster, long_job, undisturbed, wait_for, over, tmp_path) -> None:
    """A warning, a requeue, a more urgent job, a killed rank, a stuck rank, a cancel and a resume: on two nodes."""
    run = tmp_path / "run"
    launch(cluster, "--nodes=2", "--hang_s=12", "--", *long_job, "--run.dir", run)
    job = number(run)

    def attempts_to(count: int, step: int) -> None:
        """Wait for an attempt, and for it to go beyond a step."""
        wait_for(lambda: len(state(run)["attempts"]) == count and logged(run, step))
        wait_for(lambda: state(run)["attempts"][-1]["first_step"])

    attempts_to(1, 3)
    subprocess.run(["scancel", "--batch", "--signal=USR2", job], check=True)
    attempts_to(2, 6)
    subprocess.run(["scontrol", "requeue", job], check=True)
    attempts_to(3, 9)
    subprocess.run(["sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"], check=True)
    attempts_to(4, 12)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    attempts_to(5, 15)
    os.kill(pid_of(run, 0), signal.SIGSTOP)
    attempts_to(6, 18)
    launch("cancel", run)
    over(run)
    assert main([str(cluster), "--nodes=3", "--", *long_job, "--run.dir", str(run)]) == 2  # lanes: 3 does not divide 8
    launch("resume", run, "--hang_s", "300")
    assert over(run) == "COMPLETED"
    found = state(run)
    outcomes = [attempt["outcome"] for attempt in found["attempts"]]
    assert outcomes == ["stopped", "stopped", "stopped", "crashed", "hung", "stopped", "done"]
    assert "rank 0 on n1 is stuck in " in found["attempts"][4]["what"]
    assert (found["requeues"], found["restarts"], found["phase"]) == (4, 1, "done")
    assert losses(run) == losses(undisturbed)
    assert set(recordings(run)) == set(recordings(undisturbed))


def test_stages_and_shapes_equal_one_machine(cluster, shards, jobs, over, tmp_path) -> None:
    job = ["pretrain", *SMALL, *NO_DROPOUT, f"--data.shards={shards}"]
    jobs.run(1, [*job, f"--run.dir={tmp_path}/here"])
    wanted = losses(tmp_path / "here")
    for stage, nodes, tasks in ((2, 2, 2), (3, 4, 1)):
        run = tmp_path / f"stage-{stage}"
        shape = (f"--nodes={nodes}", f"--tasks_per_node={tasks}", "--network.interface=lo")
        launch(cluster, *shape, "--", *job, f"--engine.zero_stage={stage}", "--run.dir", run)
        assert over(run) == "COMPLETED"
        assert losses(run) == pytest.approx(wanted, rel=TOLERANCE)
        assert (
            len({json.loads(path.read_text())["host"] for path in run.glob("launch/attempts/*/*.alive.json")}) == nodes
        )


def test_the_first_error_of_the_first_rank_ends_a_job_after_bounded_retries(
    cluster, shards, wait_for, over, tmp_path, capsys
) -> None:
    """The fault is put into the job's own snapshot of the code while it waits in the queue."""
    run = tmp_path / "run"
    held = ("--nodes=2", "--retries=1", "--sbatch.hold=")
    launch(cluster, *held, "--", "pretrain", *SMALL, f"--data.shards={shards}", "--run.dir", run)
    with (run / "launch/code/ecgscale/progress.py").open("a") as module:
        module.write(FAULT)
    subprocess.run(["scontrol", "release", number(run)], check=True)
    assert over(run) == "FAILED"
    found = state(run)
    assert [attempt["outcome"] for attempt in found["attempts"]] == ["crashed", "crashed"]
    assert found["error"]["rank"] == 1
    assert found["error"]["line"] == "MemoryError: no room left"
    capsys.readouterr()
    launch("status", run)
    assert "MemoryError: no room left" in capsys.readouterr().out
    launch("logs", run, "--supervisor")
    assert "failed (2 failures without a new checkpoint): rank 1: MemoryError" in capsys.readouterr().out


def test_ingest_in_parts_in_a_folder_that_would_harm_a_shell(cluster, over, tmp_path) -> None:
    folder = tmp_path / 'it\'s $(touch pwned) `x` "q" & more'
    folder.mkdir()
    np.save(folder / "records.npy", np.random.default_rng(0).normal(size=(12, 12, 500)).astype(np.float32))
    options = ("--source-rate-hz", "100", "--rate-hz", "100", "--records-per-shard", "2")
    command = ["ingest", folder / "records.npy", folder / "out", *options]
    launch(cluster, "--run", folder / "run", "--parts", 3, "--", *command)
    assert over(folder / "run/merge") == "COMPLETED"
    assert ecgscale_main(list(map(str, [*command[:2], tmp_path / "at once" / "out", *options]))) == 0
    written = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "at once" / "out").iterdir()}
    assert (folder / "run/merge/launch").stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_a_comparison_in_parts_gives_one_table(cluster, labelled_shards, over, tmp_path) -> None:
    """Random weights in one job, the pretrained ones in another; the table when both have ended."""
    (tmp_path / "pretrain.yaml").write_text("train: {steps: 2}")
    (tmp_path / "rhythm.yaml").write_text("task: {label: rhythm, min_positives: 1}\ndata: {min_record_s: 5}")
    method = {"name": "ours", "pretrain": str(tmp_path / "pretrain.yaml")}
    method["overrides"] = [*SMALL, "--train.steps=2"]
    task = {"name": "rhythm", "finetune": str(tmp_path / "rhythm.yaml"), "shards": [str(labelled_shards)]}
    compared = {"methods": [method], "tasks": [task], "pretrain_shards": [str(labelled_shards)]}
    (tmp_path / "all.yaml").write_text(json.dumps(compared | {"protocols": ["probe"], "seeds": 1}))
    command = ["reproduce", tmp_path / "all.yaml", "--run.dir", tmp_path / "run"]
    launch(cluster, "--run", tmp_path / "job", "--parts", 2, "--", *command)
    assert over(tmp_path / "job" / "merge") == "COMPLETED"
    table = (tmp_path / "run" / "table.md").read_text()
    assert all(f"| {name}, linear probe |" in table for name in ("random init", "ours"))


def test_a_sweep_of_fine_tuning_after_pretraining(cluster, labelled_shards, over, tmp_path, capsys) -> None:
    """The sweep waits for the pretraining; its table is there when the last run has ended."""
    data = f"--data.shards={labelled_shards}"
    launch(cluster, "--", "pretrain", *SMALL, "--train.steps=2", data, "--run.dir", tmp_path / "pretrained")
    tuning = ["finetune", "--init", tmp_path / "pretrained", "--task.label=rhythm", "--task.min_positives=1", data]
    tuning += ["--train.steps=2", "--train.global_batch=8", "--data.min_record_s=5"]
    sweeps = ("--sweep", "data.leads", "12", "I,II", "--sweep", "train.seed", "0", "1")
    after = ("--after", tmp_path / "pretrained", "--at-once", 2)
    launch(cluster, *after, *sweeps, "--", *tuning, "--run.dir", tmp_path / "tuned")
    runs = [tmp_path / "tuned" / f"leads={leads}_seed={seed}" for leads in ("12", "I,II") for seed in (0, 1)]
    assert slurm.state(number(runs[0])) == "PENDING"
    assert [over(run) for run in runs] == ["COMPLETED"] * 4
    table = (tmp_path / "tuned/results.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[2:4]] == [["| 12", "2/2"], ["| I,II", "2/2"]]
    assert " ± " in table[2]
    reports = [json.loads((run / "evaluation-test.json").read_text())["macro"]["auroc"]["value"] for run in runs]
    assert f"{np.mean(reports[:2]):.3f} ± " in table[2]
    rows = (tmp_path / "tuned/results.csv").read_text().splitlines()
    assert rows[0] == "run,data.leads,train.seed,AUROC,AUPRC,F1"
    assert len(rows) == 5
    capsys.readouterr()
    launch("status", tmp_path / "tuned", "--json")
    assert {one["state"] for one in json.loads(capsys.readouterr().out)} == {"done"}


def test_a_warning_to_one_task_of_an_array_leaves_the_others_alone(
    cluster, shards, wait_for, over, tmp_path, monkeypatch
) -> None:
    """The last task has the number of the whole array, by which all would be requeued. Launched from inside a job."""
    for name, value in (
        ("SLURM_ARRAY_JOB_ID", "999"),
        ("SLURM_ARRAY_TASK_ID", "4"),
        ("SLURM_JOB_ID", "999"),
        ("RANK", "3"),
    ):
        monkeypatch.setenv(name, value)
    job = ["pretrain", *SMALL, f"--data.shards={shards}", "--train.steps=400", "--run.dir", tmp_path / "runs"]
    launch(cluster, "--cpus_per_task=1", "--sweep", "train.seed", "0", "1", "--", *job)
    runs = [tmp_path / "runs/seed=0", tmp_path / "runs/seed=1"]
    wait_for(lambda: all(logged(run, 2) for run in runs))
    subprocess.run(["scancel", "--batch", "--signal=USR2", number(runs[1])], check=True)
    assert [over(run) for run in runs] == ["COMPLETED"] * 2
    assert [state(run)["requeues"] for run in runs] == [0, 1]
    # A port that the other task took first is a crash, mended in the allocation; a stop is what the warning did.
    stops = [[attempt["outcome"] for attempt in state(run)["attempts"]].count("stopped") for run in runs]
    assert stops == [0, 1]


def test_a_run_of_a_sweep_goes_on_alone_with_the_code_of_all(cluster, shards, wait_for, over, tmp_path) -> None:
    """Cancelled and submitted again, it is a job of its own; its packages lie in the folder of the sweep."""
    long = "--train.steps=400"  # the cancel comes before the end also where it takes seconds
    job = ["pretrain", *SMALL, f"--data.shards={shards}", long, "--run.dir", tmp_path / "runs"]
    launch(cluster, "--cpus_per_task=1", "--sweep", "train.seed", "0", "1", "--", *job)
    runs = [tmp_path / "runs/seed=0", tmp_path / "runs/seed=1"]
    wait_for(lambda: all(logged(run, 2) for run in runs))
    launch("cancel", runs[1])
    over(runs[1])
    assert state(runs[1])["phase"] == "stopped"
    launch("resume", runs[1])
    assert [over(run) for run in runs] == ["COMPLETED"] * 2
    assert sorted(tmp_path.rglob("launch/code")) == [tmp_path / "runs/launch/code"]


def test_a_chain_whose_first_job_fails_does_not_go_on(cluster, shards, tmp_path, over) -> None:
    first = ["finetune", "--init", tmp_path / "none", f"--data.shards={shards}", "--run.dir", tmp_path / "first"]
    second = ["finetune", "--init", tmp_path / "first", "--task.label=rhythm", f"--data.shards={shards}"]
    launch(cluster, "--", *first, "--", *second, "--run.dir", tmp_path / "second")
    assert over(tmp_path / "first") == "FAILED"
    assert over(tmp_path / "second") == "CANCELLED"
    assert state(tmp_path / "first")["attempts"][0]["outcome"] == "refused"


def test_refused_before_anything_is_submitted(cluster, shards, tmp_path, capsys) -> None:
    job = ["pretrain", *SMALL, f"--data.shards={shards}", "--run.dir", str(tmp_path / "run")]
    before = known_jobs()
    for arguments, said in (
        (["--partition=mian"], "partition 'mian' is unknown; this cluster has elsewhere, main, urgent"),
        (["--nodes=5"], "nodes 5: partition main has 4; give fewer"),
        (["--partition=elsewhere"], "which elsewhere.invalid does not see"),
        (["--partiton=main"], "unknown key partiton; did you mean partition?"),
        (["--constraint=a100"], "sbatch: "),
        (["--cpus_per_task=99"], "sbatch: "),
        (["--name=a\nb"], "name 'a\\nb': give up to 128 letters"),
        (["--account=$(id)"], "account '$(id)': give a name"),
        (["--environment.A=x\ny"], "environment.A 'x\\ny': holds a line break"),
        (["--sbatch.signal=TERM@5"], "sbatch.signal: ecgscale-launch sets --signal itself; use the key save_s"),
        (["--after", str(tmp_path)], "neither a job's number nor a run folder"),
        (["--after", "99999"], "job 99999 is unknown to SLURM"),
    ):
        assert main([str(cluster), *arguments, "--", *job]) == 2, arguments
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    parts = ["--run", str(tmp_path / "run"), "--parts", "1002", "--", "ingest", "x", str(tmp_path / "out")]
    assert main([str(cluster), *parts]) == 2
    assert "sbatch: allocation failure: Invalid job array specification" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([str(cluster), "--", *job[:-1], str(tmp_path / "50%j")]) == 2
    assert "SLURM replaces %" in capsys.readouterr().err
    open_to_others = tmp_path / "open/launch"
    open_to_others.mkdir(parents=True)
    open_to_others.chmod(0o755)
    assert main([str(cluster), "--", *job[:-1], str(tmp_path / "open")]) == 2
    assert "open to others (mode 0755); chmod 700 it" in capsys.readouterr().err
    assert known_jobs() - before == set()


def test_dry_run_shows_the_script_that_is_submitted(cluster, shards, over, tmp_path, capsys) -> None:
    job = ["verify", str(shards)]
    launch(cluster, "--dry-run", "--run", tmp_path / "run", "--environment.GREETING=it's $(date)", "--", *job)
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    launch(cluster, "--run", tmp_path / "run", "--environment.GREETING=it's $(date)", "--", *job)
    submitted = next((tmp_path / "run/launch/batch").glob("*.sh")).read_text()
    assert submitted.strip() in shown
    assert over(tmp_path / "run") == "COMPLETED"
