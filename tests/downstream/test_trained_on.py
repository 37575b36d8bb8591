"""A model knows which recordings it has learnt from, and whoever scores it is told."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError
from ecgscale.lead_names import LEAD_SETS
from ecgscale.record import Record
from ecgscale.simulate import Simulation
from ecgscale.trained_on import TrainedOn
from small_jobs import SMALL

PATIENTS = 48
ALL_FOR_TEST = {"validation_fraction": 0.0, "test_fraction": 1.0}
LABEL = ["--task.label=rhythm", "--task.kind=singlelabel", "--task.min_positives=1", "--train.steps=1"]


def write(out: Path, seed: int = 0, **options: object) -> Path:
    split = {"validation_fraction": 0.2, "test_fraction": 0.3} | options
    ingest(Simulation(patients=PATIENTS, records_per_patient=1, seed=seed), out, IngestOptions(**split))
    return out


def run(*arguments: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deepspeed, in this process
        assert main([str(argument) for argument in arguments]) == 0


def evaluated(model: Path, shards: Path, out: Path, *more: str) -> dict:
    run("evaluate", model, f"--data.shards={shards}", "--out", out, *more)
    return json.loads(out.read_text())["trained_on"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, jobs) -> Path:
    """A folder with a set, a pretraining on it, and a fine-tuning and a probe of that. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    shards = write(folder / "set")
    common = [f"--data.shards={shards}", "--train.global_batch=8"]
    jobs.run(1, ["pretrain", *SMALL, *common, f"--run.dir={folder / 'pretrained'}", "--train.steps=1"])
    for protocol in ("finetune", "probe"):
        places = [f"--init.model={folder / 'pretrained'}", f"--run.dir={folder / protocol}"]
        jobs.run(1, ["finetune", *common, *places, *LABEL, f"--task.protocol={protocol}"])
    return folder


@pytest.mark.parametrize("protocol", ["finetune", "probe"])
def test_the_same_recordings_in_a_new_set_are_counted(models, tmp_path, capsys, protocol) -> None:
    trained = ShardSet.open(models / "set").count("train")
    scored = json.loads((models / protocol / "evaluation-test.json").read_text())["trained_on"]
    tested = ShardSet.open(models / "set").count("test")
    assert scored == {"scored": tested, "seen": 0, "pretraining": 0, "fine-tuning": 0, "unknown": None}
    again = write(tmp_path / "again", records_per_shard=5, **ALL_FOR_TEST)
    seen = evaluated(models / protocol, again, tmp_path / "out.json")
    expected = {"scored": PATIENTS, "seen": trained, "pretraining": trained, "fine-tuning": trained, "unknown": None}
    assert seen == expected
    said = capsys.readouterr().out
    assert f"the model was trained on {trained} of them ({trained} in fine-tuning and {trained} in pretraining)" in said
    others = write(tmp_path / "others", seed=7, **ALL_FOR_TEST)
    assert evaluated(models / protocol, others, tmp_path / "out.json")["seen"] == 0
    assert "; the model was trained on none of them" in capsys.readouterr().out


def test_a_model_that_was_only_pretrained_on_them_says_that(models, tmp_path) -> None:
    others = write(tmp_path / "others", seed=7)
    places = [f"--init.model={models / 'pretrained'}", f"--run.dir={tmp_path / 'run'}", f"--data.shards={others}"]
    run("finetune", *places, *LABEL, "--train.global_batch=8")
    again = write(tmp_path / "again", **ALL_FOR_TEST)
    trained = ShardSet.open(models / "set").count("train")
    seen = evaluated(tmp_path / "run", again, tmp_path / "out.json")
    assert (seen["pretraining"], seen["fine-tuning"], seen["seen"]) == (trained, 0, trained)
    places[1] = f"--run.dir={tmp_path / 'random'}"
    run("finetune", *places, *LABEL, "--train.global_batch=8", "--init.random=true")
    seen = evaluated(tmp_path / "random", again, tmp_path / "out.json")
    assert seen == {"scored": PATIENTS, "seen": 0, "fine-tuning": 0, "unknown": None}, "its weights knew nothing"


