"""`ecgscale-launch --local N`: real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

from ecgscale_launch.cli import main
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
