"""Targets and splits of labelled data sets, and every way in which a task can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS, check_patient_disjoint
from ecgscale.data.sources import WfdbFolder
from ecgscale.downstream import build_task, task_config
from ecgscale.downstream.classes import Classes, ClassesConfig
from ecgscale.errors import InputError
from ecgscale.record import Record


@dataclass(frozen=True)
class Labelled:
    """Records of one flat lead: (split, labels) by name; so many in a row are one patient's."""

    records: dict[str, tuple[str, dict[str, list[str]]]]
    per_patient: int = 1
    dataset: str = "made-up"

    def items(self) -> list[str]:
        return sorted(self.records)

    def read(self, item: str) -> Record:
        split, labels = self.records[item]
        flat_LT, patient = np.zeros((1, 100), np.int16), None
        if self.per_patient > 1:
            patient = str(int(item[1:]) // self.per_patient)
        return Record(item, flat_LT, np.ones(1, np.float32), 100.0, ("I",), patient, labels, {"split": split})


@pytest.fixture
def shards_of(tmp_path) -> Callable[..., ShardSet]:
    """Writes (split, {label: codes}) rows as a data set in shards of three records."""

    def write(rows: list[tuple[str, dict[str, list[str]]]], name: str = "set", per_patient: int = 1) -> ShardSet:
        source = Labelled({f"r{i:03d}": row for i, row in enumerate(rows)}, per_patient)
        options = IngestOptions(
            rate_hz=100,
            records_per_shard=3,
            validation_fraction=0,
            split_by="split",
            validation_values=tuple({split for split, _ in rows} & {"validation"}),
            test_values=("test",),
        )
        ingest(source, tmp_path / name, options)
        return ShardSet.open(tmp_path / name)

    return write


ROWS = [
    ("train", {"rhythm": ["sinus"]}),
    ("train", {"rhythm": ["flutter", "sinus"]}),
    ("train", {"rhythm": ["sinus", "sinus"]}),
    ("train", {"rhythm": ["flutter"], "site": ["a"]}),
    ("train", {"site": ["a"]}),
    ("train", {"rhythm": ["rare"]}),
    ("validation", {"rhythm": ["sinus"]}),
    ("validation", {"rhythm": ["rare"]}),
    ("test", {"rhythm": ["flutter"]}),
    ("test", {"rhythm": []}),
]


@pytest.fixture
def shards(shards_of) -> ShardSet:
    return shards_of(ROWS)


def labelling(shards: ShardSet, config: ClassesConfig, trained: dict[str, Any] | None = None, seed: int = 0) -> Classes:
    return build_task(config).label(shards, seed=seed, trained=trained)


def refusal(shards: ShardSet, config: ClassesConfig, trained: dict[str, Any] | None = None) -> str:
    with pytest.raises(InputError) as refused:
        labelling(shards, config, trained)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- targets ---


def test_targets_stand_in_the_order_of_the_records(shards):
    task = labelling(shards, task_config(label="rhythm", classes=["sinus", "flutter"]))
    assert task.classes == ("sinus", "flutter")
    assert task.target_RC.dtype == np.float32
    expected_RC = [[1, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 1], [0, 0]]
    np.testing.assert_array_equal(task.target_RC, expected_RC)
    assert shards.column("split").tolist() == [SPLITS.index(split) for split, _ in ROWS]
    assert task.challenge is None


def test_records_without_the_label_are_left_out_and_those_of_no_class_are_negatives(shards):
    task = labelling(shards, task_config(label="rhythm", min_positives=1))
    assert task.labelled_R.tolist() == [True] * 4 + [False] + [True] * 5
    assert not task.target_RC[-1].any(), "the label is known, and names no class"


def test_frequent_classes_are_counted_by_records_of_the_training_split(shards):
    assert labelling(shards, task_config(label="rhythm", min_positives=2)).classes == ("flutter", "sinus")
    assert labelling(shards, task_config(label="rhythm", min_positives=1)).classes == ("flutter", "rare", "sinus")
    assert "fewer than two classes have 3 positives" in refusal(shards, task_config(label="rhythm", min_positives=3))
    assert "fewer than two classes have 10 positives" in refusal(shards, task_config(label="rhythm"))


def test_a_code_that_stands_twice_in_a_record_counts_once(shards_of):
    codes = [["b"], ["b"], ["a", "a"]]
    rows = [(split, {"Dx": each}) for split in SPLITS for each in codes]
    shards = shards_of(rows)
    assert labelling(shards, task_config(label="Dx", min_positives=1)).classes == ("a", "b")
    assert "fewer than two classes have 2 positives" in refusal(shards, task_config(label="Dx", min_positives=2))


def test_single_label_takes_the_records_with_exactly_one_class(shards):
    config = task_config("singlelabel", label="rhythm", classes=["sinus", "flutter"])
    task = labelling(shards, config)
    # The second has two of them; the sixth and the eighth have another one.
    expected_R = [True, False, True, True, False, False, True, False, True, False]
    assert task.labelled_R.tolist() == expected_R
    assert (task.target_RC[task.labelled_R].sum(axis=1) == 1).all()
    several = labelling(shards, task_config("multilabel", label="rhythm", classes=config.classes))
    assert several.labelled_R.sum() == 9
    assert several.other_classes == {"train": {"rare": 1}, "validation": {"rare": 1}, "test": {}}


def test_classes_of_a_trained_model_come_first_and_may_be_absent_here(shards):
    config = task_config(label="rhythm", classes=["pacing", "flutter"])
    task = labelling(shards, config, {"classes": ["pacing", "flutter"], "challenge_weights": None})
    assert task.classes == ("pacing", "flutter")
    assert task.target_RC.sum(axis=0).tolist() == [0, 3]


def test_a_set_of_other_names_for_the_classes_of_a_trained_model_is_refused(shards, shards_of):
    """All would count as negatives."""
    said = refusal(shards, task_config(label="rhythm"), {"classes": ["AFL", "SR"], "challenge_weights": None})
    assert said == (
        "'rhythm': the model tells AFL, SR, which no recording has; they have flutter, rare, sinus. "
        "Ingest with the names that the model was trained with"
    )
    healthy = shards_of([(split, {"rhythm": []}) for split in SPLITS], "healthy")
    assert not labelling(
        healthy, task_config(label="rhythm"), {"classes": ["AFL", "SR"], "challenge_weights": None}
    ).target_RC.any()


def test_several_data_sets_are_one(shards_of, tmp_path):
    shards_of(ROWS, "one")
    shards_of(ROWS[::-1], "two")
    with pytest.raises(InputError, match="two splits"):  # equal names in a set of equal name: the same unknown people
        labelling(ShardSet.open([tmp_path / "one", tmp_path / "two"]), task_config(label="rhythm", min_positives=1))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    both = ShardSet.open([tmp_path / "one", tmp_path / "copy"])
    task = labelling(both, task_config(label="rhythm", classes=["sinus"]))
    assert len(task.target_RC) == 20
    np.testing.assert_array_equal(task.target_RC[:10], task.target_RC[10:])
    with pytest.raises(InputError, match="names a folder twice"):
        ShardSet.open([tmp_path / "one", tmp_path / "copy" / ".." / "one"])


# --- a share of the labels ---


@pytest.fixture
def pairs(shards_of) -> ShardSet:
    """40 training patients with two labelled recordings each, 10 without labels, and 4 each for the other splits."""
    split_N = ["train"] * 50 + ["validation"] * 4 + ["test"] * 4
    rows = [(split, {"Dx": ["a" if n % 2 else "b"]} if n < 40 or n >= 50 else {}) for n, split in enumerate(split_N)]
    return shards_of([row for row in rows for _ in range(2)], per_patient=2)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_share_of_the_labels_is_one_of_patients_and_nested(pairs, seed):
    split_R, patient_R = pairs.column("split"), pairs.column("patient")
    whole = labelling(pairs, task_config(label="Dx", min_positives=1))
    last: set[int] = set()
    for fraction, patients in ((0.01, 1), (0.1, 4), (0.5, 20), (1.0, 40)):
        config = task_config(label="Dx", classes=["a", "b"], label_fraction=fraction)
        labelled_R = labelling(pairs, config, seed=seed).labelled_R
        chosen = patient_R[labelled_R & (split_R == 0)].tolist()
        assert len(chosen) == 2 * len(set(chosen)) == 2 * patients, "both recordings of a patient or none"
        assert last <= set(chosen)
        last = set(chosen)
        np.testing.assert_array_equal(labelled_R[split_R > 0], whole.labelled_R[split_R > 0])
    np.testing.assert_array_equal(labelled_R, whole.labelled_R)


def test_each_seed_draws_its_own_share_of_the_labels(pairs):
    config = task_config(label="Dx", classes=["a", "b"], label_fraction=0.25)
    drawn = [labelling(pairs, config, seed=seed).labelled_R for seed in (0, 1, 1)]
    assert (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(drawn[1], drawn[2])


def test_too_small_a_share_of_the_labels_is_named(pairs):
    few = task_config(label="Dx", min_positives=5, label_fraction=0.1)
    assert "two classes have 5 positives for training among the task.label_fraction 0.1 of it" in refusal(pairs, few)
    said = refusal(pairs, task_config(label="Dx", classes=["b|c"], label_fraction=0.01))
    assert said.startswith("task.label_fraction 0.01: no training recording that is left has any of b|c")
    for wrong in (0.0, -0.5, 1.5):
        with pytest.raises(InputError, match=rf"task\.label_fraction {wrong:g}: give a share above 0"):
            task_config(label_fraction=wrong)


# --- the challenge ---


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights.csv"
    path.write_text(",10|11,426783006,30\n11|10,1,0.5,0\n426783006,0.5,1,0.3\n30,0,0.3,1\n")
    return path


def test_challenge_weights_give_the_classes(shards_of, weights):
    rows = [("train", ["11"]), ("train", ["10", "30"]), ("validation", ["426783006"]), ("test", ["99", "30"])]
    shards = shards_of([(split, {"Dx": codes}) for split, codes in rows])
    task = labelling(shards, task_config(label="Dx", challenge_weights=str(weights)))
    assert task.classes == ("10|11", "426783006", "30")
    np.testing.assert_array_equal(task.target_RC, [[1, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(task.challenge[0], [1, 0.5, 0])
    assert task.labelled_R.all()


def test_weights_that_cannot_be_read_are_named(shards, tmp_path):
    assert "absent.csv" in refusal(shards, task_config(label="rhythm", challenge_weights=str(tmp_path / "absent.csv")))


def test_the_official_weights_fit_real_recordings(shared_data, tmp_path):
    source = WfdbFolder(shared_data / "cinc2021", "cinc2021")
    few = [item for item in source.items() if "Dx" in source.read(item).labels][:12]

    class Few(WfdbFolder):
        def items(self) -> list[str]:
            return few

    options = IngestOptions(rate_hz=100, validation_fraction=0.3, test_fraction=0.3)
    ingest(Few(source.root, source.dataset), tmp_path / "set", options)
    shards = ShardSet.open(tmp_path / "set")
    config = task_config(label="Dx", challenge_weights=str(shared_data / "cinc_scoring" / "weights.csv"))
    task = labelling(shards, config)
    assert len(task.classes) == 26
    codes_R = [shards.metadata(number)["labels"]["Dx"] for number in range(len(shards))]
    for codes, target_C in zip(codes_R, task.target_RC, strict=True):
        scored = {name for name in task.classes if set(name.split("|")) & set(codes)}
        assert {name for name, target in zip(task.classes, target_C, strict=True) if target} == scored
    assert task.target_RC.any()


# --- what can be wrong ---


def by_label(label: str, **keys: object) -> ClassesConfig:
    return task_config(label=label, **keys)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (by_label("rythm"), "task.label 'rythm': no recording has it; did you mean 'rhythm'?"),
        (
            by_label("diagnosis"),
            "task.label 'diagnosis': no recording has it; the recordings have rhythm, site",
        ),
        (by_label(""), "task.label ''"),
        (
            by_label("rhythm", classes=["sinus", "fluter"]),
            "task.classes 'fluter': no recording has it in 'rhythm'",
        ),
        (by_label("rhythm", classes=["sinus", "fluter"]), "did you mean 'flutter'?"),
        (by_label("rhythm", classes=["xyz"]), "it has flutter, rare, sinus"),
        (
            by_label("rhythm", classes=["sinus", "rare", "sinus"]),
            "'sinus' stands in 2 of them; leave it in one",
        ),
        (by_label("rhythm", classes=["sinus|rare", "rare"]), "'rare' stands in 2 of them; leave it in one"),
        (by_label("site", classes=["a"]), "the validation split has no recording with 'site' among a"),
        (task_config("singlelabel", label="rhythm", classes=["sinus"]), "the test split has no recording"),
    ],
)
def test_what_does_not_fit_the_recordings_is_named(shards, config, said):
    assert said in refusal(shards, config)


def test_recordings_without_any_label_are_named(shards_of):
    assert "the recordings have no labels at all" in refusal(shards_of([("train", {}), ("test", {})]), by_label("x"))


def test_a_class_that_stands_for_alternatives_is_known_by_one_of_them(shards):
    task = labelling(shards, by_label("rhythm", classes=["fibrillation|flutter", "sinus"]))
    assert task.target_RC[:, 0].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1, 0]


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"task\.kind 'several' is unknown; known are multilabel, singlelabel, ident"):
        task_config("several", label="rhythm")


def test_min_positives_below_one_is_refused():
    with pytest.raises(InputError, match=r"task\.min_positives 0"):
        task_config(min_positives=0)


def test_a_patient_in_two_splits_is_refused():
    patient, split = np.array([5, 5, 6, 6, 2**62]), np.array([0, 0, 2, 2, 1], np.uint8)
    check_patient_disjoint(patient, split, "here")
    split[3] = 0
    with pytest.raises(InputError, match=r"here: 1 patients stand in two splits, train and test \(first: code 6\)"):
        check_patient_disjoint(patient, split, "here")
    check_patient_disjoint(patient[:0], split[:0], "nowhere")
