"""What earlier commits have written is read today: shards, an export, a fine-tuned model, and a run that goes on."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ecgscale
from ecgscale.cli import main
from ecgscale.config import load
from ecgscale.data.shard_set import ShardSet
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.training.checkpoint import latest
from small_jobs import losses

ARCHIVES = {path.name.partition(".")[0]: path for path in sorted(Path(__file__).parent.glob("*.tar.xz"))}
OTHER_MACHINE = 1e-4  # relative: what is computed on another CPU differs in the last bits, which steps amplify


@pytest.fixture(scope="module", params=ARCHIVES)
def earlier(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(ARCHIVES[request.param]) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(earlier) -> dict[str, Any]:
    return json.loads((earlier / "expected.json").read_text())


def test_shards_are_whole_and_hold_the_same_signals(earlier, expected) -> None:
    assert main(["verify", str(earlier / "shards")]) == 0
    shards = ShardSet.open(earlier / "shards")
    signals = [shards.record(row).millivolts() for row in range(len(shards))]
    assert [hashlib.sha256(signal.tobytes()).hexdigest() for signal in signals] == expected["millivolts_sha256"]


def test_an_export_gives_the_same_embedding(earlier, expected) -> None:
    record = ShardSet.open(earlier / "shards").record(0)
    embedding = ecgscale.load(earlier / "export").embed(record.millivolts(), rate_hz=100, leads=record.leads)
    np.testing.assert_allclose(embedding.record_embedding, expected["embedding"], rtol=OTHER_MACHINE, atol=1e-6)


def test_a_fine_tuned_run_is_scored_the_same(earlier, expected, tmp_path) -> None:
    report = tmp_path / "report.json"
    shards = earlier / "shards"
    assert main(["evaluate", str(earlier / "tuned"), f"--data.shards={shards}", f"--out={report}"]) == 0
    again = json.loads(report.read_text())
    for key in ("classes", "macro", "leads", "split"):
        assert again[key] == expected["report"][key], key


def test_a_fine_tuned_runs_config_is_taken_again(earlier) -> None:
    """It has the keys of all tasks, as was written then."""
    config = load(FinetuneConfig, ["--config", str(earlier / "tuned" / "config.yaml")])
    assert (config.task.kind, config.task.label, config.train.steps) == ("singlelabel", "rhythm", 2)


def test_a_killed_run_goes_on_as_it_would_have_then(earlier, jobs, tmp_path) -> None:
    """Its events tell of two steps behind its checkpoint; its export is of the last of them."""
    run, shards = earlier / "run", earlier / "shards"
    begun, then = latest(run / "checkpoints").step, losses(run)
    assert (begun, max(then)) == (2, 4)
    jobs.run(
        1,
        ["pretrain", f"--config={run / 'config.yaml'}", f"--data.shards={shards}", f"--run.dir={run}"],
        ["export", str(run), str(tmp_path / "export")],
    )
    assert latest(run / "checkpoints").step == 4
    now = losses(run)
    assert now == pytest.approx(then, rel=OTHER_MACHINE)
    record = ShardSet.open(shards).record(0)
    exported = [ecgscale.load(folder) for folder in (earlier / "export", tmp_path / "export")]
    embeddings = [model.embed(record.millivolts(), 100, record.leads).record_embedding for model in exported]
    np.testing.assert_allclose(*embeddings, rtol=1e-3, atol=1e-4)
