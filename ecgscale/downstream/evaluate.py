"""`ecgscale evaluate`: score a fine-tuned model on a labelled split, by any lead sets.

Shape suffixes: R recordings, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet, lead_positions
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.identification import IdentificationReport, identify
from ecgscale.downstream.metrics import best_thresholds
from ecgscale.downstream.report import Report
from ecgscale.downstream.report import evaluate as evaluate_scores
from ecgscale.downstream.tasks import LEFT_OUT_FOR, Task, TaskConfig, TrainedTask, leave_out, load_task
from ecgscale.errors import InputError
from ecgscale.files import write_json
from ecgscale.inference import ECGModel, Recording, load, recordings_of
from ecgscale.record import LEADS, chosen_leads, lead_set_name
from ecgscale.trained_on import Seen, TrainedOn

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledSet:
    """Shards with a task, read with a model's preprocessing."""

    shards: ShardSet
    data: DataConfig
    task: Task
    shortest_s: Mapping[str, float]  # of each split: shorter recordings are left out
    usual_s: float  # data.min_record_s of the training

    @staticmethod
    def open(
        model: ECGModel,
        data: DataConfig,
        config: TaskConfig,
        trained: TrainedTask | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 0,
        training: bool = False,
    ) -> LabelledSet:
        """Raises InputError where the shards have another rate than the model, not the labels, or no long recordings.

        ``trained``: the classes of a fine-tuned model. ``seed`` draws the patients of ``task.label_fraction``.
        In ``training``, recordings of the training split are at least data.min_record_s long; all others
        task.min_scored_s, and a token.
        """
        shards, profile = ShardSet.open(data.shards, data.cache), model.profile
        if shards.rate_hz != profile.rate_hz:
            raise InputError(
                f"the model takes {profile.rate_hz:g} Hz, the shards have {shards.rate_hz:g} Hz; ingest at its rate"
            )
        read_as = replace(data, segment_s=profile.segment_s, normalisation=profile.normalisation)
        token_s = model.encoder.config.patch_samples / profile.rate_hz
        shortest_s = dict.fromkeys(SPLITS, max(config.min_scored_s, token_s))
        if training:
            shortest_s["train"] = max(data.min_record_s, token_s)
        task = load_task(shards, config, trained, splits, seed)
        labelled = LabelledSet(shards, read_as, task, shortest_s, data.min_record_s)
        for split in splits:
            setting = "data.min_record_s" if training and split == "train" else "task.min_scored_s"
            labelled.selection(split).refuse_empty(setting)
        return labelled

    def with_leads(self, leads: Sequence[str]) -> LabelledSet:
        """The same recordings with these leads alone; none: all."""
        return replace(self, data=replace(self.data, leads=list(leads)))

    def selection(self, split: str) -> Selection:
        """The recordings of a split that are used."""
        data = replace(self.data, min_record_s=self.shortest_s[split])
        return Selection(self.shards, data, split, self.task.labelled_R & (self._kept_leads_R > 0))

    @cached_property
    def _kept_leads_R(self) -> npt.NDArray[np.uint16]:
        """(R,) bits of the leads that a recording has and that are kept."""
        kept_bits = sum(1 << position for position in self.data.lead_positions)
        kept_R: npt.NDArray[np.uint16] = self.shards.column("leads") & np.uint16(kept_bits)
        return kept_R

    def coverage(self, split: str) -> Coverage:
        """How many recordings of a split are used, and why the others are not."""
        in_split_R = self.shards.column("split") == SPLITS.index(split)
        seconds_R = self.shards.column("samples")[in_split_R] / self.shards.rate_hz
        kept_R, reason_R = self._kept_leads_R[in_split_R], self.task.reason_R[in_split_R].copy()
        leave_out(reason_R, kept_R == 0, "no_lead")
        leave_out(reason_R, seconds_R < self.shortest_s[split], "too_short")
        counts = np.bincount(reason_R, minlength=len(LEFT_OUT_FOR)).tolist()
        left_out = {
            reason: counts[LEFT_OUT_FOR.index(reason)] for reason in (*self.task.reasons, "no_lead", "too_short")
        }
        used_R, negative = reason_R == 0, None
        assert counts[0] + sum(left_out.values()) == len(reason_R)
        if self.task.kind == "multilabel":
            negative = int((self.task.target_RC[in_split_R][used_R].sum(axis=1) == 0).sum())
        return Coverage(
            split,
            asked_for=len(reason_R),
            used=counts[0],
            left_out=left_out,
            shortest_s=self.shortest_s[split],
            usual_s=self.usual_s,
            below_usual=int((seconds_R[used_R] < self.usual_s).sum()),
            leads=len(self.data.lead_positions),
            fewer_leads=int((np.bitwise_count(kept_R[used_R]) < len(self.data.lead_positions)).sum()),
            negative=negative,
            other_classes=self.task.other_classes.get(split, {}),
        )

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


