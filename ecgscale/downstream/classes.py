"""Classes of labelled recordings: which there are, and which of them each recording has.

Shape suffixes: R recordings of the whole set, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.metrics import labels_for_classes, load_challenge_weights, sorted_alternatives
from ecgscale.downstream.task import (
    Labelling,
    TaskConfig,
    label_values,
    leave_out,
    leave_out_undrawn,
    refuse_empty_splits,
)
from ecgscale.errors import InputError

Floats64 = npt.NDArray[np.float64]
Codes = list[list[str]]


@dataclass(frozen=True)
class ClassesConfig(TaskConfig):
    """Keys of tasks that tell classes."""

    label: str = ""
    """Label of the recordings, a column of the label table at ingest or Dx from the headers."""
    classes: list[str] = field(default_factory=list)
    """The classes; none: all with enough positives in the training split."""
    min_positives: int = 10
    """Positives in the training split below which a class is left out, where the classes are not given."""
    challenge_weights: str = ""
    """Weights file of the CinC 2021 challenge: its classes are taken and its score is reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_positives < 1:
            raise InputError(f"task.min_positives {self.min_positives}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class Classes(Labelling):
    """Which classes each recording has."""

    classes: tuple[str, ...]
    challenge: Floats64 | None  # (C, C) weights of the challenge score


def classes_of(
    shards: ShardSet,
    config: ClassesConfig,
    exclusive: bool,
    splits: Sequence[str],
    seed: int,
    trained: Mapping[str, Any] | None,
) -> Classes:
    """The classes of ``config.label``, or those of a trained model; ``exclusive``: each recording has exactly one.

    Raises InputError for an unknown label, no usable class, and a split among ``splits`` without labelled recordings.
    """
    codes = label_values(shards, config.label, "task.label")
    reason_R = np.zeros(len(shards), np.uint8)
    leave_out(reason_R, np.array([code is None for code in codes]), "no_label")
    reasons = ["no_label", *leave_out_undrawn(shards, reason_R, config.label_fraction, seed)]
    named = [code or [] for code in codes]  # a label that is known and names no class: a negative of every class
    classes, challenge = _classes(shards, named, reason_R == 0, config, trained)
    target_RC = labels_for_classes(named, classes).astype(np.float32)
    if exclusive:
        reasons += ["no_class", "several_classes"]
        leave_out(reason_R, target_RC.sum(axis=1) == 0, "no_class")
        leave_out(reason_R, target_RC.sum(axis=1) > 1, "several_classes")
    split_R = shards.column("split")
    if config.label_fraction < 1 and not target_RC[(reason_R == 0) & (split_R == SPLITS.index("train"))].any():
        raise InputError(
            f"task.label_fraction {config.label_fraction:g}: no training recording that is left has any of "
            f"{', '.join(classes)}; give a larger share or other classes"
        )
    lacking = f" with {config.label!r} among {', '.join(classes)}"
    hint = "; ingest with a split that has some, or lower task.min_positives"
    refuse_empty_splits(shards, reason_R, splits, lacking, hint)
    other = _other_classes(named, split_R, classes)
    if trained is not None and any(other.values()) and not target_RC.any():
        theirs = sorted(set().union(*other.values()))
        raise InputError(
            f"{config.label!r}: the model tells {', '.join(classes)}, which no recording has; they have "
            f"{', '.join(theirs)}. Ingest with the names that the model was trained with"
        )
    return Classes(
        target_RC,
        reason_R,
        tuple(reasons),
        negative_R=None if exclusive else target_RC.sum(axis=1) == 0,
        other_classes=other,
        classes=tuple(classes),
        challenge=challenge,
    )


def _other_classes(codes: Codes, split_R: npt.NDArray[np.uint8], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Of each split, the classes that recordings carry and a task does not have."""
    known = {code for name in classes for code in sorted_alternatives(name).split("|")}
    counts = {split: Counter[str]() for split in SPLITS}
    for code, split in zip(codes, split_R.tolist(), strict=True):
        counts[SPLITS[split]].update(set(code) - known)
    return {split: dict(counter) for split, counter in counts.items()}


def _classes(
    shards: ShardSet,
    codes: Codes,
    labelled_R: npt.NDArray[np.bool_],
    config: ClassesConfig,
    trained: Mapping[str, Any] | None,
) -> tuple[list[str], Floats64 | None]:
    """Classes and challenge weights: the model's own, the challenge's, the config's, or the frequent ones."""
    if trained is not None and "classes" in trained:
        weights = trained["challenge_weights"]
        return trained["classes"], None if weights is None else np.array(weights, np.float64)
    if config.challenge_weights:
        names, weights_CC = load_challenge_weights(Path(config.challenge_weights))
        return list(names), weights_CC
    _check_classes(config, codes)
    return config.classes or _frequent_classes(shards, codes, labelled_R, config), None


def _check_classes(config: ClassesConfig, codes: Codes) -> None:
    """Raises InputError for a class of the config that no recording carries: most likely a slip of the pen.

    And for a code that stands in two classes, of which only one could have it.
    """
    times = Counter(code for name in config.classes for code in set(sorted_alternatives(name).split("|")))
    if twice := [code for code, count in times.items() if count > 1]:
        raise InputError(f"task.classes: {twice[0]!r} stands in {times[twice[0]]} of them; leave it in one")
    known = {code for record in codes for code in record}
    for name in config.classes:
        if known.isdisjoint(name.split("|")):
            near = get_close_matches(name, sorted(known), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise InputError(f"task.classes {name!r}: no recording has it in {config.label!r}; {hint}")


def _frequent_classes(
    shards: ShardSet, codes: Codes, labelled_R: npt.NDArray[np.bool_], config: ClassesConfig
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
