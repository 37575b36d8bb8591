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
from safetensors.numpy import load_file, save_file

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.method_table import Case, Measured, Results, as_csv, markdown, plot
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
    scored = [line for line in table.splitlines() if line.startswith("- test: ")]
    assert len(scored) == 2, "all methods and lead sets of a task scored the same recordings"
    assert "0 with none of the classes, 0 with two or more of the classes, 0 shorter than 0.16 s" in scored[0]
    assert "0 of persons with one session" not in scored[1], "what there is none of is not told"
    run = tmp_path / "run"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    # A probe of a pretrained encoder is the same for each seed; of random weights and fine-tuning it is not.
    seeds = {
        (row["method"], row["protocol"]): row["seeds"]
        for row in csv.DictReader((run / "table.csv").read_text().splitlines())
    }
    rows = list(csv.DictReader((run / "table.csv").read_text().splitlines()))
    for row in rows:
        left_out = dict(part.split("=") for part in row["left out"].split(";"))
        assert int(row["asked for"]) == int(row["scored"]) + sum(map(int, left_out.values()))
    assert seeds["CMSC", "probe"] == "1"
    assert seeds["random init", "probe"] == seeds["CMSC", "finetune"] == "2"

    made = list(run.rglob("export/model.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in made}
    again = reproduce("--lead_sets", "12,2,1")
    assert again.count("| AUROC | 12 leads | 2 leads | 1 lead |") == 1
    assert {path: path.stat().st_mtime_ns for path in made} == before, "what is finished is not done again"

    shutil.rmtree(run / "pretrain" / "CMSC-seed0")
    methods = yaml.safe_load((tmp_path / "all.yaml").read_text())["methods"]
    methods[1]["overrides"].append("train.steps=3")  # pretrained anew: with other weights
    assert "probe-seed0: was made with another encoder" in reproduce("--methods", json.dumps(methods), code=2)
    fewer = json.dumps(_with(methods, 0, "train.steps=1"))
    assert "the run has train.steps 2, now it is 1" in reproduce("--methods", fewer, code=2)


def _with(methods: list[dict], number: int, override: str) -> list[dict]:
    return [m | {"overrides": [override]} if i == number else m for i, m in enumerate(methods)]


def test_what_was_made_from_something_else_is_never_taken_over(reproduce, tmp_path: Path) -> None:
    few = ["--protocols=finetune", "--seeds=1", f"--tasks=[{json.dumps(_task(tmp_path, 'rhythm'))}]"]
    reproduce(*few)
    leaf = tmp_path / "run" / "tasks" / "rhythm" / "W2V+CMSC" / "finetune-seed0"
    # Interrupted after its training, and the encoder is another one now.
    (leaf / "result.json").unlink()
    export = tmp_path / "run" / "pretrain" / "W2V+CMSC-seed0" / "export"
    weights = load_file(export / "model.safetensors")
    kept = export / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in weights.items()}, kept)
    assert "finetune-seed0: was made with another encoder" in reproduce(*few, code=2)
    said = reproduce(*few, "--dry-run").splitlines()
    assert said[-1].endswith("finetune-seed0: was made with another encoder; remove it or take another run.dir")
    assert f"  other  {leaf}" in said
    save_file(weights, kept)
    assert "finished for leads 12" in reproduce(*few, "--merge", code=2)
    reproduce(*few)
    # Another task, other data, another shape.
    other = _task(tmp_path, "rhythm") | {"overrides": ["task.min_positives=2"]}
    for command, code in (((), 2), (("--merge",), 2), (("--dry-run",), 0)):
        said = reproduce(*few[:2], f"--tasks=[{json.dumps(other)}]", *command, code=code)
        assert "was made with another task.min_positives" in said
    methods = yaml.safe_load((tmp_path / "all.yaml").read_text())["methods"]
    other = json.dumps(_with(methods, 1, "objective.name=wav2vec2"))
    assert "the run has objective.name 'cmsc', now it is 'wav2vec2'" in reproduce(*few, "--methods", other, code=2)
    wide = json.dumps(_with(methods, 0, "model.width=64"))
    assert "random-init/finetune-seed0: was made with another encoder" in reproduce(*few, "--methods", wide, code=2)
    options = IngestOptions(rate_hz=100, test_fraction=0.3, validation_fraction=0.2)
    ingest(Simulation(patients=40, rate_hz=100), tmp_path / "more", options)
    said = reproduce(*few, "--pretrain_shards", "data,more", code=2)
    assert "W2V+CMSC-seed0: was pretrained on other data" in said
    # Damage is told in one line.
    (leaf / "samples.npz").write_bytes(b"PK\x03\x04")
    assert "samples.npz: missing or damaged" in reproduce(*few, "--merge", code=2)
    (leaf / "result.json").write_text("null")
    assert "result.json: damaged" in reproduce(*few, "--merge", code=2)


def test_a_test_patient_in_pretraining_is_refused(reproduce, tmp_path: Path) -> None:
    options = IngestOptions(rate_hz=100, test_fraction=0.1, validation_fraction=0)
    ingest(Simulation(patients=32, rate_hz=100), tmp_path / "other", options)
    said = reproduce("--pretrain_shards=other", code=2)
    assert "rhythm: " in said
    assert "of its test patients are training patients of pretrain_shards" in said


