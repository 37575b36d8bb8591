"""Small jobs as real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.simulate import Simulation

SMALL = [
    "--model.preset=tiny", "--model.stem_channels=16", "--model.width=32", "--model.depth=2", "--model.ffn_width=64",
    "--model.heads=2", "--model.position_kernel=16", "--objective.codes=16", "--objective.code_width=16",
    "--objective.negatives=20", "--data.segment_s=2.5", "--data.min_record_s=5", "--engine.learning_rate=1e-3",
    "--engine.clip_norm=1",
    "--engine.whole_below=0", "--train.global_batch=8", "--train.log_every=1", "--train.steps=6",
    "--train.checkpoint_every=100",
]  # fmt: skip
NO_DROPOUT = ["--model.dropout=0", "--model.attention_dropout=0", "--model.feature_dropout=0"]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "simulated"
    ingest(Simulation(patients=24, duration_s=6, rate_hz=250), out, IngestOptions(rate_hz=250, records_per_shard=16))
    return out


class Jobs:
    """Starts jobs on a number of ranks and reads what they wrote."""

    def start(self, world_size: int, *jobs: list[str]) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, str(Path(__file__).parent / "run_jobs.py"), json.dumps(jobs)]
        ranks = [
            os.environ
            | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world_size)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            for r in range(world_size)
        ]
        return [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in ranks]

    def run(self, world_size: int, *jobs: list[str], code: int = 0) -> str:
        """Run to the end; what rank 0 wrote to stderr."""
        processes = self.start(world_size, *jobs)
        errors = [process.communicate(timeout=300)[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == [code] * world_size, "\n".join(error[-2000:] for error in errors)
        return errors[0]

    def killed_after(self, step: int, run: Path, world_size: int, *jobs: list[str]) -> None:
        """Start and kill all ranks with SIGKILL once ``step`` is logged."""
        processes = self.start(world_size, *jobs)
        while step not in losses(run):
            assert all(process.poll() is None for process in processes), processes[0].communicate()[1][-3000:]
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def jobs() -> Jobs:
    return Jobs()


def events(run: Path) -> list[dict]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; the last one written counts."""
    return {event["step"]: event["train/loss"] for event in events(run) if "train/loss" in event}
