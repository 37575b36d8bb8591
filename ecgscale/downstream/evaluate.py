"""`ecgscale evaluate`: score a fine-tuned model on a labelled split, by any lead sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ecgscale.choices import current
from ecgscale.config import build
from ecgscale.data.selection import DataConfig
from ecgscale.data.shard_set import lead_positions
from ecgscale.downstream import DEFAULT, TASKS, build_task
from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.downstream.labelled import LabelledSet
from ecgscale.downstream.task import Outcome, Task, Thresholds
from ecgscale.errors import InputError
from ecgscale.files import write_json
from ecgscale.inference import load
from ecgscale.lead_names import LEADS, chosen_leads, lead_set_name
from ecgscale.registry import is_code
from ecgscale.trained_on import Seen, TrainedOn


class Scored(NamedTuple):
    """How a model does with some leads."""

    leads: tuple[str, ...]
    outcome: Outcome
    coverage: Coverage
    trained_on: Seen


def evaluate(
    model_path: Path | str,
    shards: list[str],
    split: str,
    lead_sets: Sequence[Sequence[str]] = (),
    out: Path | None = None,
    min_scored_s: float | None = None,
    encoder: str = "",
    task: str = "",
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
    chosen_task, usual_s = _task_of(model_path, model.about, task, min_scored_s)
    if missing := [key for key in chosen_task.tuned_keys if key not in model.about]:
        raise InputError(f"{model_path}: has no {missing[0]}, since its fine-tuning is not finished; run it to the end")
    trained = model.leads
    chosen = [chosen_leads(list(leads)) or LEADS for leads in lead_sets] or [trained]
    for leads in chosen:
        if unseen := [lead for lead in leads if lead not in trained]:
            raise InputError(
                f"leads {','.join(leads)}: {model_path} was fine-tuned without {','.join(unseen)}; "
                f"give some of {','.join(trained)}"
            )
    data = DataConfig(shards=shards, min_record_s=usual_s)
    labelled = LabelledSet.open(model, data, chosen_task, model.about, [split])
    if lead_sets:
        _refuse_absent(labelled, split, chosen)
    trained_on = TrainedOn.of_model(Path(model_path))
    scored = []
    for leads in chosen:
        narrowed = labelled.with_leads(leads)
        seen = trained_on.among(narrowed.selection(split))
        outcome = chosen_task.score(model, narrowed, split, leads == trained)
        scored.append(Scored(leads, outcome, narrowed.coverage(split).leaving_out(outcome.left_out), seen))
    if out is not None:
        about: dict[str, Any] = {"model": str(model_path), "shards": shards, "split": split}
        about["fine_tuned_on"] = model.about.get("coverage")
        each = [_to_dict(one) for one in scored]
        write_json(out, about | (each[0] if len(each) == 1 else {"lead_sets": each}))
    return scored


def _task_of(
    model_path: Path | str, about: dict[str, Any], named: str, min_scored_s: float | None
) -> tuple[Task, float]:
    """The task of a fine-tuned model, with all labels, and data.min_record_s of its training.

    Raises InputError for a task of code that the user has not ``named``, and where this version does not know it.
    """
    kind = about["task"].get("kind", DEFAULT)
    if named and named != kind:
        raise InputError(f"{model_path}: its task is {str(kind)[:80]!r}, not {named!r}")
    if is_code(kind):
        TASKS.find_read(kind, model_path, [named])
    try:
        config = build(FinetuneConfig, current(FinetuneConfig, {"task": about["task"]})).task
        usual_s = float(about["min_record_s"])
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{model_path}: does not describe a task of this version ({error})") from error
    config = replace(config, label_fraction=1.0)  # which is for training alone
    if min_scored_s is not None:
        config = replace(config, min_scored_s=min_scored_s)
    return build_task(config), usual_s


def _to_dict(result: Scored) -> dict[str, Any]:
    report, thresholds = result.outcome.report, result.outcome.thresholds
    fields = {"leads": list(result.leads)} | report.to_dict() | {"coverage": result.coverage.to_dict()}
    fields["trained_on"] = result.trained_on.to_dict()
    values = {title(name): estimate.value for name, estimate in report.headline.items()}
    fields["headline"] = {name: None if math.isnan(value) else value for name, value in values.items()}
    return fields if thresholds is None else fields | {"thresholds": str(thresholds)}


def _refuse_absent(labelled: LabelledSet, split: str, lead_sets: Sequence[tuple[str, ...]]) -> None:
    """Raises InputError for a lead that no recording has: its figures would be those of another lead set."""
    bits = int(np.bitwise_or.reduce(labelled.shards.take("leads", labelled.selection(split).numbers)))
    there = {LEADS[position] for position in lead_positions(bits)}
    for leads in lead_sets:
        if absent := [lead for lead in leads if lead not in there]:
            raise InputError(f"leads {','.join(leads)}: no {split} recording has {','.join(absent)}")


def table(scored: Sequence[Scored]) -> str:
    """Markdown: of one lead set the whole report, of several a row each; then which recordings were scored."""
    lines = [scored[0].outcome.report.table()]
    if len(scored) > 1:
        names = list(scored[0].outcome.report.headline)
        lines = [
            f"| leads | {' | '.join(title(name) for name in names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for result in scored:
            cells = [str(result.outcome.report.headline[name]) for name in names]
            lines.append(f"| {lead_set_name(result.leads)} | {' | '.join(cells)} |")
    notes: dict[str, list[str]] = {}  # what is to be said -> lead sets of which it is true
    for result in scored:
        note = f"{result.coverage.text()}; {result.trained_on.text()}"
        if result.outcome.thresholds not in (None, Thresholds.OWN, Thresholds.TUNED):
            note += f"; thresholds {result.outcome.thresholds}"
        notes.setdefault(note, []).append(lead_set_name(result.leads))
    prefixed = len(notes) > 1
    return "\n".join(
        [*lines, "", *(f"leads {'; '.join(of)}: {note}" if prefixed else note for note, of in notes.items())]
    )


_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f_measure": "F1",
    "challenge_score": "challenge score",
    "top1": "top-1",
    "top5": "top-5",
    "eer": "equal error rate",
}


def title(figure: str) -> str:
    """A headline figure as tables name it."""
    return _TITLES.get(figure, figure)
