"""Keys of a group whose class one of the keys names, and configs of runs that list the keys of all classes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ecgscale.config import PretrainConfig, dump, help_text, load
from ecgscale.downstream.classification import SingleLabel
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.downstream.identification_task import IdentificationTask
from ecgscale.errors import InputError
from ecgscale.objectives.cmsc import CMSC
from ecgscale.objectives.wav2vec2 import Wav2Vec2
from ecgscale.run import refuse_other_config, refuse_other_run
from ecgscale.run_folder import checkpoint_name
from ecgscale.training.state import write_state

# What a run of cmsc with --objective.codes=16 has left in its folder before objectives had keys of their own.
BEFORE = """
objective:
  name: cmsc
  lead_mask_probability: 0.25
  augmentations: []
  augmentation_probability: 1.0
  time_mask_share: 0.35
  time_mask_span: 10
  negatives: 100
  local_temperature: 0.1
  global_temperature: 0.1
  time_mask_rule: fixed
  global_form: nt_xent
  code_groups: 2
  codes: 16
  code_width: 256
  gumbel_start: 2.0
  gumbel_end: 0.5
  gumbel_factor: 0.999995
  diversity_weight: 0.1
  feature_weight: 10.0
"""
SAME = ["--objective.name=cmsc", "--objective.lead_mask_probability=0.25", "--objective.global_form=nt_xent"]


def refusal(*arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        load(PretrainConfig, list(arguments))
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return f"--config={path}"

    return write


def test_an_objective_has_its_own_keys_alone():
    assert {field.name for field in fields(CMSC.Config)} == {
        "name", "lead_mask_probability", "augmentations", "augmentation_probability",
        "global_temperature", "global_form",
    }  # fmt: skip
    config = load(PretrainConfig, ["--objective.negatives=7", "--objective.name=wav2vec2"])
    assert config.objective == Wav2Vec2.Config(negatives=7), "the name may come later"


def test_keys_of_another_objective_are_refused_by_name(file):
    said = "objective.negatives belongs to wav2vec2 and wav2vec2+cmsc, not to cmsc"
    assert refusal("--objective.name=cmsc", "--objective.negatives=7") == said
    assert refusal("--objective.negatives=7", "--objective.name=cmsc") == said
    given = file("objective: {name: cmsc, negatives: 7}")
    assert refusal(given) == f"{given.partition('=')[2]}, line 1: {said}"
    assert refusal("--objective.name=3kg", "--objective.global_form=nt_xent").endswith(
        "objective.global_form belongs to cmsc and wav2vec2+cmsc, not to 3kg"
    )
    assert refusal("--objective.nagatives=7") == "unknown key objective.nagatives; did you mean objective.negatives?"


def test_another_objective_than_that_of_a_file_leaves_the_files_keys_out(file):
    given = file("objective: {negatives: 7, lead_mask_probability: 0.25}")
    assert load(PretrainConfig, [given, "--objective.name=cmsc"]).objective == CMSC.Config(lead_mask_probability=0.25)
    assert load(PretrainConfig, [given]).objective.negatives == 7
    wrong = file("objective: {nagatives: 7}")
    assert "did you mean objective.negatives?" in refusal(wrong, "--objective.name=cmsc")


def test_help_tells_whose_keys_they_are():
    text = " ".join(help_text(PretrainConfig, "pretrain").split())
    assert "[wav2vec2, wav2vec2+cmsc] Negatives of each masked place." in text
    assert "[cmsc, wav2vec2+cmsc, simclr, 3kg] Temperature of the global contrast." in text
    assert "--objective.lead_mask_probability LEAD_MASK_PROBABILITY Random lead masking" in text, "of all"


def test_a_config_of_an_earlier_version_is_read_with_the_keys_of_its_objective(file):
    assert load(PretrainConfig, [file(BEFORE)]) == load(PretrainConfig, SAME)
    few = file(BEFORE.replace("  feature_weight: 10.0\n", ""))
    assert "objective.time_mask_share belongs to" in refusal(few), "nobody but a run writes them all"


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    same = load(PretrainConfig, SAME)
    tree = yaml.safe_load(dump(same)) | yaml.safe_load(BEFORE)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    saved = tmp_path / "checkpoints" / checkpoint_name(1)
    saved.mkdir(parents=True)
    write_state(saved, {"step": 1, "files": {}, "about": {}, "config": tree})
    refuse_other_run(tmp_path, same)
    other = load(PretrainConfig, ["--objective.name=cmsc", "--objective.lead_mask_probability=0.25"])
    with pytest.raises(InputError, match=r"the run has objective\.global_form 'nt_xent', now it is 'reference'"):
        refuse_other_run(tmp_path, other)
    with pytest.raises(InputError, match=r"the run has objective\.name 'cmsc', now it is 'wav2vec2'"):
        refuse_other_config(tmp_path / "config.yaml", load(PretrainConfig, ["--objective.name=wav2vec2"]))


def test_an_objective_is_told_before_its_keys(tmp_path):
    (tmp_path / "config.yaml").write_text(dump(load(PretrainConfig, ["--objective.name=3kg"])))
    with pytest.raises(InputError, match=r"the run has objective\.name '3kg', now it is 'wav2vec2\+cmsc'"):
        refuse_other_config(tmp_path / "config.yaml", load(PretrainConfig, ["--objective.codes=16"]))


# What a run of identification has left in its folder before tasks had keys of their own.
TASK_BEFORE = """
task:
  label: ''
  kind: identification
  session: ECG date
  one_probe: true
  classes: []
  min_positives: 10
  min_scored_s: 0.0
  label_fraction: 1.0
  challenge_weights: ''
  protocol: finetune
  freeze_stem: true
  lead_mask_probability: 0.0
  arcface_scale: 16.0
  arcface_margin: 0.2
