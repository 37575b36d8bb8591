"""What every downstream task is: which recordings count, what is learnt from them, and how a model is scored.

Shape suffixes: B rows, R recordings of the whole set, C outputs of the head, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.coverage import REASONS
from ecgscale.downstream.report import Estimate
from ecgscale.errors import InputError
from ecgscale.model import Encoder
from ecgscale.model.base import mean_over_time
from ecgscale.rng import Purpose, random_words

if TYPE_CHECKING:
    from ecgscale.downstream.labelled import LabelledSet
    from ecgscale.inference import ECGModel

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

LEFT_OUT_FOR = ("", *REASONS)


@dataclass(frozen=True)
class TaskConfig:
    """The downstream task; ``kind`` chooses it, and the other keys are those of the chosen one."""

    kind: str
    """multilabel: any number of classes each. singlelabel: exactly one. identification: who is it, by ArcFace on the
    training patients; scored on test patients, recordings of their later sessions against their first one's. Or
    package.module:Class for one of your own."""
    min_scored_s: float = 0.0
    """Shorter recordings of the validation and test splits are left out of scores, and counted. 0: none; what a window
    lacks is padded, and does not matter. Those of the training split: data.min_record_s."""
    label_fraction: float = 1.0
    """Share of the labelled patients of the training split whose labels are used; all others' training recordings are
    left out. train.seed draws them; with the same seed, 1 % is part of 10 %."""
    protocol: Literal["finetune", "probe", "neighbours"] = "finetune"
    """finetune: train the encoder and a linear head. probe: a logistic regression on the frozen embeddings. neighbours:
    the 5 to 100 most similar training recordings vote, by their cosine; validation says how many. Identification by a
    frozen encoder is probe."""
    freeze_stem: bool = True
    """Leave the stem as it was pretrained, as the paper does. A random start always trains it."""
    lead_mask_probability: float = 0.0
    """Random lead masking while fine-tuning: each lead of each recording is dropped with this probability."""

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""
        if not 0 <= self.lead_mask_probability < 1:
            raise InputError(f"task.lead_mask_probability {self.lead_mask_probability:g}: give a probability below 1")
        if not self.min_scored_s >= 0:
            raise InputError(f"task.min_scored_s {self.min_scored_s:g}: give 0 or a number of seconds")
        if not 0 < self.label_fraction <= 1:
            raise InputError(f"task.label_fraction {self.label_fraction:g}: give a share above 0, up to 1")


# Keys of different kinds, all of which earlier versions wrote into the config of each run.
WRITTEN_BEFORE = {"kind", "label", "classes", "min_positives", "session", "arcface_scale", "arcface_margin"}


# -- labelled recordings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelling:
    """What is known of all recordings of a set, and which of them count."""

    target_RC: Floats  # no columns where nothing is to be told of a recording by itself
    reason_R: npt.NDArray[np.uint8]  # why a recording is left out, a place in LEFT_OUT_FOR; 0: it is not
    reasons: tuple[str, ...]  # those that could hold
    negative_R: Bools | None = None  # recordings with none of the classes, which count; None: there can be none
    other_classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> class that is not the task's -> recordings that carry it."""

    @property
    def labelled_R(self) -> Bools:
        """(R,) recordings that are not left out."""
        labelled_R: Bools = self.reason_R == 0
        return labelled_R


def leave_out(reason_R: npt.NDArray[np.uint8], where_R: Bools, reason: str) -> None:
    """Write down a reason where there is none yet."""
    reason_R[where_R & (reason_R == 0)] = LEFT_OUT_FOR.index(reason)


def label_values(shards: ShardSet, key: str, setting: str, metadata: bool = False) -> list[list[str] | None]:
    """What each recording has of a label, or with ``metadata`` of anything; None where it says nothing of it.

    Raises InputError for a key that no recording has.
    """
    values_R: list[list[str] | None] = []
    known = Counter[str]()
    for number in range(len(shards)):
        about = shards.metadata(number)
        values = {name: [str(value)] for name, value in about["metadata"].items()} | about["labels"]
        known.update(list(values if metadata else about["labels"]))
        values_R.append(values.get(key))
    if all(values is None for values in values_R):
        near = get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the recordings have {', '.join(known) or 'no labels at all'}"
        raise InputError(f"{setting} {key!r}: no recording has it; {hint}")
    return values_R


def leave_out_undrawn(shards: ShardSet, reason_R: npt.NDArray[np.uint8], fraction: float, seed: int) -> tuple[str, ...]:
    """Leave out training recordings of all but a share of the labelled patients; the reason, where it could hold."""
    if fraction == 1:
        return ()
    training_R, patient_R = shards.column("split") == SPLITS.index("train"), shards.column("patient")
    patients = np.unique(patient_R[training_R & (reason_R == 0)])
    word = random_words(seed, Purpose.LABELLED_PATIENTS, patients, 1)[:, 0]
    first = patients[np.argsort(word, kind="stable")][: max(1, round(fraction * len(patients)))]
    leave_out(reason_R, training_R & ~np.isin(patient_R, first), "not_drawn")
    return ("not_drawn",)


