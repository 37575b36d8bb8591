"""Tasks that tell classes: any number of them each, or exactly one.

Shape suffixes: B rows, R recordings, C classes, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.classes import Classes, ClassesConfig, classes_of
from ecgscale.downstream.labelled import LabelledSet
from ecgscale.downstream.metrics import auroc, best_thresholds, macro
from ecgscale.downstream.report import evaluate
from ecgscale.downstream.task import Labelling, Outcome, Supervised, Task, Thresholds
from ecgscale.inference import ECGModel, Neighbours
from ecgscale.model import Encoder

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
_PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse L2 penalty of the probe, chosen on validation
_NEIGHBOURS = (5, 10, 20, 50, 100)  # how many vote, chosen on validation
_NEVER = -30.0  # logit of a class that the training split does not show


class ByClasses(Task):
    """Tells which of some classes a recording has."""

    protocols = ("finetune", "probe", "neighbours")
    exclusive: ClassVar[bool] = False
    """Whether each recording has exactly one class."""
    config: ClassesConfig

    def label(
        self, shards: ShardSet, splits: Sequence[str] = SPLITS, seed: int = 0, trained: Mapping[str, Any] | None = None
    ) -> Classes:
        return classes_of(shards, self.config, self.exclusive, splits, seed, trained)

    def objective(self, encoder: Encoder, labelling: Labelling, patient_R: npt.NDArray[np.int64]) -> Supervised:
        return Supervised(encoder, labelling.target_RC.shape[1], self.loss)

    def about(self, labelling: Labelling) -> dict[str, Any]:
        assert isinstance(labelling, Classes)
        challenge = None if labelling.challenge is None else labelling.challenge.tolist()
        return {"classes": list(labelling.classes), "challenge_weights": challenge}

    def fitted(self, model: ECGModel, labelled: LabelledSet) -> tuple[dict[str, Tensor], dict[str, Any]]:
        by_protocol = {"probe": self._probe, "neighbours": self._neighbours}
        return by_protocol[self.config.protocol](model, labelled)

    def score(self, model: ECGModel, labelled: LabelledSet, split: str, as_trained: bool) -> Outcome:
        known = labelled.labelling
        assert isinstance(known, Classes)
        embedding_RD, logit_RC = model.embed_and_classify(labelled.recordings(split))
        score_RC, target_RC = self.probabilities(logit_RC), labelled.targets(split)
        prediction_RC, thresholds = self.predictions(score_RC, model, labelled, as_trained)
        if thresholds and split == "validation":
            thresholds = Thresholds.OWN_VALIDATION if thresholds is Thresholds.OWN else Thresholds.TUNED_HERE
        challenge = None if known.challenge is None else (known.classes, known.challenge)
        report = evaluate(target_RC, score_RC, prediction_RC, known.classes, labelled.patients(split), challenge)
        names = ["|".join(np.array(known.classes)[row > 0]) or "none" for row in target_RC]
        return Outcome(report, embedding_RD, names, target_RC, score_RC, thresholds)

    @staticmethod
    @abstractmethod
    def loss(logit_BC: Tensor, target_BC: Tensor) -> Tensor:
        """Mean cross-entropy over the rows."""

    @abstractmethod
    def probabilities(self, logit_RC: Floats) -> Floats:
        """(R, C) probability of each class."""

    @abstractmethod
    def predictions(
        self, score_RC: Floats, model: ECGModel, labelled: LabelledSet, as_trained: bool
    ) -> tuple[Bools, Thresholds | None]:
        """(R, C) classes that recordings are taken to have, and where the thresholds come from."""

    def _probe(self, model: ECGModel, labelled: LabelledSet) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Logistic regression on standardised embeddings; its penalty is chosen by validation AUROC."""
        x = {s: model.embed_recordings(labelled.recordings(s)).record_embedding for s in ("train", "validation")}
        mean_D, std_D = x["train"].mean(axis=0), x["train"].std(axis=0) + 1e-6
        target_RC = labelled.targets("train")
        best: tuple[float, Floats, Floats] | None = None
        for strength in _PROBE_STRENGTHS:
            weight_CD, bias_C = logistic((x["train"] - mean_D) / std_D, target_RC, self.exclusive, strength)
            weight_CD /= std_D
            bias_C -= weight_CD @ mean_D
            score = macro(auroc(labelled.targets("validation"), x["validation"] @ weight_CD.T + bias_C))
            if best is None or score > best[0]:
                best = (score, weight_CD, bias_C)
        assert best is not None
        return {"weight": torch.from_numpy(best[1]), "bias": torch.from_numpy(best[2])}, {}

    def _neighbours(self, model: ECGModel, labelled: LabelledSet) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The training recordings as a bank; how many of them vote is chosen by validation AUROC."""
        x_RD, held_out_RD = (
            torch.from_numpy(model.embed_recordings(labelled.recordings(split)).record_embedding)
            for split in ("train", "validation")
        )
        centre_D = x_RD.mean(dim=0)
        bank_RD, target_RC = F.normalize(x_RD - centre_D, dim=1), torch.from_numpy(labelled.targets("train"))

        def score(k: int) -> float:
            votes = Neighbours(centre_D, bank_RD, target_RC, k, not self.exclusive)
            return macro(auroc(labelled.targets("validation"), votes(held_out_RD).numpy()))

        head = {"centre": centre_D, "bank": bank_RD, "target": target_RC}
        return head, {"neighbours": max(_NEIGHBOURS, key=score), "exclusive": self.exclusive}


class MultiLabel(ByClasses):
    """Any number of classes each; a threshold per class decides."""

    @dataclass(frozen=True)
    class Config(ClassesConfig):
        """Keys of the task of several classes."""

        kind: str = "multilabel"

    tuned_keys = ("thresholds",)

    @staticmethod
    def loss(logit_BC: Tensor, target_BC: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit_BC, target_BC)

    def probabilities(self, logit_RC: Floats) -> Floats:
        probability_RC: Floats = torch.from_numpy(logit_RC).sigmoid().numpy()
        return probability_RC

    def predictions(
        self, score_RC: Floats, model: ECGModel, labelled: LabelledSet, as_trained: bool
    ) -> tuple[Bools, Thresholds | None]:
        """By the model's own thresholds; for other leads, by ones of the validation split, where there is one."""
        thresholds, value_C = Thresholds.OWN, model.about["thresholds"]
        if not as_trained:
            thresholds = Thresholds.OF_OTHER_LEADS
            if len(labelled.selection("validation")):
                thresholds, value_C = Thresholds.TUNED, self.tuned(model, labelled)["thresholds"]
        threshold_C = [float("nan") if value is None else value for value in value_C]
        return score_RC >= np.array(threshold_C), thresholds

    def tuned(self, model: ECGModel, labelled: LabelledSet) -> dict[str, Any]:
        """Per class, the threshold with the best F1; None for a class without positives."""
        score_RC = self.probabilities(model.logits(labelled.recordings("validation")))
        threshold_C = best_thresholds(labelled.targets("validation"), score_RC)
        return {"thresholds": [None if np.isnan(value) else float(value) for value in threshold_C]}


