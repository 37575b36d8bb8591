"""The bench runs, and what it writes has its structure and units. No time is asserted: those are for people to read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ecgscale.bench.measure import Check, Round, Section, interleaved, one_core, ratios, spread, timed
from ecgscale.cli import main

# webdataset never closes the tars that it opens.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("bench")
    assert main(["bench", "stream", "--quick", "--out", str(out)]) == 0
    return out


def test_report_holds_every_part_with_units_and_finite_positive_numbers(written):
    report = json.loads(next(written.glob("stream-*.json")).read_text())
    titles = " ".join(section["title"] for section in report["sections"])
    parts = ("plain", "compressed", "Threads")
    assert all(part in titles for part in parts)
    for section in report["sections"]:
        assert section["rows"]
        assert {len(row) for row in section["rows"]} == {len(section["header"])}
        assert all(math.isfinite(value) and value > 0 for value in section["scalars"].values())
        assert all(math.isfinite(check["value"]) for check in section["checks"])
        assert set(section["meanings"]) == set(section["scalars"])
        for rounds in section["raw"].values():
            assert all(one["units"] > 0 and one["wall_s"] > 0 for one in rounds)
    assert "CPU µs per record" in report["sections"][0]["header"]
    assert report["machine"]["versions"]["webdataset"]
    assert report["machine"]["cpu"]
    assert report["machine"]["quick"] is True


def test_markdown_says_which_bounds_were_missed_and_that_one_core_was_used(written):
    text = next(written.glob("stream-*.md")).read_text()
    assert "pinned to CPU" in text
    assert "**Measured with --quick, which only shows that a bench runs: these numbers are worth nothing.**" in text
    assert text.count("**reached**") + text.count("**MISSED**") == 4
    assert all(reader in text for reader in ("bare loop", "ecgscale, whole records", "webdataset: "))


def test_scalars_have_stable_names(written):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(written / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    for payload in ("plain", "compressed"):
        assert f"bench/stream/{payload}/ratio/stream_over_webdataset" in tags
        assert f"bench/stream/{payload}/ecgscale/records_per_s" in tags


def test_given_recordings_are_read_in_both_payloads(tmp_path):
    from ecgscale.bench.sets import make_sets

    given = tmp_path / "given"
    options = {"--patients": "10", "--rate-hz": "100", "--duration-s": "10", "--workers": "1"}
    assert main(["simulate", str(given), *(word for option in options.items() for word in option)]) == 0
    sets = make_sets([str(given)], tmp_path, 10, workers=1)
    plain, compressed = sets.open("npy"), sets.open("pco")
    assert (sets.records, sets.rate_hz, sets.samples) == (10, 100.0, 1000)
    assert all((plain.signal(n) == compressed.signal(n)).all() for n in range(10))
    assert make_sets([str(given)], tmp_path, 10, workers=1) == sets


def test_unknown_part_and_missing_set_are_one_line(tmp_path, capsys):
    assert main(["bench", "nothing"]) == 2
    assert main(["bench", "stream", "--quick", "--out", str(tmp_path), "--shards", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_rounds_are_interleaved_and_the_first_is_thrown_away():
    seen: list[str] = []

    def candidate(name: str) -> Round:
        seen.append(name)
        return Round(len(seen), 1.0, 0.5)

    done = interleaved({name: lambda name=name: candidate(name) for name in "ab"}, 2, "test")
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert [one.units for one in done["a"]] == [4, 5]
    assert ratios(done["b"], done["a"]).median == pytest.approx((3 / 4 + 6 / 5) / 2)
    assert ratios(done["b"], done["a"], cpu=True).median == pytest.approx((3 / 4 + 6 / 5) / 2)


def test_timing_counts_units_and_one_core_is_given_back():
    import os

    before = os.sched_getaffinity(0)
    with one_core() as core:
        assert os.sched_getaffinity(0) == {core}
        assert timed(lambda: 3, 0.0).units == 3
    assert os.sched_getaffinity(0) == before
    assert spread([1, 2, 3, 4, 5]) == (3, 2, 4)


def test_checks_say_on_which_side_they_must_be():
    checks = [Check("up", 2, 1), Check("down", 2, 1, at_least=False)]
    text = Section("Title", ("what", "value"), [("row", "1")], checks=checks).markdown()
    assert "up: 2, must be ≥ 1: **reached**" in text
    assert "down: 2, must be ≤ 1: **MISSED**" in text
