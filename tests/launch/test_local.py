"""`ecgscale-launch --local N`: real processes."""

from __future__ import annotations

import subprocess
import sys
import time

from ecgscale_launch.cli import main


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ecgscale_launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_failure_of_the_ranks_is_the_exit_code_and_ends_the_job() -> None:
    began = time.monotonic()
    done = launch("--local", "2", "--", "pretrain", "--data.shards", "nowhere", "--run.dir", "run")
    assert done.returncode == 2
    assert "nowhere is no data set" in done.stderr
    assert "exit code 2; the others were ended" in done.stderr
    assert time.monotonic() - began < 60


def test_refusals(capsys) -> None:
    for arguments, said in (
        (["--local", "2", "--", "pretrian"], "'pretrian' does not run as several processes"),
        (["--local", "0", "--", "pretrain", "x"], "--local 0"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