def test_exports_of_exports_and_of_checkpoints_know_it_too(models, tmp_path) -> None:
    known = TrainedOn.of_model(models / "finetune")
    assert known.complete
    for source in (models / "finetune", models / "finetune" / "export"):
        run("export", source, tmp_path / "out")
        copied = TrainedOn.of_model(tmp_path / "out")
        assert copied.keys.keys() == known.keys.keys() == {"pretraining", "fine-tuning"}
        assert all(np.array_equal(copied.keys[stage], known.keys[stage]) for stage in known.keys)
    checkpoint = max((models / "pretrained" / "checkpoints").iterdir())
    assert TrainedOn.of_model(models / "pretrained").keys.keys() == {"pretraining"}
    assert checkpoint.is_dir()


def test_a_checkpoint_without_an_export_knows_it(models, tmp_path) -> None:
    shards, folder = models / "set", tmp_path / "run"
    run("pretrain", *SMALL, f"--data.shards={shards}", f"--run.dir={folder}", "--train.steps=1")
    for path in (folder / "export").iterdir():
        path.unlink()
    (folder / "export").rmdir()
    known = TrainedOn.of_model(folder)
    selection = Selection(ShardSet.open(shards), DataConfig(), "train")
    assert known.among(selection).seen == len(selection)


def test_what_is_not_known_is_said(models, tmp_path, capsys) -> None:
    run("export", models / "finetune", tmp_path / "older")
    (tmp_path / "older" / "trained_on.keys").unlink()
    seen = evaluated(tmp_path / "older", models / "set", tmp_path / "out.json")
    assert (seen["seen"], seen["unknown"]) == (0, "an earlier version wrote it, or another system trained it")
    assert "whether the model was trained on any of them is not known: an earlier version" in capsys.readouterr().out
    plain = write(tmp_path / "plain", payload="npy", **ALL_FOR_TEST)
    assert (
        evaluated(models / "finetune", plain, tmp_path / "out.json")["unknown"]
        == "recordings are stored as npy and pco"
    )
    places = [f"--init.model={tmp_path / 'older'}", f"--run.dir={tmp_path / 'run'}", f"--data.shards={models / 'set'}"]
    run("finetune", *places, *LABEL, "--train.global_batch=8")
    seen = evaluated(tmp_path / "run", models / "set", tmp_path / "out.json", "--split=train")
    assert seen["seen"] == seen["fine-tuning"] == seen["scored"]
    assert seen["unknown"]
    assert "of others it is not known" in capsys.readouterr().out


def test_the_same_recordings_with_fewer_leads_are_not_said_to_be_new(models, tmp_path, capsys) -> None:
    class ThreeLeads(Simulation):
        def read(self, item: str) -> Record:
            record, rows = super().read(item), [0, 1, 7]
            return replace(record, signal_LT=record.signal_LT[rows], scale_L=record.scale_L[rows], leads=LEAD_SETS[3])

    three = tmp_path / "three"
    ingest(ThreeLeads(patients=PATIENTS, records_per_patient=1), three, IngestOptions(**ALL_FOR_TEST))
    seen = evaluated(models / "finetune", three, tmp_path / "out.json")
    assert (seen["seen"], seen["unknown"]) == (0, "recordings are stored with unequal leads (12 and 3)")
    assert "trained on any of them is not known: recordings are stored with unequal" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["flip", "cut", "text"])
def test_a_damaged_file_is_named(models, tmp_path, harm) -> None:
    run("export", models / "pretrained", tmp_path / "out")
    path = tmp_path / "out" / "trained_on.keys"
    content = path.read_bytes()
    changed = {"flip": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-8], "text": b"[" * 4000}
    path.write_bytes(changed[harm])
    with pytest.raises(InputError, match=r"trained_on.keys: damaged .*; copy or export the model again"):
        TrainedOn.of_model(tmp_path / "out")


def test_a_run_that_goes_on_keeps_what_it_wrote(models, tmp_path) -> None:
    init, folder = tmp_path / "init", tmp_path / "run"
    run("export", models / "pretrained", init)
    command = ["pretrain", *SMALL, f"--data.shards={models / 'set'}", f"--run.dir={folder}", f"--init.model={init}"]
    run(*command, "--train.steps=1")
    content = (folder / "trained_on.keys").read_bytes()
    (init / "trained_on.keys").unlink()
    run(*command, "--train.steps=2")
    assert (folder / "trained_on.keys").read_bytes() == content
    (folder / "trained_on.keys").unlink()  # begun by an earlier version
    run(*command, "--train.steps=3")
    assert not TrainedOn.of_model(folder).complete