def refuse_empty_splits(
    shards: ShardSet, reason_R: npt.NDArray[np.uint8], splits: Sequence[str], lacking: str, hint: str = ""
) -> None:
    """Raises InputError for a split in which no recording counts: it has none ``lacking``."""
    split_R = shards.column("split")
    for split in splits:
        if not (reason_R == 0)[split_R == SPLITS.index(split)].any():
            raise InputError(f"the {split} split has no recording{lacking}{hint}")


# -- scores ----------------------------------------------------------------------------------------------------------


class TaskReport(Protocol):
    """The figures of a scored model."""

    @property
    def samples(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """(resamples,) bootstrap samples of each headline figure."""

    @property
    def headline(self) -> dict[str, Estimate]:
        """The figures that methods are compared by."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a figure that is not defined is None."""

    def scalars(self) -> dict[str, float]:
        """Name -> figure, as TensorBoard takes them; what is not defined is left out."""

    def table(self) -> str:
        """Markdown."""


class Thresholds(StrEnum):
    """Where the thresholds of a score come from."""

    OWN = "of the fine-tuning"
    TUNED = "tuned on the validation split of this set"
    OWN_VALIDATION = "of the fine-tuning, tuned on its validation split; if that is this one, F1 and the like flatter"
    TUNED_HERE = "tuned on these very recordings, so that F1 and the like flatter"
    OF_OTHER_LEADS = "of the fine-tuning, for its own leads, since this set has no validation recordings to tune them"


class Outcome(NamedTuple):
    """How a model does on a split."""

    report: TaskReport
    embedding_RD: Floats  # of the recordings that were scored
    label_R: list[str]  # what each of them is, for people
    target_RC: Floats  # labels and
    score_RC: Floats  # what the model says of them; no columns where it says nothing of a recording by itself
    thresholds: Thresholds | None = None  # by which figures decide; None: there are none
    left_out: Mapping[str, int] = {}  # labelled recordings that no figure counts, by their reasons


# -- the task --------------------------------------------------------------------------------------------------------


class Supervised(nn.Module):
    """Encoder, mean over time, linear head; the loss of a labelled batch."""

    def __init__(self, encoder: Encoder, outputs: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """``loss`` maps outputs and targets (B, C) to the mean over the rows."""
        super().__init__()
        self.encoder, self.loss = encoder, loss
        self.head = nn.Linear(encoder.config.width, outputs)
        for module in encoder.unused_unmasked():  # fine-tuning masks nothing in time
            module.requires_grad_(False)

    def forward(self, batch: ECGBatch, step: int = 0, share: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the rows."""
        embedding_BD = mean_over_time(*self.encoder(batch))
        output_BC = self.head(embedding_BD.to(self.head.weight.dtype)).float()
        assert batch.target_BC is not None
        loss = self.loss(output_BC, batch.target_BC)
        return loss, {"loss": loss.detach()}


class Task(ABC):
    """Says of labelled recordings what counts, of an encoder how it learns, and of a model how it does."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    """A frozen dataclass of the keys that the task has, each with a default but ``kind``."""
    protocols: ClassVar[tuple[str, ...]] = ("finetune",)
    """Values of ``task.protocol`` that it has."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Those of them that learn nothing: the model is the encoder as it was."""
    validated: ClassVar[bool] = True
    """Whether the loss can be had of the validation split while training."""
    tuned_keys: ClassVar[tuple[str, ...]] = ()
    """What ``tuned`` adds to the export; an export without it is of a fine-tuning that is not finished."""

    config: TaskConfig

    def __init__(self, config: TaskConfig) -> None:
        """Raises InputError where it has not the protocol."""
        self.config = config
        if config.protocol not in self.protocols:
            raise InputError(
                f"task.protocol {config.protocol}: task.kind {config.kind} has {', '.join(self.protocols)} alone"
            )

    @abstractmethod
    def label(
        self, shards: ShardSet, splits: Sequence[str] = SPLITS, seed: int = 0, trained: Mapping[str, Any] | None = None
    ) -> Labelling:
        """What the recordings' metadata says of them, and which of them count.

        ``trained`` is what an export says of a model that is to be scored, as ``about`` has it; its classes override
        the config's. ``seed`` draws the patients of ``label_fraction``. Raises InputError for an unknown label, and for
        a split among ``splits`` without labelled recordings.
        """

    @abstractmethod
    def objective(self, encoder: Encoder, labelling: Labelling, patient_R: npt.NDArray[np.int64]) -> nn.Module:
        """The encoder with its head, whose ``forward`` is that of ``Supervised``.

        ``patient_R`` are those of the training recordings. A part ``head`` is linear; an export holds all parts.
        """

    def about(self, labelling: Labelling) -> dict[str, Any]:
        """What an export says of the task beside its config, such as the classes in the order of the head."""
        return {}

    def fitted(self, model: ECGModel, labelled: LabelledSet) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """By the protocols that leave the encoder as it is: the head's weights, and what the export says of them."""
        return {}, {}

    def tuned(self, model: ECGModel, labelled: LabelledSet) -> dict[str, Any]:
        """What is chosen on the validation split for a trained model, by ``tuned_keys``."""
        return {}

    @abstractmethod
    def score(self, model: ECGModel, labelled: LabelledSet, split: str, as_trained: bool) -> Outcome:
        """How a model does; ``as_trained``: with the leads that it was trained with."""
