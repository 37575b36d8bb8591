"""Does pretraining go on from a model: its weights, shape and preprocessing, and does such a run resume without it?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecgscale.config import PretrainConfig, dump, load
from ecgscale.errors import InputError
from ecgscale.export import Profile
from ecgscale.interop.fairseq import export_checkpoint, import_checkpoint
from small_jobs import losses

PROFILE = Profile(250.0, 2.5, "zscore")
TRAIN = [
    "--data.min_record_s=5", "--train.global_batch=4", "--train.log_every=1", "--train.validation_recordings=4",
    "--model.dropout=0", "--train.checkpoint_every=1",
]  # fmt: skip


@pytest.fixture
def init(make_export, tmp_path) -> Path:
    return make_export(tmp_path / "init", profile=PROFILE)


def job(shards: Path, init: Path, run: Path, *more: str) -> list[str]:
    few = [] if "--objective.name=cmsc" in more else ["--objective.negatives=5"]
    return ["pretrain", *TRAIN, *few, "--init", str(init), f"--data.shards={shards}", f"--run.dir={run}", *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def test_begins_with_all_weights_and_resumes_without_them(jobs, shards, init, tmp_path):
    given, still = load_file(init / "model.safetensors"), "--engine.learning_rate=0"
    whole, parted, frozen = (tmp_path / name for name in ("whole", "parted", "frozen"))
    said = jobs.run(
        1,
        job(shards, init, whole, "--train.steps=2"),
        job(shards, init, parted, "--train.steps=1"),
        job(shards, init, frozen, "--train.steps=1", still, "--engine.weight_decay=0"),
    )
    assert said.count(f"begins with {init}, step 7: encoder, local_head; new: none") == 3
    assert {name: torch.equal(tensor, given[name]) for name, tensor in weights(frozen).items()} == dict.fromkeys(
        given, True
    )
    shutil.rmtree(init)
    said = jobs.run(1, job(shards, init, parted, "--train.steps=2"))
    assert "begins with" not in said
    assert losses(parted) == losses(whole)
    assert {n: torch.equal(t, weights(whole)[n]) for n, t in weights(parted).items()} == dict.fromkeys(given, True)
    export_checkpoint(whole, tmp_path / "whole.pt")
    assert "pretrained with its heads" in import_checkpoint(tmp_path / "whole.pt", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {n: torch.equal(t, weights(whole)[n]) for n, t in back.items()} == dict.fromkeys(given, True)
    about = json.loads((parted / "export" / "config.json").read_text())
    assert (about["profile"]["normalisation"], about["profile"]["segment_s"]) == ("zscore", 2.5)


def test_what_does_not_fit_starts_anew(jobs, shards, init, make_export, tmp_path):
    tuned = make_export(tmp_path / "tuned", profile=PROFILE, classes=2)
    export_checkpoint(tuned, tmp_path / "tuned.pt")
    import_checkpoint(tmp_path / "tuned.pt", tmp_path / "imported")
    still = ["--train.steps=1", "--engine.learning_rate=0", "--engine.weight_decay=0"]
    said = jobs.run(
        1,
        job(shards, init, tmp_path / "a", *still, "--objective.codes=7"),
        job(shards, tmp_path / "imported", tmp_path / "b", *still),
        job(shards, init, tmp_path / "c", *still, "--objective.name=cmsc"),
    )
    assert f"begins with {init}, step 7: encoder; new: local_head" in said
    assert f"begins with {tmp_path / 'imported'}, step 7: encoder; new: encoder.mask.token, local_head" in said
    assert f"begins with {init}, step 7: encoder; new: none" in said
    given = load_file(tuned / "model.safetensors")
    mine = weights(tmp_path / "b")
    differ = {name for name in given.keys() & mine.keys() if not torch.equal(given[name], mine[name])}
    assert differ == {"encoder.mask.token"}
    assert mine["local_head.quantizer.codebook"].shape == (640, 128), "the usual size, since the file has no heads"
    assert not any(name.startswith("local_head") for name in weights(tmp_path / "c"))


def test_what_an_encoder_has_no_place_for_is_refused_and_such_a_head_starts_anew(
    jobs, shards, init, without_checksums, tmp_path
):
    """As low-rank adapters leave it, which nobody has added to the weights: without them it is another model."""
    path, run = without_checksums(init) / "model.safetensors", tmp_path / "run"
    whole = load_file(path)
    save_file(whole | {"encoder.layers.0.lora_A": torch.ones(4, 32)}, path)
    said = jobs.run(1, job(shards, init, run, "--train.steps=1"), code=2)
    assert f"{init}: weights do not fit the model: left over layers.0.lora_A" in said
    assert not run.exists()
    save_file(whole | {"local_head.lora_A": torch.ones(4, 32)}, path)
    said = jobs.run(1, job(shards, init, run, "--train.steps=1"))
    assert f"begins with {init}, step 7: encoder; new: local_head" in said


def test_shards_of_another_rate_are_refused(jobs, shards, make_export, tmp_path):
    other = make_export(tmp_path / "other", profile=Profile(500.0, 2.5, "mv"))
    said = jobs.run(1, job(shards, other, tmp_path / "run", "--train.steps=1"), code=2)
    assert f"data.shards have 250 Hz, the model of init.model {other} takes 500 Hz; ingest at its rate" in said
    assert not (tmp_path / "run").exists()


def test_shape_and_preprocessing_are_those_of_the_model(init, small_model_config, tmp_path):
    config = load(PretrainConfig, ["--init.model", str(init), "--model.dropout", "0.3"])
    assert vars(config.model) == vars(small_model_config) | {"dropout": 0.3}
    assert (config.data.segment_s, config.data.normalisation) == (2.5, "zscore")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(PretrainConfig, ["--config", str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.width=64"], "model.width 64: the model of init.model INIT has 32; leave the key out"),
        (["--model.depth=3"], "model.depth 3: the model of init.model INIT has 2; leave the key out"),
        (["--model.stem=patch"], "model.stem 'patch': the model of init.model INIT has 'conv'; leave the key out"),
        (["--data.segment_s=5"], "data.segment_s 5: the model of init.model INIT has 2.5; leave the key out"),
        (["--data.normalisation=mv"], "data.normalisation 'mv': the model of init.model INIT has 'zscore'; leave the"),
        (
            ["--model.preset=base"],
            "model.width 768: the model of init.model INIT has 32; leave the key out and ",
        ),
    ],
)
def test_contradictions_name_the_key(init, arguments, said):
    with pytest.raises(InputError) as refused:
        load(PretrainConfig, ["--init.model", str(init), *arguments])
    assert str(refused.value).startswith(said.replace("INIT", str(init)))


def test_what_is_no_model(tmp_path):
    for init, said in ((tmp_path, "neither an export"), (tmp_path / "nowhere", "neither an export")):
        with pytest.raises(InputError, match=said):
            load(PretrainConfig, ["--init.model", str(init)])
