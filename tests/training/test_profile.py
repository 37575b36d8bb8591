"""Profiles of chosen steps: what is written, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError
from ecgscale.training.profile import steps_to_profile
from small_jobs import SMALL, losses


@pytest.fixture(scope="module")
def runs(shards, jobs, tmp_path_factory) -> Path:
    """A run that is not profiled, one that is, and one that is when it goes on."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, *more: str) -> list[str]:
        return ["pretrain", *SMALL, f"--data.shards={shards}", f"--run.dir={folder / name}", *more]

    begun = job("resumed", "--train.steps=2", "--train.profile_step=3", "--train.profile_steps=1")
    said = jobs.run(1, job("plain"), job("profiled", "--profile"), begun, job("resumed", "--profile"))
    (folder / "said").write_text(said)
    return folder


def trace(path: Path) -> dict:
    with gzip.open(path) as file:
        return json.load(file)


def steps_in(path: Path) -> set[str]:
    return {event["name"] for event in trace(path)["traceEvents"] if event["name"].startswith("ProfilerStep#")}


def test_trace_holds_the_chosen_steps_with_their_parts(runs) -> None:
    (path,) = (runs / "profiled" / "profile").glob("*.json.gz")
    assert path.name == "rank-0.steps-4-6.pt.trace.json.gz"
    assert steps_in(path) == {"ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"}
    names = [event["name"] for event in trace(path)["traceEvents"]]
    for part in ("loader_wait", "transfer", "forward", "backward", "optimizer"):
        assert names.count(part) == 3
    assert "aten::addmm" in names


def test_ten_costliest_operations_are_printed_and_written(runs) -> None:
    (path,) = (runs / "profiled" / "profile").glob("*.txt")
    table = path.read_text()
    assert table in (runs / "said").read_text()
    head, *lines, rest = table.splitlines()
    assert head.split() == ["operation", "cpu", "ms/step", "share", "calls/step"]
    assert len(lines) == 10
    assert any(line.startswith("aten::") for line in lines)
    own_ms = [float(line.split()[-3]) for line in lines]
    assert own_ms == sorted(own_ms, reverse=True)
    shares = [float(line.split()[-2].rstrip("%")) for line in lines] + [float(rest.split()[-1].rstrip("%"))]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_losses_are_the_same_bits_with_and_without(runs) -> None:
    assert len(losses(runs / "plain")) == 6
    assert losses(runs / "profiled") == losses(runs / "plain")
    assert losses(runs / "resumed") == losses(runs / "plain")
    assert not (runs / "plain" / "profile").exists()


def test_a_run_that_goes_on_can_be_profiled(runs) -> None:
    names = sorted(path.name for path in (runs / "resumed" / "profile").glob("*.json.gz"))
    assert names == ["rank-0.steps-4-6.pt.trace.json.gz"]
    assert "nothing to profile: step 3 is not among those" in (runs / "said").read_text()


@pytest.mark.parametrize(
    ("begun", "steps", "first", "count", "expected"),
    [
        (0, 100, 0, 3, (4, 6)),
        (50, 100, 0, 3, (54, 56)),
        (0, 5, 0, 3, (3, 5)),
        (98, 100, 0, 3, (99, 100)),
        (0, 100, 20, 2, (20, 21)),
        (20, 100, 20, 2, (21, 21)),
        (0, 100, 100, 5, (100, 100)),
    ],
)
def test_steps_that_are_profiled(begun, steps, first, count, expected) -> None:
    assert steps_to_profile(begun, steps, first, count) == expected


@pytest.mark.parametrize("asked", [(0, 100, 5, 0), (30, 100, 5, 3), (0, 10, 11, 3), (10, 10, 0, 3)])
def test_no_steps_to_profile(asked) -> None:
    first, last = steps_to_profile(*asked)
    assert last < first


def test_short_option() -> None:
    assert load(PretrainConfig, ["--profile", "--train.steps", "5"]).train.profile_steps == 3
    assert load(PretrainConfig, ["--profile"]).train.profile_step == 0
    with pytest.raises(InputError, match="profile_steps -1: give 0 or more"):
        load(PretrainConfig, ["--train.profile_steps=-1"])
