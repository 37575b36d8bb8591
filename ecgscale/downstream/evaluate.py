"""`ecgscale evaluate`: score a fine-tuned model on a labelled split, by any lead sets.

Shape suffixes: R recordings, C classes, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet, lead_positions
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.identification import IdentificationReport, identify
from ecgscale.downstream.metrics import best_thresholds
from ecgscale.downstream.report import Report
from ecgscale.downstream.report import evaluate as evaluate_scores
from ecgscale.downstream.tasks import Task, TaskConfig, TrainedTask, load_task
from ecgscale.errors import InputError
from ecgscale.files import write_whole
from ecgscale.inference import ECGModel, Recording, load, recordings_of
from ecgscale.record import LEADS, chosen_leads, lead_set_name

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledSet:
    """Shards with a task, read with a model's preprocessing."""

    shards: ShardSet
    data: DataConfig
    task: Task

    @staticmethod
    def open(
        model: ECGModel,
        data: DataConfig,
        config: TaskConfig,
        trained: TrainedTask | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 0,
    ) -> LabelledSet:
        """Raises InputError where the shards have another rate than the model, or not the labels.

        ``trained``: the classes of a fine-tuned model. ``seed`` draws the patients of ``task.label_fraction``.
        """
        shards, profile = ShardSet.open(data.shards, data.cache), model.profile
        if shards.rate_hz != profile.rate_hz:
            raise InputError(
                f"the model takes {profile.rate_hz:g} Hz, the shards have {shards.rate_hz:g} Hz; ingest at its rate"
            )
        read_as = replace(data, segment_s=profile.segment_s, normalisation=profile.normalisation)
        return LabelledSet(shards, read_as, load_task(shards, config, trained, splits, seed))

    def with_leads(self, leads: Sequence[str]) -> LabelledSet:
        """The same recordings with these leads alone; none: all."""
        return replace(self, data=replace(self.data, leads=list(leads)))

    def selection(self, split: str) -> Selection:
        return Selection(self.shards, self.data, split, self.task.labelled_R)

    def recordings(self, split: str) -> Iterator[Recording]:
        """The labelled recordings of a split with the leads that are kept, in their order on disk; a progress bar."""
        return recordings_of(self.selection(split))

    def targets(self, split: str) -> Floats:
        """(R, C) labels in the order of ``recordings``."""
        return self.task.target_RC[self.selection(split).numbers]

    def sessions(self, split: str) -> npt.NDArray[np.int64]:
        """(R,) sessions in the order of ``recordings``, for identification."""
        assert self.task.session_R is not None
        return self.task.session_R[self.selection(split).numbers]

    def patients(self, split: str) -> npt.NDArray[np.int64]:
        """(R,) patient codes in the order of ``recordings``."""
        codes: npt.NDArray[np.int64] = self.shards.take("patient", self.selection(split).numbers)
        return codes


class Scored(NamedTuple):
    """How a model does with some leads."""

    leads: tuple[str, ...]
    report: Report | IdentificationReport
    embedding_RD: Floats  # of the recordings that were scored
    label_R: list[str]  # what each of them is, for people
    target_RC: Floats  # labels and
    score_RC: Floats  # probabilities of the classes; no columns in identification


def evaluate(
    model_path: Path | str,
    shards: list[str],
    split: str,
    lead_sets: Sequence[Sequence[str]] = (),
    out: Path | None = None,
) -> list[Scored]:
    """Score a fine-tuned model on a split, once for each lead set; none: with the leads that it was trained with.

    Thresholds are those that were tuned on validation when it was trained; for other leads than it was trained with,
    they are tuned on the validation split of ``shards``. Raises InputError for a model that was not fine-tuned, for
    shards without its labels or of another rate, and for leads that fine-tuning masked.
    """
    model = load(model_path)
    if "task" not in model.about:
        what = "was fine-tuned by another system, for a task that is not known" if model.head else "was not fine-tuned"
        raise InputError(f"{model_path}: {what}; give a run of `ecgscale finetune`")
    config = replace(TaskConfig(**model.about["task"]), label_fraction=1.0)  # which is for training alone
    if config.kind == "multilabel" and "thresholds" not in model.about:
        raise InputError(f"{model_path}: has no thresholds, since its fine-tuning is not finished; run it to the end")
    trained = chosen_leads(model.about.get("leads", [])) or LEADS
    chosen = [chosen_leads(list(leads)) or LEADS for leads in lead_sets] or [trained]
    for leads in chosen:
        if unseen := [lead for lead in leads if lead not in trained]:
            raise InputError(
                f"leads {','.join(leads)}: {model_path} was fine-tuned without {','.join(unseen)}; "
                f"give some of {','.join(trained)}"
            )
    to_tune = config.kind == "multilabel" and any(leads != trained for leads in chosen)
    splits = list(dict.fromkeys([split, "validation"])) if to_tune else [split]
    data = DataConfig(shards=shards, min_record_s=model.about["min_record_s"])
    labelled = LabelledSet.open(model, data, config, _trained(model), splits)
    if lead_sets:
        _refuse_absent(labelled, split, chosen)
    scored = [_scored(model, labelled.with_leads(leads), config, split, leads, leads == trained) for leads in chosen]
    if out is not None:
        about = {"model": str(model_path), "shards": shards, "split": split}
        each = [{"leads": list(one.leads)} | one.report.to_dict() for one in scored]
        write_whole(out, json.dumps(about | (each[0] if len(each) == 1 else {"lead_sets": each}), indent=1).encode())
    return scored


