"""`ecgscale reproduce`: methods beside each other in one command, run twice, and in parts."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.downstream.results import Case, Measured, Results, as_csv, markdown, plot
from ecgscale.simulate import Simulation

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAIN = {
    "model": {"preset": "tiny", "stem_channels": 16, "width": 32, "depth": 1, "heads": 2, "ffn_width": 64},
    "objective": {"codes": 16, "code_width": 16, "negatives": 10},
    "train": {"steps": 2, "global_batch": 8},
}
RHYTHM = {
    "task": {"label": "rhythm", "kind": "singlelabel", "min_positives": 1},
    "train": {"steps": 2, "global_batch": 8},
}
PERSONS = {"task": {"kind": "identification", "arcface_scale": 16}, "train": {"steps": 2, "global_batch": 8}}


@pytest.fixture
def reproduce(tmp_path: Path, capsys) -> Callable[..., str]:
    """Runs two methods on two tasks; returns what is printed, or the error."""
    options = IngestOptions(rate_hz=100, test_fraction=0.3, validation_fraction=0.2)
    ingest(Simulation(patients=32, rate_hz=100), tmp_path / "data", options)
    for name, tree in (("pretrain", PRETRAIN), ("rhythm", RHYTHM), ("persons", PERSONS)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    config = {
        "methods": [
            {"name": "W2V+CMSC", "pretrain": str(tmp_path / "pretrain.yaml")},
            {"name": "CMSC", "pretrain": str(tmp_path / "pretrain.yaml"), "overrides": ["objective.name=cmsc"]},
        ],
        "tasks": [
            {"name": name, "finetune": str(tmp_path / f"{name}.yaml"), "shards": ["data"]}
            for name in ("rhythm", "persons")
        ],
        "pretrain_shards": ["data"],
        "data_dir": str(tmp_path),
        "protocols": ["probe", "neighbours", "finetune"],
        "seeds": 2,
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config))

    def run(*more: str, code: int = 0) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deepspeed, in this process
            assert main(["reproduce", str(tmp_path / "all.yaml"), *more]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def test_everything_is_done_once_and_more_leads_only_score(reproduce, tmp_path: Path) -> None:
    table = reproduce("--lead_sets", "12,2")
    for row in ("random init, linear probe", "W2V+CMSC, nearest neighbours", "CMSC, fine-tuned", "CMSC, frozen"):
        assert f"| {row} |" in table, row
    assert "| AUROC | 12 leads | 2 leads |" in table
    assert "| top-1 | 12 leads | 2 leads |" in table
    assert table.count("| W2V+CMSC minus |") == 2
    run = tmp_path / "run"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    # A probe of a pretrained encoder is the same for each seed; of random weights and fine-tuning it is not.
    seeds = {
        (row["method"], row["protocol"]): row["seeds"]
        for row in csv.DictReader((run / "table.csv").read_text().splitlines())
    }
    assert seeds["CMSC", "probe"] == "1"
    assert seeds["random init", "probe"] == seeds["CMSC", "finetune"] == "2"

    made = list(run.rglob("export/model.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in made}
    again = reproduce("--lead_sets", "12,2,1")
    assert again.count("| AUROC | 12 leads | 2 leads | 1 leads |") == 1
    assert {path: path.stat().st_mtime_ns for path in made} == before, "what is finished is not done again"

    shutil.rmtree(run / "pretrain" / "CMSC-seed0")
    methods = yaml.safe_load((tmp_path / "all.yaml").read_text())["methods"]
    methods[1]["overrides"].append("train.steps=3")  # pretrained anew: with other weights
    assert "was made with another config, model or data" in reproduce("--methods", json.dumps(methods), code=2)


def test_parts_give_what_one_gives(reproduce, tmp_path: Path) -> None:
    probes = "--protocols=probe"
    assert "unit 3: CMSC" in reproduce(probes, "--dry-run")
    assert "is not finished for leads 12; run its part first" in reproduce(probes, "--merge", code=2)
    for part in ("1/2", "2/2"):
        assert "encoders are done" in reproduce(probes, "--part", part)
    merged = reproduce(probes, "--merge")
    in_parts = (tmp_path / "run" / "table.csv").read_text()
    shutil.rmtree(tmp_path / "run")
    assert reproduce(probes).endswith(merged)
    assert (tmp_path / "run" / "table.csv").read_text() == in_parts


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("reproduce/*.yaml")), ids=lambda path: path.stem)
def test_every_file_that_comes_along_can_be_planned(path: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["reproduce", str(path), f"--run.dir={tmp_path}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "unit 2: W2V+CMSC+RLM" in said
    assert "to do" in said


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--methods", "[]", "methods and tasks: give one of each"),
        ("--methods", "[{name: a/b, pretrain: x}]", "'a/b' cannot name a folder"),
        ("--methods", "[{name: random init, pretrain: x}]", "methods: two are called 'random init'"),
        ("--methods", "[{name: a}]", "methods: a needs either pretrain or init"),
        ("--methods", "[{name: a, pertrain: x}]", "pertrain"),
        ("--lead_sets", "12,7", "unknown lead '7'"),
        ("--pretrain_seeds", "3", "seeds 2, pretrain_seeds 3"),
        ("--tasks", "[{name: a, finetune: absent.yaml}]", "absent.yaml: cannot read the config"),
        ("--seds", "3", "unknown key seds; did you mean seeds?"),
        ("--part", "3/2", "--part"),
    ],
)
def test_slips_end_in_one_line(reproduce, option, value, said) -> None:
    assert said in reproduce(option, value, code=2)


def measured(case: Case, method: str, values: list[float], noise_R: np.ndarray) -> list[Measured]:
    return [Measured(case, method, seed, value, value + noise_R) for seed, value in enumerate(values)]


def test_differences_are_paired_and_intervals_are_of_the_mean_over_seeds() -> None:
    shared_R = np.random.default_rng(0).normal(0, 0.1, 2000)  # what the test patients do to every method alike
    case = Case("task", "probe", 1.0, "12", "auroc")
    better = measured(case, "ours", [0.81, 0.79], shared_R)
    results = Results([*measured(case, "random init", [0.74, 0.76], shared_R), *better])
    ours = results.by[case, "ours"]
    assert ours.mean.value == pytest.approx(0.8)
    assert ours.deviation == pytest.approx(np.std([0.81, 0.79], ddof=1))
    assert ours.mean.high - ours.mean.low == pytest.approx(2 * 1.96 * 0.1, rel=0.1)
    apart = results.difference(case, "ours", "random init")
    assert apart is not None
    assert (apart.value, apart.low, apart.high) == pytest.approx((0.05, 0.05, 0.05))
    assert "| random init, linear probe | **+0.050 [+0.050, +0.050]** |" in markdown(results, "ours")
    assert "task,probe,1.0,12,auroc,ours,2,0.800000" in as_csv(results, "ours")
    assert len(plot(results).axes) == 1
