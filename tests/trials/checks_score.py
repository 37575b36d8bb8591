"""What is left out of a score: cases code15-negatives, single-label-dropped and short-only."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from case_check import Said, case, ecgscale

from ecgscale.data.shard_set import ShardSet
from ecgscale.export import Profile, about_model, write_export
from ecgscale.model.encoder import ECGEncoder, ModelConfig

_ARGUMENTS = re.compile(r"ecgscale ingest \. OUT ?(.*?); ecgscale finetune (.*?)`")


def _as_told(folder: Path, scratch: Path) -> tuple[ShardSet, Said, Path]:
    """Runs what the README says with a small model of random weights; the set, the fine-tuning and its run folder."""
    told = _ARGUMENTS.search((folder / "README.md").read_text())
    assert told, "the README names no ingest with a finetune behind it"
    out, run, model = scratch / "out", scratch / "run", scratch / "model"
    ingested = ecgscale("ingest", folder, out, *_placed(told[1], {"labels.csv": folder / "labels.csv"}))
    assert ingested.code == 0, ingested.text
    shards = ShardSet.open(out)
    shape = {"stem_channels": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
    config = ModelConfig(preset="tiny", position_kernel=16, position_groups=4, **shape)
    torch.manual_seed(0)
    weights = {f"encoder.{name}": tensor for name, tensor in ECGEncoder(config).state_dict().items()}
    write_export(model, weights, about_model(config, Profile(shards.rate_hz, 5.0, "mv")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = ecgscale("finetune", *_placed(told[2], {"MODEL": model, "OUT": out, "RUN": run}))
    return shards, tuned, run


def _placed(arguments: str, places: dict[str, Path]) -> list[str]:
    return [str(places.get(argument, argument)) for argument in arguments.split()]


def _coverage(run: Path) -> dict:
    coverage: dict = json.loads((run / "evaluation-test.json").read_text())["coverage"]
    assert coverage["asked_for"] == coverage["used"] + sum(coverage["left_out"].values())
    return coverage


@case("code15-negatives")
def negatives(folder: Path, scratch: Path) -> str:
    shards, tuned, run = _as_told(folder, scratch)
    assert tuned.code == 0, tuned.text
    with (folder / "exams.csv").open() as file:
        exams = list(csv.DictReader(file))
    flags = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")
    none = sum(all(exam[flag] == "False" for flag in flags) for exam in exams)
    said = [shards.metadata(number)["labels"] for number in range(len(shards))]
    assert len(said) == len(exams)
    assert sum(labels.get("abnormality") == [] for labels in said) == none
    coverage = _coverage(run)
    assert coverage["used"] == coverage["asked_for"] == shards.count("test")
    assert coverage["negative"] > 0
    return (
        f"{none} of {len(exams)} exams are negatives; test: {coverage['used']} scored, {coverage['negative']} negative"
    )


@case("single-label-dropped")
def single_label(folder: Path, scratch: Path) -> str:
    shards, tuned, run = _as_told(folder, scratch)
    assert tuned.code == 0, tuned.text
    values = [
        tuple(shards.metadata(number)["labels"].get("rhythm", ())) for number in shards.select("test").tolist()
    ]  # of each test recording
    scored = set(json.loads((run / "export" / "config.json").read_text())["classes"])
    expected = Counter(min(len(scored & set(value)), 2) for value in values if value)
    coverage = _coverage(run)
    assert coverage["left_out"]["no_label"] == values.count(())
    assert coverage["left_out"]["no_class"] == expected[0]
    assert coverage["left_out"]["several_classes"] == expected[2]
    assert coverage["left_out"]["too_short"] == 0
    assert coverage["used"] == expected[1]
    line = next(line for line in tuned.out.splitlines() if line.startswith("test: "))
    for count, words in (
        (expected[2], "with two or more of the classes"),
        (expected[0], "with none of the classes"),
        (values.count(()), "without the label"),
        (0, "shorter than"),
    ):
        assert f"{count} {words}" in line, line
    return line


@case("short-only")
def short_only(folder: Path, scratch: Path) -> str:
    shards, tuned, _ = _as_told(folder, scratch)
    assert tuned.code == 2, tuned.text
    assert tuned.err.count("\n") == 1, tuned.err
    assert f"{shards.count('train')} are shorter than data.min_record_s 10 s, the longest of them has 3 s" in tuned.err
    return tuned.err.strip()
