"""`ecgscale scaling-law`: a ladder of real, tiny runs from its config to its table, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from ecgscale.cli import main
from ecgscale.config import load
from ecgscale.scaling import rates
from ecgscale.scaling.ladder import ScalingConfig, validation_at
from ecgscale.scaling.law import Law
from ecgscale.scaling.report import as_csv, as_json, markdown, plot
from ecgscale.scaling.results import Ladder, Run, find
from ecgscale.studies import read_result, write_result
from small_jobs import Jobs

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAIN = {
    "model": {
        "preset": "tiny",
        "stem_channels": 16,
        "depth": 1,
        "heads": 2,
        "position_kernel": 8,
        "position_groups": 2,
    },
    "objective": {"name": "wav2vec2", "codes": 8, "code_width": 8, "negatives": 5},
    "data": {"segment_s": 1, "min_record_s": 2, "workers": 0},
    "engine": {"clip_norm": 1},
    "train": {"global_batch": 4, "log_every": 100, "projected_recordings": 0, "validation_recordings": 4},
}
TOKENS = 4 * 2 * (250 // 16)  # of a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards: Path) -> Path:
    """A ladder's config of two sizes and two token counts, nothing of it done."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN))
    config = {
        "pretrain": str(folder / "pretrain.yaml"),
        "shards": [shards.name],
        "data_dir": str(shards.parent),
        "sizes": [{"name": f"w{w}", "overrides": [f"model.width={w}", f"model.ffn_width={4 * w}"]} for w in (8, 16)],
        "tokens": [TOKENS, 2.2 * TOKENS],
        "run": {"dir": str(folder / "run")},
    }
    (folder / "ladder.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def scaling_law(folder: Path, capsys, monkeypatch) -> Callable[..., str]:
    """Runs the ladder; returns what is printed, or the error."""
    monkeypatch.setattr("ecgscale.training.monitor.Monitor.figure", lambda *_: None)  # a third of each run

    def run(*more: str, code: int = 0) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deepspeed, in this process
            assert main(["scaling-law", str(folder / "ladder.yaml"), *more]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def test_two_sizes_and_two_token_counts_in_parts_and_once_more(scaling_law, folder: Path) -> None:
    planned = scaling_law("--dry-run")
    assert planned.count("to do") == 4
    assert f"{2 * TOKENS} tokens in 2 steps" in planned, "tokens are rounded to whole steps"
    assert not (folder / "run").exists()

    assert "2 cells are done" in scaling_law("--part", "1/2")
    assert "is not finished; run its part first" in scaling_law("--merge", code=2)
    assert "2 cells are done" in scaling_law("--part", "2/2")
    table = scaling_law("--merge")
    assert "No law: 2 sizes, 2 token counts and 4 cells do not determine the law's five constants" in table
    run = folder / "run"
    assert json.loads((run / "fit.json").read_text())["law"] is None
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((run / "cells.csv").read_text().splitlines()))
    assert sorted((row["size"], int(row["tokens"])) for row in rows) == [
        (size, steps * TOKENS) for size in ("w16", "w8") for steps in (1, 2)
    ]
    one = next(row for row in rows if row["size"] == "w8" and row["steps"] == "2")
    lines = (run / "cells" / "w8" / "264-seed0" / "events.jsonl").read_text().splitlines()
    losses = [json.loads(line)["validation/local"] for line in lines if "validation/local" in line]
    assert [float(one["validation/local"])] == pytest.approx(losses)

    # What is done is not done again; what was lost is.
    made = {path: path.stat().st_mtime_ns for path in run.glob("cells/*/*/result.json")}
    shutil.rmtree(next(iter(made)).parent)
    assert "4 cells are done" in scaling_law()
    again = {path: path.stat().st_mtime_ns for path in run.glob("cells/*/*/result.json")}
    assert again.keys() == made.keys()
    assert sum(again[path] != made[path] for path in made) == 1
    assert scaling_law("--dry-run").count("done ") == 4

    # So is what a longer list of factors adds.
    more = scaling_law("--learning_rate_factors", "1,2", "--dry-run")
    assert (more.count("done "), more.count("to do")) == (4, 4)

    # Another config is another ladder.
    for option, key in (
        ("[engine.learning_rate=1e-3]", "engine.learning_rate"),
        ("[train.validation_recordings=3]", "train.validation_recordings"),  # they define the loss
    ):
        assert f"the run has {key}" in scaling_law("--overrides", option, code=2)
        assert "cannot start yet: " in scaling_law("--overrides", option, "--dry-run")


@pytest.mark.parametrize("key", ["train.steps", "train.warmup_steps", "train.seed"])
def test_what_tokens_and_seeds_decide_cannot_be_given(scaling_law, key) -> None:
    assert f"overrides, {key}=3: tokens, warmup_share and seeds" in scaling_law("--overrides", f"[{key}=3]", code=2)
    sizes = f"[{{name: a, overrides: ['{key} = 3']}}]"
    assert f"overrides, {key} = 3: tokens" in scaling_law("--sizes", sizes, code=2)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("option", "refused"),
    [
        ("--loss=cmsc", "loss 'cmsc': wav2vec2 has loss, local"),
        ("--loss=local_accuracy", "loss 'local_accuracy': wav2vec2 has"),  # an accuracy is no loss
        (
            "--overrides=[engine.activation_checkpointing=2]",
            "engine.activation_checkpointing 2: the model has 1 layers",
        ),
    ],
)
def test_what_no_cell_can_do_is_refused_before_any_is_run(scaling_law, folder: Path, more, option, refused) -> None:
    run = folder / "unknown"
    assert refused in scaling_law(option, f"--run.dir={run}", *more, code=2)
    assert not run.exists()


