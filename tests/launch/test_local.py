"""`ecgscale-launch --local N`: real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ecgscale.errors import InputError
from ecgscale_launch.cli import main, subcommand
from ecgscale_launch.local import LocalRanks
from ecgscale_launch.standing import standings
from ecgscale_launch.watch import refuse_active
from small_jobs import logged, losses, recordings


def launch(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ecgscale_launch.cli", *map(str, arguments)]


def test_a_failure_is_told_once_and_ends_the_job(tmp_path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        launch("--local", 2, "--", "pretrain", "--data.shards", tmp_path / "nowhere", "--run.dir", run),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"failed: rank [01]: .*nowhere is no data set", done.stderr)
    assert "nowhere is no data set" in done.stderr
    state = json.loads((run / "launch/state.json").read_text())
    assert state["phase"] == "failed"
    assert [attempt["outcome"] for attempt in state["attempts"]] == ["refused"]  # no retry mends it


def test_a_run_in_spite_of_kill_and_interrupt(long_job, undisturbed, wait_for, tmp_path) -> None:
    """SIGKILL of a rank is mended at once; Ctrl-C saves, and the same command goes on."""
    run = tmp_path / "run"
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{retries: 2}")
    command = launch(cluster, "--local", 2, "--", *long_job, "--run.dir", run)
    ranks = run / "launch/attempts"

    def pid_of(attempt: int, rank: int) -> int:
        return json.loads((ranks / f"{attempt:04d}/rank-{rank}.alive.json").read_text())["pid"]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: logged(run, 3), process)
        os.kill(pid_of(1, 1), signal.SIGKILL)
        wait_for(lambda: (ranks / "0002").exists() and logged(run, 6), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "rank 1 was killed (SIGKILL)" in said
    assert "stopped as asked at step " in said
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    state = json.loads((run / "launch/state.json").read_text())
    assert [attempt["outcome"] for attempt in state["attempts"]] == ["crashed", "stopped", "done"]
    assert (state["phase"], state["restarts"], state["requeues"]) == ("done", 1, 0)
    assert losses(run) == losses(undisturbed)
    assert set(recordings(run)) == set(recordings(undisturbed))


def test_ranks_end_with_their_launcher(long_job, undisturbed, wait_for, tmp_path) -> None:
    """kill -9 of the launcher: nobody watches the ranks any more, so they save and end; the same command goes on."""
    run = tmp_path / "run"
    command = launch("--local", 2, "--", *long_job, "--run.dir", run)
    attempt = run / "launch/attempts/0001"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(lambda: logged(run, 3), process)
        process.kill()
    told = [attempt / f"rank-{rank}.alive.json" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(json.loads(path.read_text())["ended"] for path in told):
        assert time.monotonic() < deadline, [path.read_text() for path in told]
        time.sleep(0.1)
    assert "ecgscale-launch is gone" in (attempt / "rank-1.log").read_text()
    [job], _ = standings([run])
    assert job.checkpoint_step is not None
    assert job.checkpoint_step >= 3  # saved at the end, not when it was due
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(undisturbed)


def test_orphaned_ranks_are_seen_and_ended(long_job, wait_for, tmp_path, capsys) -> None:
    """Ranks that cannot save, here for being stopped, are what `cancel --now` is for."""
    run = tmp_path / "run"
    ranks: list[psutil.Process] = []
    with subprocess.Popen(launch("--local", 2, "--", *long_job, "--run.dir", run), start_new_session=True) as process:
        wait_for(lambda: logged(run, 1), process)
        ranks += psutil.Process(process.pid).children()
        for rank in ranks:
            rank.suspend()
        process.kill()
    [job], _ = standings([run])
    assert job.state == "orphaned"
    assert not job.over
    with pytest.raises(InputError, match="is orphaned; wait for its end or cancel it first"):
        refuse_active(run)
    assert subcommand("cancel", [str(run), "--now"]) == 0
    assert "2 ranks were ended without saving" in capsys.readouterr().out
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert standings([run])[0][0].state == "lost"


@pytest.mark.parametrize("given", [{}, {"OMP_NUM_THREADS": "7", "GREETING": "hello"}])
def test_a_dry_run_shows_the_environment_that_ranks_get(given, capsys, tmp_path) -> None:
    overrides = [f"--environment.{name}={value}" for name, value in given.items()]
    assert main(["--local", "1", *overrides, "--dry-run", "--run", str(tmp_path / "run"), "--", "verify", "x"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "environment of a rank: " in line]
    shown = dict(word.split("=") for word in line.partition("environment of a rank: ")[2].split() if "=" in word)
    folder, out = tmp_path / "attempt", tmp_path / "environment.json"
    folder.mkdir()
    program = f"import json, os, pathlib; pathlib.Path({str(out)!r}).write_text(json.dumps(dict(os.environ)))"
    ranks = LocalRanks(folder, [sys.executable, "-c", program], given, 1, shown=False)
    while not ranks.ended():
        time.sleep(0.05)
    told = json.loads(out.read_text())
    for name in ("OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *given):
        assert shown[name] == told[name]


def test_a_dry_run_checks_and_writes_nothing(long_job, shards, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--local", "2", "--dry-run", "--", *map(str, long_job), "--run.dir", "run"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "RANK=0..1" in shown
    assert "WORLD_SIZE=2" in shown
    assert str(shards) in shown  # the resolved config
    assert f"# --- {tmp_path}/run/launch/config.yaml ---" in shown
    assert "ecgscale_launch.rank ATTEMPT pretrain\n" in shown
    assert main([*command, "--data.shards", "nowhere"]) == 2
    assert "nowhere is no data set" in capsys.readouterr().err
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("container: {kind: apptainer, image: /i.sif, mounts: [/not/there:/data]}")
    before = cluster.stat()
    assert main([str(cluster), *command]) == 0
    assert "container.mounts: /not/there is not there on this machine" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [cluster]
    assert cluster.stat() == before


def test_refusals(capsys, tmp_path) -> None:
    for arguments, said in (
        (["--local", "2", "--", "pretrian"], "'pretrian' after --: no command of ecgscale"),
        (["--local", "0", "--", "pretrain", "x"], "--local 0"),
        (["--local", "2", "--", "verify", "x"], "verify does not run as several processes under ecgscale-launch"),
        (["--local", "2", "--", "pretrain"], "run.dir is missing"),
        (["--local", "2"], "no command after --"),
        (["--", "verify", "x"], "give CLUSTER.yaml, or --local N"),
        (["--local", "1", "--node", "2", "--", "verify", "x"], "unknown key node; did you mean nodes?"),
        (["--local", "1", "--sweep", "train.seed", "--", "verify", "x"], "--sweep train.seed: give its values too"),
        (
            ["--local", "1", "--parts", "3", "--", "verify", "x"],
            "--parts splits ingest, reproduce, scaling-law, not verify",
        ),
    ):
        assert main([*arguments, "--run", str(tmp_path / "none")] if "--" not in arguments else arguments) == 2
        assert said in capsys.readouterr().err