class Thresholds(StrEnum):
    """Where the thresholds of a score come from."""

    OWN = "of the fine-tuning"
    TUNED = "tuned on the validation split of this set"
    OWN_VALIDATION = "of the fine-tuning, tuned on its validation split; if that is this one, F1 and the like flatter"
    TUNED_HERE = "tuned on these very recordings, so that F1 and the like flatter"
    OF_OTHER_LEADS = "of the fine-tuning, for its own leads, since this set has no validation recordings to tune them"


class Scored(NamedTuple):
    """How a model does with some leads."""

    leads: tuple[str, ...]
    report: Report | IdentificationReport
    coverage: Coverage
    trained_on: Seen
    thresholds: Thresholds | None  # by which F1 and challenge score decide; None: there are none
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
    min_scored_s: float | None = None,
    encoder: str = "",
) -> list[Scored]:
    """Score a fine-tuned model on a split, once for each lead set; none: with the leads that it was trained with.

    Thresholds are those that were tuned on validation when it was trained; for other leads than it was trained with,
    they are tuned on the validation split of ``shards``, where that has recordings. ``min_scored_s``: shorter
    recordings are left out; None: as its task.min_scored_s says. Raises InputError for a model that was not
    fine-tuned, for shards without its labels or of another rate, and for leads that fine-tuning masked.
    """
    model = load(model_path, encoder)
    if "task" not in model.about:
        what = "was fine-tuned by another system, for a task that is not known" if model.head else "was not fine-tuned"
        raise InputError(f"{model_path}: {what}; give a run of `ecgscale finetune`")
    try:
        config, usual_s = TaskConfig(**model.about["task"]), float(model.about["min_record_s"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{model_path}: does not describe a task of this version ({error})") from error
    config = replace(config, label_fraction=1.0)  # which is for training alone
    if min_scored_s is not None:
        config = replace(config, min_scored_s=min_scored_s)
    if config.kind == "multilabel" and "thresholds" not in model.about:
        raise InputError(f"{model_path}: has no thresholds, since its fine-tuning is not finished; run it to the end")
    trained = model.leads
    chosen = [chosen_leads(list(leads)) or LEADS for leads in lead_sets] or [trained]
    for leads in chosen:
        if unseen := [lead for lead in leads if lead not in trained]:
            raise InputError(
                f"leads {','.join(leads)}: {model_path} was fine-tuned without {','.join(unseen)}; "
                f"give some of {','.join(trained)}"
            )
    data = DataConfig(shards=shards, min_record_s=usual_s)
    labelled = LabelledSet.open(model, data, config, _trained(model), [split])
    if lead_sets:
        _refuse_absent(labelled, split, chosen)
    trained_on = TrainedOn.of_model(Path(model_path))
    scored = []
    for leads in chosen:
        narrowed = labelled.with_leads(leads)
        seen = trained_on.among(narrowed.selection(split))
        scored.append(_scored(model, narrowed, config, split, leads, leads == trained, seen))
    if out is not None:
        about: dict[str, Any] = {"model": str(model_path), "shards": shards, "split": split}
        about["fine_tuned_on"] = model.about.get("coverage")
        each = [_to_dict(one) for one in scored]
        write_json(out, about | (each[0] if len(each) == 1 else {"lead_sets": each}))
    return scored


def _to_dict(one: Scored) -> dict[str, Any]:
    fields = {"leads": list(one.leads)} | one.report.to_dict() | {"coverage": one.coverage.to_dict()}
    fields["trained_on"] = one.trained_on.to_dict()
    return fields if one.thresholds is None else fields | {"thresholds": str(one.thresholds)}


def _refuse_absent(labelled: LabelledSet, split: str, lead_sets: Sequence[tuple[str, ...]]) -> None:
    """Raises InputError for a lead that no recording has: its figures would be those of another lead set."""
    bits = int(np.bitwise_or.reduce(labelled.shards.take("leads", labelled.selection(split).numbers)))
    there = {LEADS[position] for position in lead_positions(bits)}
    for leads in lead_sets:
        if absent := [lead for lead in leads if lead not in there]:
            raise InputError(f"leads {','.join(leads)}: no {split} recording has {','.join(absent)}")


def _scored(
    model: ECGModel,
    labelled: LabelledSet,
    config: TaskConfig,
    split: str,
    leads: tuple[str, ...],
    as_trained: bool,
    seen: Seen,
) -> Scored:
    patient_R, recordings, coverage = labelled.patients(split), labelled.recordings(split), labelled.coverage(split)
    if config.kind == "identification":
        embedding_RD = model.embed_recordings(recordings).record_embedding
        report = identify(embedding_RD, patient_R, labelled.sessions(split), config.one_probe)
        coverage = coverage.leaving_out(report.left_out)
        nothing_RC = np.zeros((len(patient_R), 0), np.float32)
        label_R = [f"patient {code}" for code in patient_R]
        return Scored(leads, report, coverage, seen, None, embedding_RD, label_R, nothing_RC, nothing_RC)
    embedding_RD, logit_RC = model.embed_and_classify(recordings)
    score_RC, target_RC, task = _probabilities(logit_RC, config.kind), labelled.targets(split), labelled.task
    thresholds = None
    if config.kind == "multilabel":
        thresholds = Thresholds.OWN
        if not as_trained:
            to_tune = len(labelled.selection("validation"))
            thresholds = Thresholds.TUNED if to_tune else Thresholds.OF_OTHER_LEADS
        tuned = thresholds == Thresholds.TUNED
        if split == "validation":
            thresholds = Thresholds.TUNED_HERE if tuned else Thresholds.OWN_VALIDATION
        value_C = tuned_thresholds(model, labelled) if tuned else model.about["thresholds"]
        threshold_C = [float("nan") if value is None else value for value in value_C]
        prediction_RC = score_RC >= np.array(threshold_C)
    else:
        prediction_RC = np.eye(score_RC.shape[1], dtype=bool)[score_RC.argmax(axis=1)]
    challenge = None if task.challenge is None else (task.classes, task.challenge)
    report_of_classes = evaluate_scores(target_RC, score_RC, prediction_RC, task.classes, patient_R, challenge)
    names = ["|".join(np.array(task.classes)[row > 0]) or "none" for row in target_RC]
    return Scored(leads, report_of_classes, coverage, seen, thresholds, embedding_RD, names, target_RC, score_RC)


def table(scored: Sequence[Scored]) -> str:
    """Markdown: of one lead set the whole report, of several a row each; then which recordings were scored."""
    lines = [scored[0].report.table()]
    if len(scored) > 1:
        names = list(scored[0].report.headline)
        lines = [f"| leads | {' | '.join(FIGURES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
        for one in scored:
            cells = [str(one.report.headline[name]) for name in names]
            lines.append(f"| {lead_set_name(one.leads)} | {' | '.join(cells)} |")
    notes: dict[str, list[str]] = {}  # what is to be said -> lead sets of which it is true
    for one in scored:
        note = f"{one.coverage.text()}; {one.trained_on.text()}"
        if one.thresholds not in (None, Thresholds.OWN, Thresholds.TUNED):
            note += f"; thresholds {one.thresholds}"
        notes.setdefault(note, []).append(lead_set_name(one.leads))
    prefixed = len(notes) > 1
    return "\n".join(
        [*lines, "", *(f"leads {'; '.join(of)}: {note}" if prefixed else note for note, of in notes.items())]
    )


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
