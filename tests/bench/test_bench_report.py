"""`ecgscale bench report`: tables, plots and hparams of results, commits compared, machines kept apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ecgscale.bench.measure import Check, Meaning, Report, Section, Spread, machine, reporting
from ecgscale.bench.results import read_runs
from ecgscale.cli import main
from ecgscale.errors import InputError

OLD, NEW = "a" * 40, "b" * 40
LABEL = "base/conv/b8/fp32/zero1/r1"


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Writes one result as benches do; returns its folder."""

    def make(commit: str, per_s: float, hour: int, folder: str = "results", name: str = "step", **about) -> Path:
        section = Section("base", ("way", "ECG/s"), [("ecgscale", f"{per_s}")])
        for way, rate in (("ecgscale", per_s), ("straightforward", 1.0)):
            section.settings[f"{LABEL}/{way}"] = {"preset": "base", "batch": 8, "ranks": 1, "way": way}
            ours = way == "ecgscale"
            rates = Meaning("recordings/s", "higher", ours, LABEL)
            section.scalar(f"{LABEL}/{way}/ecg_per_s", Spread(rate, 0.99 * rate, 1.01 * rate), rates)
            section.scalar(f"{LABEL}/{way}/peak_gb", 2.0, Meaning("GB", "lower", ours, LABEL))
        if name == "scaling":
            section.scalar(f"{LABEL}/ecgscale/efficiency", Spread(1.0, 1.0, 1.0), Meaning("share", "higher"))
        section.checks = [Check("times as fast", per_s, 9.0)]
        known = machine() | {"commit": commit, "date": f"2026-11-23T{hour:02}:00:00+00:00", "cpu": "a CPU"} | about
        Report(name, "A step", known, [section]).write(tmp_path / folder)
        return tmp_path / folder

    return make