class SingleLabel(ByClasses):
    """Exactly one class each: the most probable one."""

    @dataclass(frozen=True)
    class Config(ClassesConfig):
        """Keys of the task of one class each."""

        kind: str = "singlelabel"

    exclusive = True

    @staticmethod
    def loss(logit_BC: Tensor, target_BC: Tensor) -> Tensor:
        return F.cross_entropy(logit_BC, target_BC)

    def probabilities(self, logit_RC: Floats) -> Floats:
        probability_RC: Floats = torch.from_numpy(logit_RC).softmax(dim=1).numpy()
        return probability_RC

    def predictions(
        self, score_RC: Floats, model: ECGModel, labelled: LabelledSet, as_trained: bool
    ) -> tuple[Bools, Thresholds | None]:
        return np.eye(score_RC.shape[1], dtype=bool)[score_RC.argmax(axis=1)], None


def logistic(x_RD: Floats, target_RC: Floats, exclusive: bool, strength: float) -> tuple[Floats, Floats]:
    """Weights (C, D) and biases (C,) of one regression over all classes, or of one per class."""
    from sklearn.linear_model import LogisticRegression

    classes = target_RC.shape[1]
    weight_CD, bias_C = np.zeros((classes, x_RD.shape[1]), np.float32), np.full(classes, _NEVER, np.float32)
    regression = LogisticRegression(C=strength, max_iter=1000)
    if exclusive:
        regression.fit(x_RD, target_RC.argmax(axis=1))
        seen = regression.classes_
        bias_C[seen] = 0.0
        fitted = seen[1:] if len(seen) == 2 else seen  # of two classes, scikit-learn gives the second against the first
        weight_CD[fitted], bias_C[fitted] = regression.coef_, regression.intercept_
        return weight_CD, bias_C
    for c, target_R in enumerate(target_RC.T):
        if target_R.any() and not target_R.all():
            regression.fit(x_RD, target_R)
            weight_CD[c], bias_C[c] = regression.coef_[0], regression.intercept_[0]
    return weight_CD, bias_C
