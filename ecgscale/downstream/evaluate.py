"""`ecgscale evaluate`: score a fine-tuned model on labelled recordings.

Shape suffixes: R recordings, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet, lead_positions
from ecgscale.data.shards import SPLITS, write_whole
from ecgscale.downstream.metrics import best_thresholds
from ecgscale.downstream.report import Report
from ecgscale.downstream.report import evaluate as evaluate_scores
from ecgscale.downstream.tasks import Task, TaskConfig, TrainedTask, load_task
from ecgscale.errors import InputError
from ecgscale.inference import ECGModel, Recording, load

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledSet:
    """Shards with a task, read with a model's preprocessing."""

    shards: ShardSet
    data: DataConfig
    task: Task

    @staticmethod
    def open(
        model: ECGModel, data: DataConfig, config: TaskConfig, splits: Sequence[str] = SPLITS, seed: int = 0
    ) -> LabelledSet:
        """Raises InputError where the shards have another rate than the model, or not the labels.

        A model that was fine-tuned brings its classes along. ``seed`` draws the patients of ``task.label_fraction``.
        """
        shards, profile = ShardSet.open(data.shards, data.cache), model.profile
        if shards.rate_hz != profile.rate_hz:
            raise InputError(
                f"the model takes {profile.rate_hz:g} Hz, the shards have {shards.rate_hz:g} Hz; ingest at its rate"
            )
        read_as = replace(data, segment_s=profile.segment_s, normalisation=profile.normalisation)
        return LabelledSet(shards, read_as, load_task(shards, config, _trained(model), splits, seed))

    def selection(self, split: str) -> Selection:
        return Selection(self.shards, self.data, split, self.task.labelled_R)

    def recordings(self, split: str, shown: bool = True) -> Iterator[Recording]:
        """The labelled recordings of a split with the leads that are kept, in their order on disk; a progress bar."""
        kept = frozenset(self.data.lead_positions)
        number_R, take = self.selection(split).numbers, self.shards.take
        signals = self.shards.windows(number_R, [0] * len(number_R), take("samples", number_R).tolist())
        described = zip(signals, take("leads", number_R).tolist(), take("scale", number_R), strict=True)
        bar = tqdm(described, f"embed {split}", len(number_R), unit="rec", disable=None if shown else True, leave=False)
        for signal_LT, bits, scale_L in bar:
            there = lead_positions(bits)
            rows = [row for row, lead in enumerate(there) if lead in kept]
            at = [there[row] for row in rows]
            yield Recording(signal_LT if at == there else signal_LT[rows], scale_L[at], at)

    def targets(self, split: str) -> Floats:
        """(R, C) labels in the order of ``recordings``."""
        return self.task.target_RC[self.selection(split).numbers]

    def patients(self, split: str) -> npt.NDArray[np.int64]:
        """(R,) patient codes in the order of ``recordings``."""
        codes: npt.NDArray[np.int64] = self.shards.take("patient", self.selection(split).numbers)
        return codes


def evaluate(model_path: Path | str, shards: list[str], split: str, out: Path | None) -> Report:
    """Score a fine-tuned model on a split, with the leads that it was trained with and the thresholds tuned then.

    Raises InputError for a model without a head and for shards without its labels or of another rate.
    """
    model = load(model_path)
    if model.head is None:
        raise InputError(f"{model_path}: has no classification head; give a run of `ecgscale finetune`")
    if "thresholds" not in model.about:
        raise InputError(f"{model_path}: has no thresholds, since its fine-tuning is not finished; run it to the end")
    config = replace(TaskConfig(**model.about["task"]), label_fraction=1.0)  # which is for training alone
    data = DataConfig(shards=shards, min_record_s=model.about["min_record_s"], leads=model.about.get("leads", []))
    labelled = LabelledSet.open(model, data, config, [split])
    score_RC = probabilities(model, labelled, split)
    if config.kind == "multilabel":
        threshold_C = [float("nan") if value is None else value for value in model.about["thresholds"]]
        prediction_RC = score_RC >= np.array(threshold_C)
    else:
        prediction_RC = np.eye(score_RC.shape[1], dtype=bool)[score_RC.argmax(axis=1)]
    task = labelled.task
    challenge = None if task.challenge is None else (task.classes, task.challenge)
    report = evaluate_scores(
        labelled.targets(split), score_RC, prediction_RC, task.classes, labelled.patients(split), challenge
    )
    if out is not None:
        about = {"model": str(model_path), "shards": shards, "split": split} | report.to_dict()
        write_whole(out, json.dumps(about, indent=1).encode())
    return report


def _trained(model: ECGModel) -> TrainedTask | None:
    if model.head is None:
        return None
    return TrainedTask(model.about["classes"], model.about["challenge_weights"])


def tuned_thresholds(model: ECGModel, labelled: LabelledSet) -> list[float | None]:
    """Per class, the threshold with the best F1 on the validation split; None for a class without positives there."""
    threshold_C = best_thresholds(labelled.targets("validation"), probabilities(model, labelled, "validation"))
    return [None if np.isnan(value) else float(value) for value in threshold_C]


def probabilities(model: ECGModel, labelled: LabelledSet, split: str) -> Floats:
    """(R, C) probability of each class."""
    logit_RC = torch.from_numpy(model.logits(labelled.recordings(split)))
    multilabel = labelled.task.kind == "multilabel"
    probability_RC: Floats = (logit_RC.sigmoid() if multilabel else logit_RC.softmax(dim=1)).numpy()
    return probability_RC
