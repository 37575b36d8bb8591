"""`ecgscale compare`: the chain in one command, run twice."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import yaml

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.simulate import Simulation

PRETRAIN = {
    "model": {"preset": "tiny", "stem_channels": 16, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    "objective": {"codes": 16, "code_width": 16, "negatives": 10},
    "train": {"steps": 2, "global_batch": 8},
}
FINETUNE = {
    "task": {"label": "rhythm", "kind": "singlelabel", "min_positives": 1},
    "train": {"steps": 2, "global_batch": 8},
}


@pytest.fixture
def compare(tmp_path, capsys):
    options = IngestOptions(rate_hz=100, test_fraction=0.3, validation_fraction=0.2)
    ingest(Simulation(patients=32, rate_hz=100), tmp_path / "data", options)

    def run(code: int = 0) -> str:
        for name, config in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        data = str(tmp_path / "data")
        arguments = ["--pretrain", str(tmp_path / "pretrain.yaml"), "--finetune", str(tmp_path / "finetune.yaml")]
        arguments += ["--pretrain-shards", data, "--task-shards", data, "--run", str(tmp_path / "run"), "--seeds", "2"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deepspeed, in this process
            assert main(["compare", *arguments]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def test_compare_runs_once_and_refuses_to_mix(compare, tmp_path: Path) -> None:
    table = compare()
    assert table.count(" ± ") == 4 * 3 + 1
    made = tmp_path / "run" / "pretrained-fine-tuned-seed1" / "export" / "model.safetensors"
    before = made.stat().st_mtime_ns
    assert compare() == table
    assert made.stat().st_mtime_ns == before, "what is finished is not done again"
    shutil.rmtree(tmp_path / "run" / "pretrain")  # pretrained anew, with one step more: other weights
    PRETRAIN["train"]["steps"] = 3
    try:
        assert "was made with another config, model or data" in compare(code=2)
    finally:
        PRETRAIN["train"]["steps"] = 2
