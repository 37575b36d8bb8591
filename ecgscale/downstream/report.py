"""All figures of one evaluation with their bootstrap intervals, as a table and as JSON.

Shape suffixes: B records, C classes, K classes and macro.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ecgscale.downstream.metrics import (
    SINUS_RHYTHM,
    Array,
    Bools,
    Floats,
    Metric,
    accuracy_exact_match,
    auprc,
    auroc,
    checked,
    f_measure,
    interval,
    resampled,
    sorted_alternatives,
    weighted_challenge,
    with_macro,
)
from ecgscale.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A figure and its bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def json_ready(report: Any) -> dict[str, Any]:
    """A report's fields but for its samples, NaN as None."""

    def ready(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in pairs}

    fields = asdict(replace(report, samples={}), dict_factory=ready)
    del fields["samples"]
    return fields


@dataclass(frozen=True)
class Row:
    """The figures of one class, or their macro average."""

    name: str
    positives: int  # records that carry the class; in the macro row, summed over the classes
    auroc: Estimate
    auprc: Estimate
    f_measure: Estimate


@dataclass(frozen=True)
class Report:
    """What ``evaluate`` found on one set of labelled records."""

    classes: tuple[Row, ...]
    macro: Row
    accuracy_exact_match: float
    challenge_score: Estimate | None
    records: int
    patients: int | None  # None: resampled by record
    resamples: int
    level: float
    samples: dict[str, Floats] = field(repr=False)  # (resamples,) of each headline figure

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a figure that is not defined is None."""
        return json_ready(self)

    @property
    def headline(self) -> dict[str, Estimate]:
        """The figures that methods are compared by."""
        named = {"auroc": self.macro.auroc, "auprc": self.macro.auprc, "f_measure": self.macro.f_measure}
        return named | ({} if self.challenge_score is None else {"challenge_score": self.challenge_score})

    def scalars(self) -> dict[str, float]:
        """Name -> figure, as TensorBoard takes them; what is not defined is left out."""
        named = {
            f"{metric}/{row.name}": getattr(row, metric).value
            for row in (*self.classes, self.macro)
            for metric in ("auroc", "auprc", "f_measure")
        }
        if self.challenge_score is not None:
            named["challenge_score"] = self.challenge_score.value
        return {name: value for name, value in named.items() if not math.isnan(value)}

    def table(self) -> str:
        """Markdown: a row per class and one for macro; below them the challenge score, if there is one."""
        lines = ["| class | n positive | AUROC | AUPRC | F1 |", "|---|---:|---|---|---|"]
        for row in (*self.classes, self.macro):
            name = row.name.replace("|", "\\|")
            lines.append(f"| {name} | {row.positives} | {row.auroc} | {row.auprc} | {row.f_measure} |")
        if self.challenge_score is not None:
            lines += ["", f"Challenge score {self.challenge_score}"]
        return "\n".join(lines)


def evaluate(
    label_BC: Array,
    score_BC: Array,
    prediction_BC: Array,
    classes: Sequence[str],
    groups_B: Array | None = None,
    challenge: tuple[Sequence[str], Floats] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Report:
    """Every figure with its interval: AUROC and AUPRC from the scores, F1 and the challenge score from predictions.

    ``groups_B`` are patient codes. ``challenge`` is what ``load_challenge_weights`` returned; its classes
    must be ``classes`` in the same order. Raises InputError for arrays or classes that do not fit together.
    """
    label, score = checked(label_BC, score_BC)
    prediction = np.asarray(prediction_BC, dtype=bool)
    if not (label.shape == prediction.shape and label.shape[1] == len(classes)):
        raise InputError(f"labels {label.shape}, predictions {prediction.shape} for {len(classes)} classes")

    samples: dict[str, Floats] = {}

    def estimates(name: str, metric: Metric, of: Bools | Floats) -> list[Estimate]:
        value_K = with_macro(metric(label, of, None)[:, None])[:, 0]
        value_KR = resampled(metric, label, of, resamples, seed, groups_B)
        samples[name] = value_KR[-1]
        low_K, high_K = interval(value_KR, level)
        return list(map(Estimate, value_K.tolist(), low_K.tolist(), high_K.tolist()))

    challenge_estimate = None
    if challenge is not None:
        names, weights_CC = challenge
        if [*map(sorted_alternatives, classes)] != [*map(sorted_alternatives, names)]:
            raise InputError(f"classes {', '.join(classes)} are not the challenge's {', '.join(names)}")
        score_of_challenge = partial(weighted_challenge, weights_CC, names, SINUS_RHYTHM)
        challenge_estimate = estimates("challenge_score", score_of_challenge, prediction)[0]
    figures = (
        estimates("auroc", auroc, score),
        estimates("auprc", auprc, score),
        estimates("f_measure", f_measure, prediction),
    )
    positives = (*label.sum(axis=0).tolist(), int(label.sum()))
    *rows, macro_row = map(Row, (*classes, "macro"), positives, *figures)
    patients = None if groups_B is None else len(np.unique(groups_B))
    accuracy = accuracy_exact_match(label, prediction)
    return Report(tuple(rows), macro_row, accuracy, challenge_estimate, len(label), patients, resamples, level, samples)