def test_the_ladder_goes_on_beyond_a_run_that_diverges(scaling_law, folder: Path) -> None:
    run = folder / "diverging"
    few = ["--sizes", "[{name: w8, overrides: [model.width=8, train.max_skipped=1]}]", "--tokens", f"{3 * TOKENS}"]
    few += ["--learning_rate_factors", "1e30,1", f"--run.dir={run}"]
    table = scaling_law(*few)
    assert "1 of 2 runs have no finite loss and are left out." in table
    cells = {path.name: json.loads((path / "result.json").read_text()) for path in run.glob("cells/w8/*")}
    assert cells.keys() == {"360-seed0", "360-rate1e+30-seed0"}
    assert cells["360-rate1e+30-seed0"]["validation"] == {"loss": None}
    assert cells["360-seed0"]["validation"]["local"] > 0
    rows = list(csv.DictReader((run / "cells.csv").read_text().splitlines()))
    assert sorted((row["used"], row["validation/local"] != "") for row in rows) == [("0", False), ("1", True)]
    assert scaling_law(*few, "--dry-run").count("done ") == 2
    assert "1 of 2 runs" in scaling_law(*few, "--loss", "loss", "--merge"), "whatever part of the loss is asked for"

    # Only what has diverged has no loss: a part that is missing elsewhere is no loss of NaN.
    place = run / "cells" / "w8" / "360-seed0" / "result.json"
    found = read_result(place)
    del found["validation"]["local"]
    write_result(place, found)
    assert f"{place}: has no local, only loss," in scaling_law(*few, "--merge", code=2)
    assert "1 of 2 runs" in scaling_law(*few, "--loss", "loss", "--merge")


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    whole = '{"event": "step", "step": 2, "validation/loss": 1.5, "validation/local": null}'
    for torn in ('{"event": "step", "step": 2, "validation/loss": {"a": 1}', '{"event": "step", "validation/lo'):
        (tmp_path / "events.jsonl").write_text(f"{torn}\n{whole}\n{torn}")
        assert validation_at(tmp_path, 2) == {"loss": 1.5, "local": None}
    assert validation_at(tmp_path, 3) == {}


