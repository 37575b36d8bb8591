"""A SLURM of four nodes for the tests that need a real one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecgscale_launch import devcluster as dev
from small_jobs import SMALL, Jobs


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """pytest's own folders are too long for the paths of SLURM's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ecg-dev-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    """Skips where SLURM is not installed."""
    if missing := dev.missing_programs():
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing")


@pytest.fixture(scope="session")
def devcluster(slurm_installed: None, short_folder: Path) -> Iterator[dev.DevCluster]:
    """Four nodes of two CPUs. A busy machine needs seconds to save between a warning and its kill."""
    folder = short_folder / "shared"
    try:
        yield dev.up(folder, nodes=4, cpus=2, kill_wait_s=20, grace_s=20)
    finally:
        dev.down(folder)


@pytest.fixture(scope="session")
def long_job(shards: Path) -> list[str]:
    """A job long enough to be disturbed, which logs its losses and recordings; --run.dir is to be added."""
    more = ["--train.steps=150", "--train.checkpoint_every=1000", "--train.checkpoint_every_s=2", "--train.lanes=8"]
    more += ["--train.validate_every=9", "--train.log_recordings=true"]
    return ["pretrain", *SMALL, *more, f"--data.shards={shards}"]


@pytest.fixture(scope="session")
def undisturbed(jobs: Jobs, long_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the long job on two ranks, which nothing has disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    jobs.run(2, [*long_job, f"--run.dir={run}"])
    return run
