"""Fine-tuning, probing and scoring on simulated shards, end to end."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.downstream import build_task, task_config
from ecgscale.downstream.classification import logistic
from ecgscale.downstream.finetune import _supervised
from ecgscale.downstream.task import Labelling
from ecgscale.inference import Neighbours, load
from ecgscale.lead_names import LEAD_SETS, LEADS
from ecgscale.pretrain import _project
from ecgscale.record import Record
from ecgscale.simulate import Simulation
from ecgscale.training.loop import TrainConfig

SHORT = ["--train.steps=6", "--train.global_batch=16", "--engine.learning_rate=1e-3"]
RHYTHM = ["--task.label=rhythm", "--task.kind=singlelabel", "--task.min_positives=2"]
SPLIT = IngestOptions(rate_hz=500, validation_fraction=0.2, test_fraction=0.3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("labelled") / "simulated"
    ingest(Simulation(patients=48), out, SPLIT)
    return out


def run(*arguments: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deepspeed, in this process
        assert main([str(argument) for argument in arguments]) == 0


def finetune(export: Path, shards: Path, folder: Path, *more: str, task: list[str] = RHYTHM) -> dict:
    run("finetune", "--init", export, f"--data.shards={shards}", f"--run.dir={folder}", *SHORT, *task, *more)
    return json.loads((folder / "evaluation-test.json").read_text())


@pytest.mark.parametrize("protocol", ["finetune", "probe", "neighbours"])
def test_single_label(protocol, small_export, shards, tmp_path, capsys) -> None:
    report = finetune(small_export, shards, tmp_path / "run", f"--task.protocol={protocol}")
    assert len(report["classes"]) == 8
    assert report["records"] == sum(row["positives"] for row in report["classes"])
    assert report["macro"]["auroc"]["low"] < report["macro"]["auroc"]["value"] < report["macro"]["auroc"]["high"]
    assert "| macro |" in capsys.readouterr().out
    model = load(tmp_path / "run")
    assert model.head(torch.zeros(1, 32)).shape == (1, 8)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board.Scalars("test/12/auroc/macro")[0].value == pytest.approx(report["macro"]["auroc"]["value"])
    assert board.Images("test/12/roc")
    assert len((next((tmp_path / "run").rglob("metadata.tsv"))).read_text().splitlines()) == report["records"]
    frozen = np.array_equal(load(small_export).encoder.stem.weight_0.detach(), model.encoder.stem.weight_0.detach())
    assert frozen, "neither protocol changes a pretrained stem"


def test_many_labels_then_evaluate_again_and_elsewhere(small_export, shards, tmp_path, capsys) -> None:
    report = finetune(small_export, shards, tmp_path / "run", "--task.label=Dx", "--task.kind=multilabel")
    run("evaluate", tmp_path / "run", f"--data.shards={shards}", "--out", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["macro"] == report["macro"]
    # A set that is all test: thresholds travel with the model, so no validation split is needed.
    ingest(Simulation(patients=16, seed=9), tmp_path / "other", IngestOptions(validation_fraction=0, test_fraction=1))
    run("evaluate", tmp_path / "run", f"--data.shards={tmp_path / 'other'}")
    assert "| macro |" in capsys.readouterr().out
    # Other leads take other thresholds; without recordings to tune them on, they are the model's own, which is said.
    run("evaluate", tmp_path / "run", f"--data.shards={tmp_path / 'other'}", "--leads", "1", "--out", tmp_path / "o")
    assert "thresholds of the fine-tuning, for its own leads" in capsys.readouterr().out
    assert json.loads((tmp_path / "o").read_text())["thresholds"].startswith("of the fine-tuning, for its own leads")
    # Those of the validation split were tuned on it, whichever they are.
    for leads, flattered in (("12", "of the fine-tuning, tuned on its validation split"), ("1", "tuned on these very")):
        given = ["--split", "validation", "--leads", leads, "--out", tmp_path / "v"]
        run("evaluate", tmp_path / "run", f"--data.shards={shards}", *given)
        assert f"thresholds {flattered}" in capsys.readouterr().out
        assert json.loads((tmp_path / "v").read_text())["thresholds"].startswith(flattered)
    # Lead sets beside each other: as trained it is the same as before; the masked leads do not matter.
    run("evaluate", tmp_path / "run", f"--data.shards={shards}", "--leads", "12", "2", "I,V5", "--out", tmp_path / "l")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| leads | AUROC | AUPRC | F1 |"
    assert [line.split(" | ")[0] for line in shown[2:5]] == ["| 12", "| 2", "| I,V5"]
    assert shown[6].startswith(f"test: {report['records']} of {report['records']} recordings scored; left out: 0 ")
    twelve, two, _ = json.loads((tmp_path / "l").read_text())["lead_sets"]
    assert twelve["macro"] == report["macro"]
    assert two["leads"] == ["I", "II"]
    assert two["macro"] != report["macro"]


def test_a_task_that_is_not_whole_is_refused(small_export, shards, without_checksums, tmp_path, capsys) -> None:
    finetune(small_export, shards, tmp_path / "run", "--task.protocol=probe")
    export = without_checksums(tmp_path / "run" / "export")
    whole = json.loads((export / "config.json").read_text())
    without_one = {key: value for key, value in whole.items() if key != "min_record_s"}
    for about in (without_one, whole | {"task": whole["task"] | {"colour": "red"}}):
        (export / "config.json").write_text(json.dumps(about))
        assert main(["evaluate", str(export), f"--data.shards={shards}"]) == 2
        assert f"{export}: does not describe a task of this version" in capsys.readouterr().err


FLAT = {
    "label": "rhythm", "kind": "singlelabel", "session": "", "one_probe": False, "classes": [], "min_positives": 2,
    "min_scored_s": 0.0, "label_fraction": 1.0, "challenge_weights": "", "freeze_stem": True,
    "lead_mask_probability": 0.0, "arcface_scale": 192.0, "arcface_margin": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("protocol", ["probe", "neighbours"])
@pytest.mark.parametrize("kind", ["singlelabel", "multilabel"])
def test_an_export_of_an_earlier_version_is_scored_as_before(
    protocol, kind, small_export, shards, without_checksums, tmp_path
) -> None:
    """It lists the keys of all tasks, and does not say whether classes exclude each other."""
    report = finetune(small_export, shards, tmp_path / "run", f"--task.protocol={protocol}", f"--task.kind={kind}")
    export = without_checksums(tmp_path / "run" / "export")
    about = json.loads((export / "config.json").read_text())
    about.pop("exclusive", None)
    flat = FLAT | {"kind": kind, "protocol": protocol}
    assert about["task"].items() <= flat.items()
    (export / "config.json").write_text(json.dumps(about | {"task": flat}))
    run("evaluate", export, f"--data.shards={shards}", "--out", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["macro"] == report["macro"]


def test_the_preprocessing_is_the_models_which_is_said(small_export, shards, tmp_path, capsys) -> None:
    profile = load(small_export).profile
    asked = ["--task.protocol=probe", "--data.segment_s=1.5", "--data.normalisation=zscore"]
    finetune(small_export, shards, tmp_path / "run", *asked)
    line = f"read as the model takes it: 500 Hz, segments of {profile.segment_s:g} s, {profile.normalisation}"
    assert line in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("protocol", ["finetune", "probe"])
def test_leads_that_are_masked_do_not_matter(protocol, small_export, shards, tmp_path, capsys) -> None:
    """The report is that of recordings which lack them; `evaluate` masks what was masked in training."""

    @dataclass(frozen=True)
    class ThreeLeads(Simulation):
        def read(self, item: str) -> Record:
            record, rows = super().read(item), [0, 1, 7]
            return replace(record, signal_LT=record.signal_LT[rows], scale_L=record.scale_L[rows], leads=LEAD_SETS[3])

    ingest(ThreeLeads(patients=48), tmp_path / "three", SPLIT)
    options = [f"--task.protocol={protocol}", "--task.label_fraction=0.8"]
    expected = finetune(small_export, tmp_path / "three", tmp_path / "expected", *options)
    report = finetune(small_export, shards, tmp_path / "run", *options, "--data.leads=3")
    assert report["macro"] == expected["macro"]
    run("evaluate", tmp_path / "run", f"--data.shards={shards}", "--out", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["macro"] == report["macro"]
    assert main(["evaluate", str(tmp_path / "run"), f"--data.shards={shards}", "--leads", "6"]) == 2
    assert "was fine-tuned without III,aVR,aVL,aVF; give some of I,II,V2" in capsys.readouterr().err
    whole, three = tmp_path / "expected", tmp_path / "three"
    assert main(["evaluate", str(whole), f"--data.shards={three}", "--leads", "6"]) == 2
    assert "leads I,II,III,aVR,aVL,aVF: no test recording has III,aVR,aVL,aVF" in capsys.readouterr().err


def test_a_recording_without_the_kept_leads_is_left_out(small_export, tmp_path) -> None:
    """Its only lead was flat, say. TensorBoard's projector shows the others, named as what they are."""

    @dataclass(frozen=True)
    class OneWithoutI(Simulation):
        def read(self, item: str) -> Record:
            record = super().read(item)
            if item != self.items()[3]:
                return record
            rows = [*range(1, 12)]
            return replace(record, signal_LT=record.signal_LT[rows], scale_L=record.scale_L[rows], leads=LEADS[1:])

    def selected(source: Simulation, name: str) -> Selection:
        out = tmp_path / name
        ingest(source, out, IngestOptions(validation_fraction=0))
        return Selection(ShardSet.open(out), DataConfig(leads=["I"]), "train")

    whole, lacking = selected(Simulation(patients=4), "whole"), selected(OneWithoutI(patients=4), "lacking")
    assert len(whole.with_kept_leads()) == 8
    assert lacking.with_kept_leads().numbers.tolist() == [0, 1, 2, 4, 5, 6, 7]
    shown = []
    for selection, name in ((whole, "all"), (lacking, "some")):
        _project(tmp_path / name, small_export, selection, TrainConfig(projected_recordings=0))
        [named] = (tmp_path / name).rglob("metadata.tsv")
        shown.append(named.read_text().splitlines())
    assert shown[1] == shown[0][:3] + shown[0][4:]