"""
SAME_TASK = ["--task.kind=identification", "--task.session=ECG date", "--task.one_probe=true"]
SAME_TASK += ["--task.arcface_scale=16", "--task.arcface_margin=0.2"]


def refused_task(*arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        load(FinetuneConfig, list(arguments))
    return str(caught.value)


def test_a_task_has_its_own_keys_alone(file):
    config = load(FinetuneConfig, ["--task.label=rhythm", "--task.kind=singlelabel"])
    assert config.task == SingleLabel.Config(label="rhythm")
    said = "task.session belongs to identification, not to multilabel"
    assert refused_task("--task.session=day") == said
    given = file("task: {session: day}")
    assert refused_task(given) == f"{given.partition('=')[2]}, line 1: {said}"
    given = file("task: {label: rhythm, freeze_stem: false}")
    of_persons = load(FinetuneConfig, [given, "--task.kind=identification"]).task
    assert of_persons == IdentificationTask.Config(freeze_stem=False), "the file's keys of its own task are left out"


def test_a_task_of_an_earlier_version_is_read_and_its_run_goes_on(file, tmp_path):
    same = load(FinetuneConfig, SAME_TASK)
    assert load(FinetuneConfig, [file(TASK_BEFORE)]) == same
    few = file("task: {kind: identification, classes: [], label: ''}")
    assert "task.classes belongs to multilabel and singlelabel" in refused_task(few), "nobody but a run writes them all"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(dump(same)) | yaml.safe_load(TASK_BEFORE)))
    refuse_other_config(tmp_path / "config.yaml", same)
    with pytest.raises(InputError, match=r"the run has task\.arcface_margin 0\.2, now it is 1\.0"):
        refuse_other_config(tmp_path / "config.yaml", load(FinetuneConfig, SAME_TASK[:-1]))
    with pytest.raises(InputError, match=r"the run has task\.kind 'identification', now it is 'multilabel'"):
        refuse_other_config(tmp_path / "config.yaml", load(FinetuneConfig, ["--task.label=rhythm"]))