def report(*arguments: object) -> int:
    try:
        return main(["bench", "report", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)


def test_runs_become_one_table_a_plot_and_hparams(write, capsys):
    write(OLD, 10, hour=1)
    folder = write(NEW, 12, hour=2)
    write(NEW, 1.0, hour=3, name="scaling")
    assert report(folder) == 0
    text = capsys.readouterr().out
    assert text.strip() == (folder / "report" / "report.md").read_text().strip()
    assert f"| {LABEL}/ecgscale | aaaaaaaaa | 10 (9.9 – 10.1) | 2 |" in text
    assert f"| {LABEL}/ecgscale | bbbbbbbbb | 12 (11.88 – 12.12) | 2 |" in text
    for name in ("step.png", "scaling.png"):
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "- base, bbbbbbbbb: times as fast: 12, must be ≥ 9: **reached**" in text
    assert "machines" not in text


def test_a_full_disk_names_the_plot_and_leaves_the_old_one(write, full_disk, capsys):
    folder = write(OLD, 2.0, 7)
    assert report(folder) == 0
    plot = folder / "report" / "step.png"
    before = plot.read_bytes()
    write(NEW, 3.0, 8)
    capsys.readouterr()
    with full_disk(len(before) // 2):
        assert report(folder) == 1
    assert capsys.readouterr().err == f"ecgscale: {plot}: cannot write: File too large\n"
    assert plot.read_bytes() == before
    assert [path.name for path in plot.parent.glob("*.png*")] == ["step.png"]


def test_hparams_hold_settings_and_numbers_and_are_written_once(write, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = write(OLD, 10, hour=1)
    report(folder)
    report(folder)
    (stem,) = [path.stem for path in folder.glob("*.json")]
    place = folder / "report" / "tensorboard" / stem / LABEL / "ecgscale"
    assert len(list(place.iterdir())) == 1
    board = EventAccumulator(str(place))
    board.Reload()
    assert board.Scalars("ecg_per_s")[0].value == 10
    started = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(started).session_start_info.hparams
    assert hparams["batch"].number_value == 8
    assert hparams["commit"].string_value == "a" * 9
    capsys.readouterr()


def test_a_later_run_of_a_commit_replaces_an_earlier_one(write, capsys):
    write(OLD, 10, hour=2)
    folder = write(OLD, 8, hour=1)
    assert report(folder) == 0
    text = capsys.readouterr().out
    assert "| 10 (" in text
    assert "| 8 (" not in text


@pytest.mark.parametrize("mark", [{"quick": True}, {"command": "ecgscale bench step --quick --preset tiny"}])
def test_quick_runs_are_marked_and_replace_nothing_and_are_not_compared(write, capsys, refusal, mark):
    write(OLD, 10, hour=1)
    folder = write(OLD, 8, hour=2, **mark)
    write(NEW, 2, hour=3, **mark)
    assert report(folder) == 0
    text = capsys.readouterr().out
    assert f"| {LABEL}/ecgscale | aaaaaaaaa | 10 (" in text
    assert f"| {LABEL}/ecgscale | aaaaaaaaa (quick) | 8 (" in text
    assert "(quick): Measured with --quick, which only shows that a bench runs" in text
    assert "--quick only shows that a bench runs" in refusal("bench", "report", folder, "--against", OLD)
    write(NEW, 9.9, hour=4)
    assert report(folder, "--against", OLD) == 0, "the quick run of the newer commit does not count"
    capsys.readouterr()


def test_what_became_slower_than_a_commit_is_named(write, capsys):
    write(OLD, 10, hour=1)
    folder = write(NEW, 9.4, hour=2)
    assert report(folder, "--against", OLD[:6], "--threshold", "5%") == 1
    out, err = capsys.readouterr()
    assert f"- **step/{LABEL}/ecgscale/ecg_per_s: 10 (9.9 – 10.1) at aaaaaaaaa, 9.4 (" in out
    assert "worse by 6.0%**" in out
    assert "Of 2 numbers 1 are worse by more than 5.0%:" in out  # the baseline's own are not compared
    assert "1 numbers are worse than at aaaaaa" in err
    assert report(folder, "--against", OLD[:6], "--threshold", "7%") == 0
    assert report(folder, "--against", NEW) == 0  # the other way round it became faster
    assert "none worse" in capsys.readouterr().out


def test_what_is_no_longer_measured_is_named(write, capsys):
    write(OLD, 10, hour=1)
    folder = write(NEW, 10, hour=2)
    (path,) = [path for path in folder.glob("step*.json") if NEW in path.read_text()]
    result = json.loads(path.read_text())
    del result["sections"][0]["scalars"][f"{LABEL}/ecgscale/ecg_per_s"]
    path.write_text(json.dumps(result))
    write(OLD, 10, hour=3, name="stream")
    assert report(folder, "--against", OLD) == 1
    said = f"- **step/{LABEL}/ecgscale/ecg_per_s: 10 (9.9 – 10.1) at aaaaaaaaa, no longer measured at bbbbbbbbb**"
    out = capsys.readouterr().out
    assert said in out
    assert "Of 2 numbers 0 are worse by more than 5.0%, 1 are no longer measured:" in out, "the stream's not run again"


def test_a_commit_at_which_only_the_baselines_ran_is_no_way_round(write, capsys):
    write(OLD, 10, hour=1)
    folder = write(NEW, 10, hour=2)
    last = write("c" * 40, 10, hour=3, folder="last")
    (path,) = last.glob("*.json")
    result = json.loads(path.read_text())
    scalars = result["sections"][0]["scalars"]
    result["sections"][0]["scalars"] = {name: value for name, value in scalars.items() if "ecgscale" not in name}
    path.write_text(json.dumps(result))
    assert report(folder, last, "--against", OLD) == 1
    assert "Of 2 numbers 0 are worse by more than 5.0%, 2 are no longer measured:" in capsys.readouterr().out
    whole = write("c" * 40, 10, hour=2, folder="last")  # the same commit, before
    assert report(folder, whole, "--against", OLD) == 1, "what was measured again without ecgscale is gone"


def test_only_the_newest_of_the_other_commits_is_compared(write, capsys):
    """What only a commit before the given one has says nothing of what came after it."""
    write("c" * 40, 5, hour=1, name="stream")
    write(OLD, 10, hour=2, name="stream")
    write(OLD, 10, hour=2)
    folder = write(NEW, 10, hour=3)
    assert report(folder, "--against", OLD) == 0
    assert "2 numbers compared, none worse" in capsys.readouterr().out


def test_a_run_that_measured_nothing_is_not_the_newest_commit(write, tmp_path, capsys, refusal):
    """Such results lie about from before they were no longer written."""
    write(OLD, 100, hour=1)
    folder = write(NEW, 50, hour=2)
    known = machine() | {"commit": "c" * 40, "date": "2026-11-23T03:00:00+00:00", "cpu": "a CPU"}
    device = Section("The device", ("what",), [("copy",)], scalars={"device/copy_gb_per_s": 9.0})
    Report("step", "A step", known, []).write(folder)
    Report("kernel", "Kernels", known, [device]).write(folder)
    assert report(folder, "--against", OLD) == 1
    assert "100 (99 – 101) at aaaaaaaaa, 50 (49.5 – 50.5) at bbbbbbbbb, worse by 50.0%" in capsys.readouterr().out
    alone = tmp_path / "alone"
    Report("step", "A step", known, []).write(alone)
    said = refusal("bench", "report", folder, alone, "--against", alone)
    assert "nothing to compare: ccccccccc and ccccccccc have no bench of ecgscale in common" in said


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (1.9, True)])
def test_a_machine_at_work_is_warned_of(tmp_path, capsys, monkeypatch, load, warned):
    known = machine() | {"load": [load, 0.0, 0.0], "cores": 2}
    monkeypatch.setattr("ecgscale.bench.measure.machine", lambda: known)
    with reporting("step", "A step", tmp_path) as found:
        found.sections.append(Section("one", ("way", "s"), [("ecgscale", "1")], scalars={"s": 1.0}))
    assert ("the load of this machine was 1.9 when this began (2 cores)" in capsys.readouterr().err) == warned


def test_what_was_measured_before_an_error_is_written_and_nothing_else(tmp_path):
    measured = Section("one", ("way", "s"), [("ecgscale", "1")], scalars={"s": 1.0})
    failed = Section("two", ("way", "s", "peak"), [("ecgscale", "out of memory", "")])

    def run(sections: list[Section], folder: Path, error: BaseException | None = None) -> int:
        """How many results there are then."""
        with reporting("step", "A step", folder) as found:
            found.sections += sections
            if error:
                raise error
        return len(list(folder.glob("*.json")))

    for sections, files in ([], 0), ([failed], 0), ([failed, measured], 1):
        with pytest.raises(KeyboardInterrupt):
            run(sections, tmp_path, KeyboardInterrupt())
        assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.md"))) == files
    assert run([failed, measured], tmp_path / "whole") == 1
    with pytest.raises(InputError, match=r"^bench step: out of memory$"):
        run([failed, failed], tmp_path / "failed")
    assert not list((tmp_path / "failed").iterdir())


def test_a_plot_that_is_cut_says_so(write, capsys, monkeypatch):
    monkeypatch.setattr("ecgscale.bench.report._MOST_BARS", 1)
    assert report(write(OLD, 10, hour=1)) == 0
    assert "The plot shows the first 1 of 2 rows." in capsys.readouterr().out


def test_overlapping_quartiles_are_said(write, capsys):
    write(OLD, 10, hour=1)
    folder = write(NEW, 9.85, hour=2)
    assert report(folder, "--against", OLD, "--threshold", "0.01") == 1
    assert "worse by 1.5%; the quartiles overlap" in capsys.readouterr().out


def test_folders_are_compared(write, capsys):
    before, after = write(OLD, 10, hour=1, folder="before"), write(OLD, 5, hour=2, folder="after")
    assert report(after, "--against", before) == 1
    assert "worse by 50.0%" in capsys.readouterr().out


def test_machines_stand_apart_and_are_not_compared(write, capsys, refusal):
    write(OLD, 10, hour=1, cpu="another CPU")
    folder = write(NEW, 1, hour=2)
    assert report(folder) == 0
    out, err = capsys.readouterr()
    assert "results of 2 machines" in out
    assert "results of 2 machines" in err
    assert out.index("## another CPU") < out.index("## a CPU")
    assert {path.name for path in (folder / "report").glob("*.png")} == {"step-1.png", "step-2.png"}
    code = report(folder, "--against", OLD)
    assert code == 2
    assert "nothing to compare: aaaaaaaaa was measured on another CPU" in capsys.readouterr().err


def test_what_cannot_be_reported_is_one_line(write, tmp_path, refusal):
    folder = write(OLD, 10, hour=1)
    assert "no such folder" in refusal("bench", "report", tmp_path / "none")
    assert "no results" in refusal("bench", "report", tmp_path)
    assert "neither a folder nor a commit" in refusal("bench", "report", folder, "--against", "ccc")
    assert "all results are of it" in refusal("bench", "report", folder, "--against", OLD)
    assert "no share such as 5%" in refusal("bench", "report", folder, "--threshold", "5x")
    (path,) = folder.glob("*.json")
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:-40])
    assert "damaged, not JSON" in refusal("bench", "report", folder)
    path.write_text('{"minutes": 1,' + json.dumps(whole)[1:-1] + ', "minutes": 2}')
    assert "the key 'minutes' stands twice; remove it" in refusal("bench", "report", folder)
    path.write_text(json.dumps(whole | {"minutes": float("nan")}))
    assert "damaged, not JSON: NaN is no number of JSON; remove it" in refusal("bench", "report", folder)
    without_versions = {name: value for name, value in whole["machine"].items() if name != "versions"}
    wrong_check = [whole["sections"][0] | {"checks": [{"what": "times as fast"}]}]
    wrong_scalar, wrong_spread = (
        [whole["sections"][0] | {what: {f"{LABEL}/ecgscale/ecg_per_s": value}}]
        for what, value in (("scalars", "fast"), ("spreads", [1.0]))
    )
    for damage in (
        {"machine": {}},
        {"machine": without_versions},
        *({"sections": sections} for sections in (wrong_check, wrong_scalar, wrong_spread)),
    ):
        path.write_text(json.dumps(whole | damage))
        assert "a damaged result" in refusal("bench", "report", folder)
    path.write_text("[]")
    assert "no result of a bench" in refusal("bench", "report", path)


