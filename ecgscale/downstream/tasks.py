"""Labelled data sets: which label, which classes, which recordings, in patient-disjoint splits.

Shape suffixes: R recordings of the whole set, C classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.coverage import REASONS
from ecgscale.downstream.identification import session_days
from ecgscale.downstream.metrics import labels_for_classes, load_challenge_weights, sorted_alternatives
from ecgscale.errors import InputError
from ecgscale.rng import Purpose, random_words

Floats64 = npt.NDArray[np.float64]
Kind = Literal["multilabel", "singlelabel", "identification"]


@dataclass(frozen=True)
class InitConfig:
    """What fine-tuning begins with."""

    model: str = ""
    """Run folder or export folder of the pretrained model."""
    encoder: str = ""
    """The class of its encoder, package.module:Class, where that is not one of ours: a model's own word imports
    nothing."""
    random: bool = False
    """Keep the model's shape and preprocessing but begin with new weights: the baseline."""


@dataclass(frozen=True)
class TaskConfig:
    """The downstream task."""

    label: str = ""
    """Label of the recordings, a column of the label table at ingest or Dx from the headers."""
    kind: Kind = "multilabel"
    """multilabel: any number of classes each. singlelabel: exactly one. identification: who is it, by ArcFace on the
    training patients; scored on test patients, recordings of their later sessions against their first one's."""
    session: str = ""
    """identification: the label or header comment that dates the sessions, such as ECG date; as 2005-03-15, 15.03.2005
    or a whole number. None: each recording is a session of its own."""
    one_probe: bool = False
    """identification: score each person's last recording alone, as the paper does, not all of the later sessions."""
    classes: list[str] = field(default_factory=list)
    """The classes; none: all with enough positives in the training split."""
    min_positives: int = 10
    """Positives in the training split below which a class is left out, where the classes are not given."""
    min_scored_s: float = 0.0
    """Shorter recordings of the validation and test splits are left out of scores, and counted. 0: none; what a window
    lacks is padded, and does not matter. Those of the training split: data.min_record_s."""
    label_fraction: float = 1.0
    """Share of the labelled patients of the training split whose labels are used; all others' training recordings are
    left out. train.seed draws them; with the same seed, 1 % is part of 10 %."""
    challenge_weights: str = ""
    """Weights file of the CinC 2021 challenge: its classes are taken and its score is reported."""
    protocol: Literal["finetune", "probe", "neighbours"] = "finetune"
    """finetune: train the encoder and a linear head. probe: a logistic regression on the frozen embeddings. neighbours:
    the 5 to 100 most similar training recordings vote, by their cosine; validation says how many. Identification by a
    frozen encoder is probe."""
    freeze_stem: bool = True
    """Leave the stem as it was pretrained, as the paper does. A random start always trains it."""
    lead_mask_probability: float = 0.0
    """Random lead masking while fine-tuning: each lead of each recording is dropped with this probability."""
    arcface_scale: float = 192.0
    """identification: factor on the cosines."""
    arcface_margin: float = 1.0
    """identification: angle in radians by which a recording must be nearer to its person than to all others."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"task.kind {self.kind!r}: known are {', '.join(get_args(Kind))}")
        if not 0 <= self.lead_mask_probability < 1:
            raise InputError(f"task.lead_mask_probability {self.lead_mask_probability:g}: give a probability below 1")
        if not (self.arcface_scale > 0 and 0 <= self.arcface_margin < math.pi):
            raise InputError(
                f"task.arcface_scale {self.arcface_scale:g}, task.arcface_margin {self.arcface_margin:g}: "
                "give a positive scale and an angle from 0 to below 3.14"
            )
        if self.kind == "identification" and self.protocol == "neighbours":
            raise InputError("task.protocol neighbours: identification compares embeddings anyhow; give probe")
        if self.min_positives < 1:
            raise InputError(f"task.min_positives {self.min_positives}: give 1 or more")
        if not self.min_scored_s >= 0:
            raise InputError(f"task.min_scored_s {self.min_scored_s:g}: give 0 or a number of seconds")
        if not 0 < self.label_fraction <= 1:
            raise InputError(f"task.label_fraction {self.label_fraction:g}: give a share above 0, up to 1")


@dataclass(frozen=True)
class Task:
    """Targets of all recordings of a set, and which of them count."""

    classes: tuple[str, ...]
    kind: str
    target_RC: npt.NDArray[np.float32]
    reason_R: npt.NDArray[np.uint8]  # why a recording is left out, a place in LEFT_OUT_FOR; 0: it is not
    reasons: tuple[str, ...]  # those that could hold
    challenge: Floats64 | None  # (C, C) weights of the challenge score
    session_R: npt.NDArray[np.int64] | None = None  # of identification, in the sessions' order
    other_classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> class that is not the task's -> recordings that carry it."""

    @property
    def labelled_R(self) -> npt.NDArray[np.bool_]:
        """(R,) recordings that are not left out."""
        labelled_R: npt.NDArray[np.bool_] = self.reason_R == 0
        return labelled_R