@pytest.mark.parametrize("protocol", ["finetune", "probe"])
def test_identification(protocol, small_export, shards, tmp_path, capsys) -> None:
    task = ["--task.kind=identification", "--task.session=session", f"--task.protocol={protocol}"]
    report = finetune(small_export, shards, tmp_path / "run", "--task.lead_mask_probability=0.5", task=task)
    patients = ShardSet.open([str(shards)])
    tested = Selection(patients, DataConfig(), "test").numbers
    assert report["persons"] == len(np.unique(patients.take("patient", tested)))
    assert report["probes"] == report["galleries"] == report["persons"], "two recordings of each"
    assert 0 <= report["top1"]["low"] <= report["top1"]["value"] <= report["top1"]["high"] <= 1
    run("evaluate", tmp_path / "run", f"--data.shards={shards}", "--leads", "12", "1")
    assert "| leads | top-1 | top-5 | equal error rate |" in capsys.readouterr().out


def test_leads_are_masked_in_training_alone(make_model, make_batch) -> None:
    task = build_task(task_config("multilabel", lead_mask_probability=0.5))
    labelling = Labelling(np.zeros((0, 3), np.float32), np.zeros(0, np.uint8), ())
    objective = _supervised(task, make_model().encoder, labelling, np.array([], np.int64), seed=0)
    batch = make_batch(torch.randn(8, 12, 2500), target_BC=torch.ones(8, 3))
    seen = []
    objective.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].lead_draw))
    objective.train()(batch)
    objective.eval()(batch)
    assert seen[0].keep_BL(12).float().mean() == pytest.approx(0.5, abs=0.2)
    assert seen[1] is None