def _refuse_absent(labelled: LabelledSet, split: str, lead_sets: Sequence[tuple[str, ...]]) -> None:
    """Raises InputError for a lead that no recording has: its figures would be those of another lead set."""
    bits = int(np.bitwise_or.reduce(labelled.shards.take("leads", labelled.selection(split).numbers)))
    there = {LEADS[position] for position in lead_positions(bits)}
    for leads in lead_sets:
        if absent := [lead for lead in leads if lead not in there]:
            raise InputError(f"leads {','.join(leads)}: no {split} recording has {','.join(absent)}")


def _scored(
    model: ECGModel, labelled: LabelledSet, config: TaskConfig, split: str, leads: tuple[str, ...], as_trained: bool
) -> Scored:
    patient_R, recordings = labelled.patients(split), labelled.recordings(split)
    if config.kind == "identification":
        embedding_RD = model.embed_recordings(recordings).record_embedding
        found = identify(embedding_RD, patient_R, labelled.sessions(split), config.one_probe)
        nothing_RC = np.zeros((len(patient_R), 0), np.float32)
        return Scored(leads, found, embedding_RD, [f"patient {code}" for code in patient_R], nothing_RC, nothing_RC)
    embedding_RD, logit_RC = model.embed_and_classify(recordings)
    score_RC, target_RC, task = _probabilities(logit_RC, config.kind), labelled.targets(split), labelled.task
    if config.kind == "multilabel":
        tuned = model.about["thresholds"] if as_trained else tuned_thresholds(model, labelled)
        threshold_C = [float("nan") if value is None else value for value in tuned]
        prediction_RC = score_RC >= np.array(threshold_C)
    else:
        prediction_RC = np.eye(score_RC.shape[1], dtype=bool)[score_RC.argmax(axis=1)]
    challenge = None if task.challenge is None else (task.classes, task.challenge)
    report = evaluate_scores(target_RC, score_RC, prediction_RC, task.classes, patient_R, challenge)
    names = ["|".join(np.array(task.classes)[row > 0]) or "none" for row in target_RC]
    return Scored(leads, report, embedding_RD, names, target_RC, score_RC)


def table(scored: Sequence[Scored]) -> str:
    """Markdown: of one lead set the whole report, of several a row each."""
    if len(scored) == 1:
        return scored[0].report.table()
    names = list(scored[0].report.headline)
    lines = [f"| leads | {' | '.join(FIGURES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for one in scored:
        cells = [str(one.report.headline[name]) for name in names]
        lines.append(f"| {lead_set_name(one.leads)} | {' | '.join(cells)} |")
    return "\n".join(lines)


FIGURES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f_measure": "F1",
    "challenge_score": "challenge score",
    "top1": "top-1",
    "top5": "top-5",
    "eer": "equal error rate",
}


def _trained(model: ECGModel) -> TrainedTask | None:
    if "classes" not in model.about:
        return None
    return TrainedTask(model.about["classes"], model.about["challenge_weights"])


def tuned_thresholds(model: ECGModel, labelled: LabelledSet) -> list[float | None]:
    """Per class, the threshold with the best F1 on the validation split; None for a class without positives there."""
    score_RC = _probabilities(model.logits(labelled.recordings("validation")), labelled.task.kind)
    threshold_C = best_thresholds(labelled.targets("validation"), score_RC)
    return [None if np.isnan(value) else float(value) for value in threshold_C]


def _probabilities(logit_RC: Floats, kind: str) -> Floats:
    """(R, C) probability of each class."""
    logits = torch.from_numpy(logit_RC)
    probability_RC: Floats = (logits.sigmoid() if kind == "multilabel" else logits.softmax(dim=1)).numpy()
    return probability_RC