LEFT_OUT_FOR = ("", *REASONS)


def leave_out(reason_R: npt.NDArray[np.uint8], where_R: npt.NDArray[np.bool_], reason: str) -> None:
    """Write down a reason where there is none yet."""
    reason_R[where_R & (reason_R == 0)] = LEFT_OUT_FOR.index(reason)


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
    if config.kind == "identification":
        return _persons(shards, config, splits, seed)
    codes = _values(shards, config.label, "task.label")
    reason_R = np.zeros(len(shards), np.uint8)
    leave_out(reason_R, np.array([code is None for code in codes]), "no_label")
    leave_out(reason_R, ~_drawn(shards, reason_R == 0, config.label_fraction, seed), "not_drawn")
    reasons = ["no_label", *(["not_drawn"] if config.label_fraction < 1 else [])]
    named = [code or [] for code in codes]  # a label that is known and names no class: a negative of every class
    classes, challenge = _classes(shards, named, reason_R == 0, config, trained)
    target_RC = labels_for_classes(named, classes).astype(np.float32)
    if config.kind == "singlelabel":
        reasons += ["no_class", "several_classes"]
        leave_out(reason_R, target_RC.sum(axis=1) == 0, "no_class")
        leave_out(reason_R, target_RC.sum(axis=1) > 1, "several_classes")
    split_R = shards.column("split")
    if config.label_fraction < 1 and not target_RC[(reason_R == 0) & (split_R == SPLITS.index("train"))].any():
        raise InputError(
            f"task.label_fraction {config.label_fraction:g}: no training recording that is left has any of "
            f"{', '.join(classes)}; give a larger share or other classes"
        )
    for split in splits:
        if not (reason_R == 0)[split_R == SPLITS.index(split)].any():
            raise InputError(
                f"the {split} split has no recording with {config.label!r} among {', '.join(classes)}; "
                "ingest with a split that has some, or lower task.min_positives"
            )
    other = _other_classes(named, split_R, classes)
    if trained is not None and any(other.values()) and not target_RC.any():
        theirs = sorted(set().union(*other.values()))
        raise InputError(
            f"{config.label!r}: the model tells {', '.join(classes)}, which no recording has; they have "
            f"{', '.join(theirs)}. Ingest with the names that the model was trained with"
        )
    return Task(tuple(classes), config.kind, target_RC, reason_R, tuple(reasons), challenge, other_classes=other)


def _other_classes(
    codes: list[list[str]], split_R: npt.NDArray[np.uint8], classes: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Of each split, the classes that recordings carry and a task does not have."""
    known = {code for name in classes for code in sorted_alternatives(name).split("|")}
    counts = {split: Counter[str]() for split in SPLITS}
    for code, split in zip(codes, split_R.tolist(), strict=True):
        counts[SPLITS[split]].update(set(code) - known)
    return {split: dict(counter) for split, counter in counts.items()}


def _persons(shards: ShardSet, config: TaskConfig, splits: Sequence[str], seed: int) -> Task:
    """Identification: the patients are the classes, so every recording counts that has a session."""
    reason_R, reasons = np.zeros(len(shards), np.uint8), []
    session_R = np.arange(len(shards))
    if config.session:
        sessions = _values(shards, config.session, "task.session")
        reasons.append("no_session")
        dated_R = np.array([bool(values) for values in sessions])
        leave_out(reason_R, ~dated_R, "no_session")
        texts = ["|".join(values) for values in sessions if values]
        dataset_S = np.array([shard.dataset for shard in shards.shards])
        datasets = dataset_S[shards.shard_of(np.flatnonzero(dated_R))].tolist()
        session_R = np.zeros(len(shards), np.int64)
        session_R[dated_R] = session_days(texts, datasets)
    leave_out(reason_R, ~_drawn(shards, reason_R == 0, config.label_fraction, seed), "not_drawn")
    reasons += ["not_drawn"] if config.label_fraction < 1 else []
    split_R = shards.column("split")
    for split in splits:
        if not (reason_R == 0)[split_R == SPLITS.index(split)].any():
            raise InputError(
                f"the {split} split has no recording{f' with {config.session!r}' if config.session else ''}"
            )
    nothing_RC = np.zeros((len(shards), 0), np.float32)
    return Task((), config.kind, nothing_RC, reason_R, tuple(reasons), None, session_R.astype(np.int64))


def _values(shards: ShardSet, key: str, setting: str) -> list[list[str] | None]:
    """What each recording has of a label or another piece of metadata; None where it says nothing of it.

    Raises InputError for a key that no recording has.
    """
    values_R: list[list[str] | None] = []
    known = Counter[str]()
    for number in range(len(shards)):
        about = shards.metadata(number)
        values = {name: [str(value)] for name, value in about["metadata"].items()} | about["labels"]
        known.update(list(values if setting == "task.session" else about["labels"]))
        values_R.append(values.get(key))
    if all(values is None for values in values_R):
        near = get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the recordings have {', '.join(known) or 'no labels at all'}"
        raise InputError(f"{setting} {key!r}: no recording has it; {hint}")
    return values_R


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