def test_random_start_ignores_the_pretrained_weights(small_export, shards, tmp_path) -> None:
    weights = [load(small_export).encoder.stem.weight_0.detach()]
    for seed in (11, 12):
        random_start = ["--init.random=true", "--task.protocol=probe", f"--train.seed={seed}"]
        finetune(small_export, shards, tmp_path / str(seed), *random_start)
        weights.append(load(tmp_path / str(seed)).encoder.stem.weight_0.detach())
    assert not any(np.array_equal(a, b) for a, b in combinations(weights, 2))


def test_shards_of_another_rate_are_refused(small_export, tmp_path, capsys) -> None:
    ingest(Simulation(patients=8, rate_hz=250), tmp_path / "slow", IngestOptions(rate_hz=250))
    arguments = ["finetune", "--init", str(small_export), f"--data.shards={tmp_path / 'slow'}", "--run.dir=unused"]
    assert main([*arguments, "--task.label=rhythm"]) == 2
    assert "the model takes 500 Hz, the shards have 250 Hz" in capsys.readouterr().err


@pytest.mark.parametrize("multilabel", [False, True])
def test_neighbours_vote(multilabel) -> None:
    rng = np.random.default_rng(0)
    number_R = rng.integers(3, size=300)
    target_RC = torch.eye(4)[torch.from_numpy(number_R)]  # the last class never occurs
    x_RD = torch.from_numpy((5 * rng.normal(size=(3, 6)))[number_R] + rng.normal(size=(300, 6))).float() + 100
    centre_D = x_RD.mean(dim=0)
    bank_RD = torch.nn.functional.normalize(x_RD - centre_D, dim=1)
    votes = Neighbours(centre_D, bank_RD[:200], target_RC[:200], 10, multilabel)
    logit_RC = votes(x_RD[200:])
    assert (logit_RC.argmax(dim=1).numpy() == number_R[200:]).mean() > 0.95
    share_RC = logit_RC.sigmoid() if multilabel else logit_RC.softmax(dim=1)
    np.testing.assert_allclose(share_RC.sum(dim=1), 1, atol=2e-3)
    nearest = Neighbours(centre_D, bank_RD, target_RC, 1, multilabel)
    assert (nearest(x_RD).argmax(dim=1).numpy() == number_R).all(), "each is its own nearest neighbour"
    assert Neighbours(centre_D, bank_RD[:3], target_RC[:3], 10, multilabel)(x_RD).isfinite().all(), "fewer than k"


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_probe_finds_separable_classes_and_never_an_unseen_one(exclusive, classes) -> None:
    rng = np.random.default_rng(0)
    number_R = rng.integers(classes, size=200)
    target_RC = np.eye(classes + 1, dtype=np.float32)[number_R]  # the last class never occurs
    x_RD = (5 * target_RC[:, :classes] @ rng.normal(size=(classes, 6)) + rng.normal(size=(200, 6))).astype(np.float32)
    weight_CD, bias_C = logistic(x_RD, target_RC, exclusive, 1.0)
    predicted_R = (x_RD @ weight_CD.T + bias_C).argmax(axis=1)
    assert (predicted_R == number_R).mean() > 0.97