def test_an_imported_model_label_fractions_and_seeds_of_pretraining(reproduce, tmp_path: Path, small_export) -> None:
    task = _task(tmp_path, "rhythm") | {"label_fractions": [0.5, 1]}
    slow = {"name": "there already", "init": str(small_export)}
    methods = yaml.safe_load((tmp_path / "all.yaml").read_text())["methods"][:1]
    few = ["--protocols=probe", "--pretrain_seeds=2", f"--tasks=[{json.dumps(task)}]"]
    said = reproduce(*few, "--methods", json.dumps([*methods, slow]), code=2)
    assert "rhythm has 100 Hz, there already takes 500 Hz" in said
    there = {"name": "there already", "init": str(tmp_path / "run" / "pretrain" / "W2V+CMSC-seed0")}
    reproduce(*few, "--methods", json.dumps(methods))
    table = reproduce(*few, "--methods", json.dumps([*methods, there]))
    assert "linear probe, 50 % of the labels" in table
    rows = list(csv.DictReader((tmp_path / "run" / "table.csv").read_text().splitlines()))
    seeds = {(row["method"], row["fraction"]): row["seeds"] for row in rows}
    assert seeds["W2V+CMSC", "1.0"] == seeds["W2V+CMSC", "0.5"] == "2", "one of each pretraining"
    assert (seeds["there already", "0.5"], seeds["there already", "1.0"]) == ("2", "1")


def _task(folder: Path, name: str) -> dict:
    return {"name": name, "finetune": str(folder / f"{name}.yaml"), "shards": ["data"]}


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
        ("--methods", "[{name: random init, pretrain: x}]", "methods: random-init is given twice"),
        ("--methods", "[{name: a b, pretrain: x}, {name: a-b, pretrain: x}]", "methods: a-b is given twice"),
        ("--methods", "[{name: a, init: /nowhere}]", "/nowhere: neither an export"),
        ("--lead_sets", "[I, '1']", "lead_sets: 1 is given twice"),
        ("--label_fractions", "0.5,0.5", "label_fractions: 0.5 is given twice"),
        ("--label_fractions", "0.01", "for training among the task.label_fraction 0.01 of it"),
        ("--methods", "[{name: a}]", "methods: a needs either pretrain or init"),
        ("--methods", "[{name: a, pertrain: x}]", "unknown key methods[0].pertrain; did you mean methods[0].pretrain?"),
        ("--methods", "[a]", "methods[0]: a group of keys, not the value 'a'"),
        ("--lead_sets", "['12,2']", "lead sets 12,2: give each apart: 12 2"),
        ("--lead_sets", "12,7", "unknown lead '7'"),
        ("--pretrain_seeds", "3", "seeds 2, pretrain_seeds 3"),
        ("--tasks", "[{name: a, finetune: absent.yaml}]", "absent.yaml: cannot read"),
        ("--seds", "3", "unknown key seds; did you mean seeds?"),
        ("--part", "3/2", "--part"),
    ],
)
def test_slips_end_in_one_line(reproduce, option, value, said) -> None:
    assert said in reproduce(option, value, code=2)


def measured(case: Case, method: str, values: list[float], *noise_R: np.ndarray) -> list[Measured]:
    sampled = zip(values, noise_R * (len(values) // len(noise_R)), strict=True)
    return [Measured(case, method, seed, value, value + sample_R) for seed, (value, sample_R) in enumerate(sampled)]


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
    assert (apart.estimate.value, apart.estimate.low, apart.estimate.high) == pytest.approx((0.05, 0.05, 0.05))
    assert "| random init, linear probe | **+0.050 [+0.050, +0.050]** |" in markdown(results, "ours")
    assert "task,probe,1.0,12,auroc,ours,2,0.800000" in as_csv(results, "ours")
    assert len(plot(results).axes) == 1


@pytest.mark.parametrize("other", [[0.74, 0.76], [0.74]])
def test_a_difference_of_one_seed_is_never_bold(other) -> None:
    narrow_R, case = np.random.default_rng(0).normal(0, 0.001, 2000), Case("task", "probe", 1.0, "12", "auroc")
    results = Results([*measured(case, "random init", other, narrow_R), *measured(case, "ours", [0.8], narrow_R)])
    table = markdown(results, "ours")
    assert "[+0.050, +0.050] one seed |" in table or "[+0.060, +0.060] one seed |" in table
    assert "**" not in table


def test_recordings_that_differ_between_methods_are_told_apart() -> None:
    case, noise_R = Case("task", "probe", 1.0, "12", "auroc"), np.zeros(10)
    covers = Coverage("test", 9, 7, {"no_label": 2}, 0.1)
    runs = [Measured(case, "ours", 0, 0.8, noise_R, covers), Measured(case, "older", 0, 0.7, noise_R)]
    table = markdown(Results(runs), "ours")
    assert "- leads 12 by ours: test: 7 of 9 recordings scored; left out: 2 without the label" in table
    assert "- leads 12 by older: not counted, by an earlier version" in table
    ours, older = csv.DictReader(as_csv(Results(runs), "ours").splitlines())
    assert (ours["asked for"], ours["scored"], ours["left out"]) == ("9", "7", "no_label=2")
    assert (older["asked for"], older["scored"], older["left out"]) == ("", "", "")


def test_seeds_that_err_apart_narrow_the_interval_and_undefined_figures_do_not_count() -> None:
    rng, case = np.random.default_rng(0), Case("task", "probe", 0.005, "12", "auroc")
    apart = measured(case, "ours", [0.8, 0.8], *rng.normal(0, 0.1, (2, 2000)))
    nowhere = [Measured(case, "random init", 0, None, np.full(2000, np.nan))]
    results = Results([*nowhere, *apart])
    ours = results.by[case, "ours"].mean
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(2), rel=0.1)
    table = markdown(results, "ours")
    assert "| random init, linear probe, 0.5 % of the labels | – |" in table
    assert "nan" not in table
    assert len(plot(results).axes) == 1