def test_two_ranks_share_each_cell(folder: Path, jobs: Jobs) -> None:
    run = folder / "two"
    few = ["--sizes", "[{name: w8, overrides: [model.width=8, train.max_skipped=1]}]", "--tokens", f"{3 * TOKENS}"]
    few += ["--learning_rate_factors", "1e30,1", f"--run.dir={run}"]  # both leave the cell that diverges
    jobs.run(2, ["scaling-law", str(folder / "ladder.yaml"), *few])
    assert (run / "table.md").exists()
    (state,) = run.glob("cells/w8/*/checkpoints/*/state.json")
    assert json.loads(state.read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--sizes", "[{name: a}, {name: a}]", "sizes and predict: a is given twice"),
        ("--sizes", "[{name: a, overrides: [model.wdth=8]}]", "sizes, a: unknown key model.wdth"),
        ("--sizes", "[{name: a, overrides: [model.width=9]}]", "sizes, a: model.width 9 is no multiple"),
        ("--tokens", "1000,1000", "tokens: 1000.0 is given twice"),
        ("--tokens", "120,130", "tokens, in steps of w8: 1 is given twice"),
        ("--tokens", "[-1]", "tokens -1: give positive numbers"),
        ("--warmup_share", "1", "warmup_share 1: give a share below 1"),
        ("--seeds", "0", "seeds 0: give 1 or more"),
        ("--resamples", "2", "resamples 2: give 20 or more"),
        ("--run.dir", "", "run.dir is missing"),
        ("--pretrain", "absent.yaml", "absent.yaml: cannot read: No such file"),
        ("--shards", "absent", "absent"),
        ("--part", "3/2", "--part"),
    ],
)
def test_slips_end_in_one_line(scaling_law, option: str, value: str, said: str) -> None:
    error = scaling_law(option, value, code=2)
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("scaling/*.yaml")), ids=lambda path: path.stem)
def test_every_file_that_comes_along_can_be_planned(path: Path, shards: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    place = [f"--data_dir={shards.parent}", f"--shards={shards.name}", f"--run.dir={tmp_path}"]
    assert main(["scaling-law", str(path), *place, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to do") >= 4


def runs(law: Law, scatter: float = 0.003, widths: tuple[int, ...] = (16, 32, 64, 128), **changes: object) -> list[Run]:
    """Runs that follow a law: four sizes, four token counts, two seeds."""
    rng, made = np.random.default_rng(0), []
    for width in widths:
        size = 24 * width**2
        for tokens in (2**16, 2**17, 2**18, 2**19):
            for seed in (0, 1):
                loss = float(law.loss(size, tokens) * np.exp(rng.normal(0, scatter)))
                about = {"epochs": 1.0, "flops": 9 * size * tokens, "learning_rate": 1e-3, "loss": loss} | changes
                parts = {"local": about["loss"]}
                made.append(Run(f"w{width}", size, width, tokens=tokens, steps=9, seed=seed, parts=parts, **about))
    return made


@pytest.fixture(scope="module")
def config(folder: Path) -> ScalingConfig:
    return load(ScalingConfig, ["--config", str(folder / "ladder.yaml"), "--resamples", "40"])


LAW = Law(2.0, 60.0, 0.4, 300.0, 0.45)


def test_a_ladder_that_follows_a_law_predicts_its_largest_size_and_the_next(config: ScalingConfig) -> None:
    ladder = Ladder(runs(LAW))
    found = find(config, ladder)
    assert found.law is not None
    assert found.held_out is not None
    assert found.held_out.size == "w128"
    assert found.held_out.error < 0.02 < found.held_out.naive_error
    for one in found.predictions:
        assert one.parameters == 24 * 256**2, "once more the ratio of the two largest"
        assert one.low <= LAW.loss(one.parameters, one.tokens) <= one.high
    assert {one.tokens for one in found.predictions} == {2**19, 2**21}
    for one in found.spending:
        assert one.exact.size * one.exact.tokens * 9 == pytest.approx(one.flops, rel=1e-6), "9 N D here, not 6"
        assert one.exact.size < one.by_6nd.size
    table = markdown(config, ladder, found)
    assert "| hold-out: w128 from the smaller sizes | predicted | measured | error |" in table
    assert "| next | 1,572,864 | 2,097,152 |" in table
    assert json.loads(json.dumps(as_json(config, found)))["law"]["alpha"] == found.law.alpha
    assert len(plot(config, ladder, found).axes) == 2


def test_flat_losses_repeated_data_and_diverged_runs_are_said(config: ScalingConfig) -> None:
    repeated = runs(LAW._replace(A=0.0), epochs=6.0)
    diverged = [run.size == "w64" and run.tokens == 2**16 for run in repeated]
    ladder = Ladder(
        [replace(run, loss=math.nan) if gone else run for run, gone in zip(repeated, diverged, strict=True)]
    )
    found = find(config, ladder)
    assert len(ladder.cells()) == 30
    assert found.held_out is not None
    assert found.held_out.rows[0][-1] == ladder.mean("w64", 2**17), "the nearest that has a loss"
    json.dumps(as_json(config, found), allow_nan=False)
    assert any("flat along size" in said for said in found.doubts)
    table = markdown(config, ladder, found)
    assert "2 of 32 runs have no finite loss" in table
    assert "32 runs read the training recordings more than 4 times (up to 6.0)" in table
    assert "See table.md" in plot(config, ladder, found).get_suptitle()


def test_the_best_learning_rate_counts_and_diverged_runs_do_not(config: ScalingConfig) -> None:
    swept = [
        one
        for rate, worse in ((1e-3, 1.2), (2e-3, 1.0), (4e-3, float("nan")))
        for run in runs(LAW)
        for one in [Run(**vars(run) | {"learning_rate": rate, "loss": run.loss * worse})]
    ]
    ladder = Ladder(swept)
    assert {same[0].learning_rate for same in ladder.best.values()} == {2e-3}
    assert len(ladder.cells()) == 32
    assert "32 of 96 runs have no finite loss" in ladder.remarks()[0]
    assert "at the edge of those that did not diverge" in ladder.remarks()[1], "of 0.001 and 0.002"
    found = find(config, ladder)
    table = markdown(config, ladder, found)
    assert "| w16, width 16 |" in table
    assert "diverged" in table
    assert sum(row["used"] == "1" for row in csv.DictReader(as_csv(ladder).splitlines())) == 32
    assert len(plot(config, ladder, found).axes) == 3


def test_a_seed_that_diverges_is_left_out_of_the_mean_and_its_rate_is_not_the_best(config: ScalingConfig) -> None:
    first = [replace(run, learning_rate=4e-3, loss=0.9 * run.loss if run.seed else math.nan) for run in runs(LAW)]
    alone = Ladder(first)
    survivor = next(run.loss for run in first if run.seed == 1)
    assert alone.mean("w16", 2**16) == pytest.approx(survivor)
    assert f"| {survivor:.3f} (1 of 2 seeds) |" in markdown(config, alone, find(config, alone))
    assert len(alone.cells()) == sum(row["used"] == "1" for row in csv.DictReader(as_csv(alone).splitlines())) == 16

    ladder = Ladder([*first, *runs(LAW), *runs(LAW, learning_rate=5e-4, scatter=0.1)])
    assert {same[0].learning_rate for same in ladder.best.values()} <= {1e-3, 5e-4}
    for point, same in ladder.best.items():
        best = rates.best_of(ladder, point)
        assert best is not None
        assert best.rate == pytest.approx(same[0].learning_rate)
    assert f"| {survivor:.3f} (1 of 2 seeds) |" in "\n".join(rates.markdown(ladder))
