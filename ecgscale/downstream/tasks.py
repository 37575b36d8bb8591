"""Labelled data sets: which label, which classes, which recordings, in patient-disjoint splits.

Shape suffixes: R recordings of the whole set, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.metrics import labels_for_classes, load_challenge_weights
from ecgscale.errors import InputError
from ecgscale.rng import Purpose, random_words

Floats64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InitConfig:
    """What fine-tuning begins with."""

    model: str = ""
    """Run folder or export folder of the pretrained model."""
    random: bool = False
    """Keep the model's shape and preprocessing but begin with new weights: the baseline."""


@dataclass(frozen=True)
class TaskConfig:
    """The classification task."""

    label: str = ""
    """Label of the recordings, a column of the label table at ingest or Dx from the headers."""
    kind: Literal["multilabel", "singlelabel"] = "multilabel"
    """multilabel: any number of classes each. singlelabel: exactly one."""
    classes: list[str] = field(default_factory=list)
    """The classes; none: all with enough positives in the training split."""
    min_positives: int = 10
    """Positives in the training split below which a class is left out, where the classes are not given."""
    label_fraction: float = 1.0
    """Share of the labelled patients of the training split whose labels are used; all others' training recordings are
    left out. train.seed draws them; with the same seed, 1 % is part of 10 %."""
    challenge_weights: str = ""
    """Weights file of the CinC 2021 challenge: its classes are taken and its score is reported."""
    protocol: Literal["finetune", "probe"] = "finetune"
    """finetune: train the encoder and a linear head. probe: a logistic regression on the frozen embeddings."""
    freeze_stem: bool = True
    """Leave the stem as it was pretrained, as the paper does. A random start always trains it."""

    def __post_init__(self) -> None:
        if self.min_positives < 1:
            raise InputError(f"task.min_positives {self.min_positives}: give 1 or more")
        if not 0 < self.label_fraction <= 1:
            raise InputError(f"task.label_fraction {self.label_fraction:g}: give a share above 0, up to 1")


@dataclass(frozen=True)
class Task:
    """Targets of all recordings of a set; unlabelled ones are marked."""

    classes: tuple[str, ...]
    kind: str
    target_RC: npt.NDArray[np.float32]
    labelled_R: npt.NDArray[np.bool_]
    challenge: Floats64 | None  # (C, C) weights of the challenge score


@dataclass(frozen=True)
class TrainedTask:
    """What a fine-tuned model knows of its task: classes in the order of its head, and challenge weights (C, C)."""

    classes: list[str]
    challenge_weights: list[list[float]] | None


def load_task(
    shards: ShardSet,
    config: TaskConfig,
    trained: TrainedTask | None = None,
    splits: Sequence[str] = SPLITS,
    seed: int = 0,
) -> Task:
    """Targets from the recordings' metadata. The classes of an already trained model override the config's.

    ``seed`` draws the patients of ``label_fraction``. Raises InputError for an unknown label, no usable class, and a
    split among ``splits`` without labelled recordings.
    """
    values = [shards.metadata(number)["labels"] for number in range(len(shards))]
    known = Counter(name for labels in values for name in labels)
    if config.label not in known:
        near = get_close_matches(config.label, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the recordings have {', '.join(known) or 'no labels at all'}"
        raise InputError(f"task.label {config.label!r}: no recording has it; {hint}")
    codes = [labels.get(config.label, []) for labels in values]
    labelled_R = np.array([bool(code) for code in codes])
    labelled_R &= _drawn(shards, labelled_R, config.label_fraction, seed)
    classes, challenge = _classes(shards, codes, labelled_R, config, trained)
    target_RC = labels_for_classes(codes, classes).astype(np.float32)
    if config.kind == "singlelabel":
        labelled_R &= target_RC.sum(axis=1) == 1
    split_R = shards.column("split")
    if config.label_fraction < 1 and not target_RC[labelled_R & (split_R == SPLITS.index("train"))].any():
        raise InputError(
            f"task.label_fraction {config.label_fraction:g}: no training recording that is left has any of "
            f"{', '.join(classes)}; give a larger share or other classes"
        )
    for split in splits:
        if not labelled_R[split_R == SPLITS.index(split)].any():
            raise InputError(
                f"the {split} split has no recording with {config.label!r} among {', '.join(classes)}; "
                "ingest with a split that has some, or lower task.min_positives"
            )
    return Task(tuple(classes), config.kind, target_RC, labelled_R, challenge)


def _drawn(shards: ShardSet, labelled_R: npt.NDArray[np.bool_], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """(R,) recordings of a share of the labelled patients of the training split, one at least, and of other splits."""
    training_R, patient_R = shards.column("split") == SPLITS.index("train"), shards.column("patient")
    patients = np.unique(patient_R[training_R & labelled_R])
    word = random_words(seed, Purpose.LABELLED_PATIENTS, patients, 1)[:, 0]
    first = patients[np.argsort(word, kind="stable")][: max(1, round(fraction * len(patients)))]
    drawn_R: npt.NDArray[np.bool_] = ~training_R | np.isin(patient_R, first)
    return drawn_R


def _classes(
    shards: ShardSet,
    codes: list[list[str]],
    labelled_R: npt.NDArray[np.bool_],
    config: TaskConfig,
    trained: TrainedTask | None,
) -> tuple[list[str], Floats64 | None]:
    """Classes and challenge weights: the model's own, the challenge's, the config's, or the frequent ones."""
    if trained is not None:
        weights = trained.challenge_weights
        return trained.classes, None if weights is None else np.array(weights, np.float64)
    if config.challenge_weights:
        names, weights_CC = load_challenge_weights(Path(config.challenge_weights))
        return list(names), weights_CC
    _check_classes(config, codes)
    return config.classes or _frequent_classes(shards, codes, labelled_R, config), None


def _check_classes(config: TaskConfig, codes: list[list[str]]) -> None:
    """Raises InputError for a class of the config that no recording carries: most likely a slip of the pen."""
    known = {code for record in codes for code in record}
    for name in config.classes:
        if known.isdisjoint(name.split("|")):
            near = get_close_matches(name, sorted(known), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise InputError(f"task.classes {name!r}: no recording has it in {config.label!r}; {hint}")


def _frequent_classes(
    shards: ShardSet, codes: list[list[str]], labelled_R: npt.NDArray[np.bool_], config: TaskConfig
) -> list[str]:
    training_R = labelled_R & (shards.column("split") == SPLITS.index("train"))
    counts = Counter(name for code, used in zip(codes, training_R, strict=True) if used for name in set(code))
    frequent = sorted(name for name, count in counts.items() if count >= config.min_positives)
    if len(frequent) < 2:
        left = "" if config.label_fraction == 1 else f" among the task.label_fraction {config.label_fraction:g} of it"
        raise InputError(
            f"task.label {config.label!r}: fewer than two classes have {config.min_positives} positives for training"
            f"{left}"
        )
    return frequent