def test_results_of_every_bench_are_read(write, capsys):
    folder = write(OLD, 10, hour=1)
    write(OLD, 10, hour=2, name="stream")
    (folder / "other.json").write_text('{"hello": 1}')
    assert [run.name for run in read_runs([folder, folder])] == ["step", "stream"]
    assert f"{folder / 'other.json'} is no result of a bench and left out" in capsys.readouterr().err


def test_results_that_say_what_nothing_means_are_shown_and_not_compared(write, capsys, refusal):
    """As earlier versions wrote them."""
    write(OLD, 10, hour=1)
    folder = write(NEW, 5, hour=2)
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        del result["sections"][0]["meanings"]
        path.write_text(json.dumps(result))
    assert report(folder) == 0
    assert "5 (4.95 – 5.05)" in capsys.readouterr().out
    assert "nothing to compare" in refusal("bench", "report", folder, "--against", OLD)


def test_a_lower_number_is_worse_only_where_its_meaning_says_so(write, capsys):
    write(OLD, 10, hour=1)
    folder = write(NEW, 10, hour=2)
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        section = result["sections"][0]
        if result["machine"]["commit"] == NEW:
            section["scalars"][f"{LABEL}/ecgscale/peak_gb"] = 3.0
            section["scalars"][f"{LABEL}/ecgscale/ecg_per_s"] = 5.0
            section["spreads"][f"{LABEL}/ecgscale/ecg_per_s"] = [5.0, 5.0]
        section["meanings"][f"{LABEL}/ecgscale/ecg_per_s"]["better"] = ""
        path.write_text(json.dumps(result))
    assert report(folder, "--against", OLD) == 1
    out = capsys.readouterr().out
    assert "ecgscale/peak_gb: 2 at aaaaaaaaa, 3 at bbbbbbbbb, worse by 50.0%" in out
    assert "Of 1 numbers 1 are worse" in out
