"""Nothing leaves a score without being counted: every reason, in reports, JSON and refusals."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.selection import DataConfig
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream import build_task, task_config
from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.labelled import LabelledSet
from ecgscale.inference import load, recordings_of
from ecgscale.lead_names import LEADS
from ecgscale.record import Record
from ecgscale_launch.sweep_table import figures

RATE_HZ = 500.0
WHOLE = round(10 * RATE_HZ)


@dataclass(frozen=True)
class Row:
    """A recording of a made-up set."""

    split: str
    labels: dict[str, list[str]]
    samples: int = WHOLE
    leads: tuple[str, ...] = LEADS
    patient: str | None = None
    session: str = ""


@dataclass(frozen=True)
class MadeUp:
    """Noise, slow for one class and fast for the others."""

    rows: tuple[Row, ...]
    dataset: str = "made-up"

    def items(self) -> list[str]:
        return [f"r{i:03d}" for i in range(len(self.rows))]

    def read(self, item: str) -> Record:
        number = int(item[1:])
        row, rng = self.rows[number], np.random.default_rng(number)
        signal_LT = rng.normal(0, 300, (len(row.leads), row.samples))
        if row.labels.get("rhythm", [])[:1] == ["slow"]:
            signal_LT = np.cumsum(signal_LT, axis=1) / 10
        metadata = {"split": row.split} | ({"session": row.session} if row.session else {})
        counts_LT, scale_L = signal_LT.astype(np.int16), np.full(len(row.leads), 1e-3, np.float32)
        return Record(item, counts_LT, scale_L, RATE_HZ, row.leads, row.patient, row.labels, metadata)


def write(rows: list[Row], out: Path, rate_hz: float = RATE_HZ) -> Path:
    options = IngestOptions(
        rate_hz=rate_hz, records_per_shard=7, validation_fraction=0, split_by="split", test_values=("test",),
        validation_values=tuple({row.split for row in rows} & {"validation"}),
    )  # fmt: skip
    ingest(MadeUp(tuple(rows)), out, options)
    return out


def labels(*names: str) -> dict[str, list[str]]:
    return {"rhythm": list(names)}


PLAIN = [Row(split, labels(name)) for split in SPLITS for name in ("slow", "fast") * 4]
TEST = [
    *(Row("test", labels("slow", "fast")) for _ in range(3)),
    *(Row("test", labels("rare")) for _ in range(2)),
    Row("test", labels()),
    *(Row("test", {"site": ["a"]}) for _ in range(4)),
    Row("test", labels("slow"), WHOLE - 1),  # as resampling may leave it
    Row("test", labels("fast"), 1000),
    Row("test", labels("fast"), 10),  # shorter than a token
    Row("test", labels("fast"), leads=("I", "II")),
    Row("train", labels("rare"), 2000),
]


def run(*arguments: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deepspeed, in this process
        assert main([str(argument) for argument in arguments]) == 0


RHYTHM = ("--task.label=rhythm", "--task.min_positives=2")


def tuned(export: Path, shards: Path, folder: Path, *more: str, task: tuple[str, ...] = RHYTHM) -> tuple[str, ...]:
    """A small fine-tuning, by the label rhythm."""
    places = ("--init", str(export), f"--data.shards={shards}", f"--run.dir={folder}")
    return ("finetune", *places, *task, "--train.steps=2", "--train.global_batch=8", *more)


@pytest.mark.parametrize("protocol", ["probe", "finetune", "neighbours"])
def test_single_label_reports_say_what_was_left_out(protocol, small_export, tmp_path, capsys) -> None:
    shards = write([*PLAIN, *TEST], tmp_path / "set")
    folder = tmp_path / "run"
    run(*tuned(small_export, shards, folder, "--task.kind=singlelabel", f"--task.protocol={protocol}"))
    out, err = capsys.readouterr()
    said = (
        "test: 11 of 22 recordings scored; left out: 4 without the label, 3 with none of the classes, "
        "3 with two or more of the classes, 1 shorter than 0.032 s; of the scored: "
    )
    assert said in out
    assert "2 shorter than 10 s (data.min_record_s), padded, 1 with fewer than the 12 leads" in out
    assert "classes that are not the task's: rare (2)" in out
    assert "train: 8 of 9 recordings used; left out: 0 without the label, 1 with none of the classes" in err
    report = json.loads((folder / "evaluation-test.json").read_text())
    covered = report["coverage"]
    assert covered["left_out"] == {"no_label": 4, "no_class": 3, "several_classes": 3, "no_lead": 0, "too_short": 1}
    assert covered["used"] == report["records"] == 11
    assert covered["asked_for"] == 22 == covered["used"] + sum(covered["left_out"].values())
    assert report["fine_tuned_on"]["train"]["other_classes"] == {"rare": 1}
    run("evaluate", folder, f"--data.shards={shards}", "--min-record-s=10", "--out", tmp_path / "long.json")
    long = json.loads((tmp_path / "long.json").read_text())["coverage"]
    assert long["left_out"]["too_short"] == 3
    assert long["used"] == 9
    assert "3 shorter than 10 s" in capsys.readouterr().out


def test_many_labels_count_negatives_and_leads(small_export, tmp_path, capsys) -> None:
    shards = write([*PLAIN, *TEST], tmp_path / "set")
    run(*tuned(small_export, shards, tmp_path / "run", "--task.protocol=probe"))
    covered = json.loads((tmp_path / "run" / "evaluation-test.json").read_text())["coverage"]
    assert covered["left_out"] == {"no_label": 4, "no_lead": 0, "too_short": 1}
    assert covered["negative"] == 3, "two of a rare class, and one of none"
    assert "3 with none of the classes, as negatives" in capsys.readouterr().out
    # One recording has none of these leads; the others are scored with them.
    run("evaluate", tmp_path / "run", f"--data.shards={shards}", "--leads", "12", "V1,V2", "--out", tmp_path / "l.json")
    twelve, two = json.loads((tmp_path / "l.json").read_text())["lead_sets"]
    assert [one["coverage"]["left_out"]["no_lead"] for one in (twelve, two)] == [0, 1]
    assert two["records"] == twelve["records"] - 1
    out = capsys.readouterr().out
    assert "leads 12: test: 17 of 22 recordings scored" in out
    assert "leads V1,V2: test: 16 of 22 recordings scored" in out


def test_what_a_recording_lacks_is_padded_and_does_not_depend_on_the_others(make_model, tmp_path) -> None:
    shards = write([*PLAIN, *TEST], tmp_path / "set")
    model = make_model()
    task = build_task(task_config(label="rhythm", min_positives=2))
    labelled = LabelledSet.open(model, DataConfig([str(shards)]), task, splits=["test"])
    together_RD = model.embed_recordings(labelled.recordings("test")).record_embedding
    alone = [model.embed_recordings([one]).record_embedding[0] for one in recordings_of(labelled.selection("test"))]
    np.testing.assert_allclose(together_RD, alone, atol=1e-5)


def test_persons_with_one_session_and_recordings_without_a_session_count(small_export, tmp_path, capsys) -> None:
    rows = [
        Row(split, {}, patient=f"{split}{p}", session=str(s)) for split in SPLITS for p in range(3) for s in (1, 2, 3)
    ]
    rows += [Row("test", {}, patient="once", session="1"), Row("test", {}, patient="test0")]
    shards = write(rows, tmp_path / "set")
    task = ("--task.kind=identification", "--task.session=session", "--task.protocol=probe", "--task.one_probe=true")
    run(*tuned(small_export, shards, tmp_path / "run", task=task))
    said = (
        "test: 6 of 11 recordings scored; left out: 1 without a session, 0 shorter than 0.032 s, "
        "1 of persons with one session, 3 that are not their person's last (task.one_probe)"
    )
    assert said in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "evaluation-test.json").read_text())
    assert report["coverage"]["left_out"]["one_session"] == 1
    assert figures(tmp_path / "run") == {
        shown: report[name]["value"]
        for name, shown in (("top1", "top-1"), ("top5", "top-5"), ("eer", "equal error rate"))
    }  # what the table of a sweep takes
    assert report["galleries"] + report["probes"] == report["coverage"]["used"] == 6


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["multilabel", "singlelabel"])
def test_each_recording_is_used_or_left_out_for_one_reason(kind, fraction, make_model, tmp_path) -> None:
    rng = np.random.default_rng(3)
    names = ["slow", "fast", "rare"]
    rows = PLAIN + [
        Row(
            str(rng.choice(SPLITS)),
            labels(*rng.choice(names, rng.integers(3), replace=False)) if rng.random() < 0.8 else {},
            int(rng.choice([10, 800, WHOLE - 1, WHOLE])),
            LEADS[: int(rng.integers(1, 13))],
        )
        for _ in range(60)
    ]
    shards = ShardSet.open(write(rows, tmp_path / "set"))
    task = build_task(task_config(kind, label="rhythm", classes=["slow", "fast"], label_fraction=fraction))
    data = DataConfig([shards.sets[0].place], leads=["V1"])
    labelled = LabelledSet.open(make_model(), data, task, training=True)
    for split in SPLITS:
        covered = labelled.coverage(split)
        assert covered.used == len(labelled.selection(split)) > 0
        assert covered.asked_for == shards.count(split) == covered.used + sum(covered.left_out.values())
        assert (covered.left_out.get("not_drawn", 0) > 0) == (split == "train" and fraction < 1)
        assert Coverage.from_dict(json.loads(json.dumps(covered.to_dict()))) == covered


def test_only_short_recordings_are_refused_by_the_key_that_leaves_them_out(small_export, tmp_path, refusal) -> None:
    shards = write([Row(row.split, row.labels, 1500) for row in PLAIN], tmp_path / "set")
    said = (
        "set: none of the 8 training recordings can be used: 8 are shorter than data.min_record_s 10 s, the longest of"
    )
    assert said in refusal(*tuned(small_export, shards, tmp_path / "run", "--task.protocol=probe"))
    assert said in refusal("pretrain", "--model.preset=tiny", f"--data.shards={shards}", f"--run.dir={tmp_path / 'p'}")
    said = (
        "none of the 8 validation recordings can be used: 8 are shorter than task.min_scored_s 5 s, the longest of them"
    )
    options = ["--data.min_record_s=3", "--task.min_scored_s=5", "--task.protocol=probe"]
    assert said in refusal(*tuned(small_export, shards, tmp_path / "run", *options))


def test_too_few_long_recordings_for_a_batch_are_told_with_the_short_ones(small_export, tmp_path, refusal) -> None:
    rows = [Row(row.split, row.labels, 1500 if i % 4 > 1 else WHOLE) for i, row in enumerate(PLAIN)]
    shards = write(rows, tmp_path / "set")
    said = "train.global_batch 8 is more than the 4 usable recordings; 4 more are shorter than data.min_record_s 10 s"
    assert said in refusal(*tuned(small_export, shards, tmp_path / "run"))


@pytest.mark.parametrize("rate_hz", [500.0, 250.0])
def test_a_data_set_is_embedded_with_names_and_splits(rate_hz, small_export, tmp_path, capsys, refusal) -> None:
    write(PLAIN + TEST, tmp_path / "set", rate_hz)
    run("embed", small_export, tmp_path / "set", tmp_path / "out.npz", "--tokens")
    assert "38 recordings, width 32, 1 could not be read or are too short (first: r036: " in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as arrays:
        assert sorted(arrays["name"]) == sorted(f"r{i:03d}" for i in range(39) if i != 36)
        assert len(arrays["tokens"]) == len(arrays["record_embedding"]) == 38
        rows = PLAIN + TEST
        assert all(
            rows[int(name[1:])].split == split for name, split in zip(arrays["name"], arrays["split"], strict=True)
        )
        name_R, embedding_RD = arrays["name"].tolist(), arrays["record_embedding"]
    model, shards = load(small_export), ShardSet.open(tmp_path / "set")
    names = [shards.record(number).name for number in range(len(shards))]
    for name in ("r003", "r035"):
        record = shards.record(names.index(name))
        expected = model.embed(record.millivolts(), record.rate_hz, record.leads).record_embedding[0]
        np.testing.assert_allclose(embedding_RD[name_R.index(name)], expected, atol=1e-3)
    for given in (("--rate-hz", 500), ("--leads", "I"), ("--ignore-leads", "V1"), ("--rename-leads", "D1=I")):
        said = refusal("embed", small_export, tmp_path / "set", tmp_path / "o.npz", *given)
        assert f"{given[0]} goes with " in said
        assert "not with a data set; leave it out" in said
    write([Row(split, {}, 10) for split in ("train", "test")], tmp_path / "short")
    assert "none of the 2 records can be embedded" in refusal(
        "embed", small_export, tmp_path / "short", tmp_path / "o.npz"
    )
