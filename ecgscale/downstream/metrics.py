"""Multi-label metrics as the official CinC 2021 scorer defines them, with bootstrap intervals over patients.

A figure that is not defined, such as the AUROC of a class without positives, is NaN; macro averages leave
it out. A bootstrap resample is a column of ``count_BR``: how often each record was drawn. Every metric takes
these counts, so that one sort of the scores serves all resamples; its figures (C,) then become (C, R).

Source: Reyna et al., "Will Two Do? Varying Dimensions in Electrocardiography", Computing in Cardiology 2021.
Shape suffixes: B records, C classes, R resamples, T distinct scores, G patients, K classes and macro.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.errors import InputError, unreadable

SINUS_RHYTHM = "426783006"  # SNOMED CT code, the challenge's normal class
_CHUNK = 1 << 18  # counts held at once, 2 MB: the passes over a chunk of resamples stay in cache

Array = npt.ArrayLike
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Metric = Callable[[Array, Array, Floats | None], Floats]


def auroc(label_BC: Array, score_BC: Array, count_BR: Floats | None = None) -> Floats:
    """Area under the ROC curve per class: the trapezoid over distinct scores, so that a tie counts one half.

    Returns (C,) or (C, R); NaN where a class has no positives or no negatives.
    Raises InputError for labels other than 0 and 1, scores that are not finite, or shapes that differ.
    """

    def area(hit_TR: Floats, false_TR: Floats) -> Floats:
        height_TR, width_TR = (hit_TR[1:] + hit_TR[:-1]) / 2, np.diff(false_TR, axis=0)
        return _ratio((height_TR * width_TR).sum(axis=0), hit_TR[-1] * false_TR[-1])

    return _per_class(area, label_BC, score_BC, count_BR)


def auprc(label_BC: Array, score_BC: Array, count_BR: Floats | None = None) -> Floats:
    """Average precision per class: Σ Δrecall · precision over distinct scores, without interpolation.

    Returns (C,) or (C, R); NaN where a class has no positives. Raises InputError as ``auroc`` does.
    """

    def area(hit_TR: Floats, false_TR: Floats) -> Floats:
        # A resample may hold no record this high up: precision 0 / 0, and no recall to multiply it with.
        precision_TR = hit_TR[1:] / np.maximum(hit_TR[1:] + false_TR[1:], 1.0)
        return _ratio((np.diff(hit_TR, axis=0) * precision_TR).sum(axis=0), hit_TR[-1])

    return _per_class(area, label_BC, score_BC, count_BR)


def f_measure(label_BC: Array, prediction_BC: Array, count_BR: Floats | None = None) -> Floats:
    """F1 per class, 2·TP / (2·TP + FP + FN).

    Returns (C,) or (C, R); NaN where a class has neither positives nor predictions.
    Raises InputError for labels or predictions other than 0 and 1, or shapes that differ.
    """
    label_BC, prediction_BC = _checked_predictions(label_BC, prediction_BC)
    drawn_BR = _drawn(label_BC, count_BR)
    hit_CR = (label_BC & prediction_BC).T.astype(np.float64) @ drawn_BR
    named_CR = (label_BC.astype(np.float64) + prediction_BC).T @ drawn_BR
    value_CR = _ratio(2 * hit_CR, named_CR)
    return value_CR[:, 0] if count_BR is None else value_CR


def accuracy_exact_match(label_BC: Array, prediction_BC: Array) -> float:
    """Share of the records with every class right. Raises InputError as ``f_measure`` does."""
    label_BC, prediction_BC = _checked_predictions(label_BC, prediction_BC)
    return float((label_BC == prediction_BC).all(axis=1).mean())


def macro(values_C: Array) -> float:
    """Mean over the classes where the figure is defined; NaN where it is nowhere."""
    return float(_macro_R(np.asarray(values_C, dtype=np.float64)[:, None])[0])


def best_thresholds(label_BC: Array, score_BC: Array) -> Floats:
    """The threshold (C,) of each class with the greatest F1 when ``score >= threshold`` predicts the class.

    Meant for validation records. The highest of equally good ones; NaN, which predicts nothing, for a class
    without positives. Raises InputError as ``auroc`` does.
    """
    label, score = checked(label_BC, score_BC)
    threshold_C = np.full(label.shape[1], np.nan)
    for c in np.flatnonzero(label.any(axis=0)):
        hit_TR, false_TR = _curve(label[:, c], score[:, c], _drawn(label, None))
        f1_TR = 2 * hit_TR / (hit_TR + false_TR + hit_TR[-1])
        threshold_C[c] = np.unique(score[:, c])[::-1][np.argmax(f1_TR[1:, 0])]
    return threshold_C


def _per_class(
    area: Callable[[Floats, Floats], Floats], label_BC: Array, score_BC: Array, count_BR: Floats | None
) -> Floats:
    label, score = checked(label_BC, score_BC)
    drawn_BR = _drawn(label, count_BR)
    value_CR = np.array([area(*_curve(label[:, c], score[:, c], drawn_BR)) for c in range(label.shape[1])])
    return value_CR[:, 0] if count_BR is None else value_CR


def _curve(label_B: Bools, score_B: Floats, count_BR: Floats) -> tuple[Floats, Floats]:
    """True and false positives (T + 1, R): for no record, then down to each distinct score."""
    order = np.argsort(-score_B)
    score_B, label_B, count_BR = score_B[order], label_B[order], count_BR[order]
    starts = np.flatnonzero(np.append(True, score_B[1:] != score_B[:-1]))
    positive_BR = count_BR * label_B[:, None]
    curves = np.zeros((2, len(starts) + 1, count_BR.shape[1]))
    for curve, counted_BR in zip(curves, (positive_BR, count_BR - positive_BR), strict=True):
        np.cumsum(np.add.reduceat(counted_BR, starts, axis=0), axis=0, out=curve[1:])
    return curves[0], curves[1]


def roc_curve(label_B: Array, score_B: Array) -> tuple[Floats, Floats]:
    """False and true positive rates (T + 1,) of a class that has both, from none predicted down to every score."""
    label, score = np.asarray(label_B, dtype=np.bool_)[:, None], np.asarray(score_B, dtype=np.float64)
    hit_TR, false_TR = _curve(label[:, 0], score, _drawn(label, None))
    return false_TR[:, 0] / false_TR[-1, 0], hit_TR[:, 0] / hit_TR[-1, 0]


def _macro_R(value_CR: Floats) -> Floats:
    defined_CR = ~np.isnan(value_CR)
    return _ratio(np.where(defined_CR, value_CR, 0.0).sum(axis=0), defined_CR.sum(axis=0).astype(np.float64))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _drawn(label_BC: Bools, count_BR: Floats | None) -> Floats:
    return np.ones((len(label_BC), 1)) if count_BR is None else count_BR


def checked(label_BC: Array, score_BC: Array) -> tuple[Bools, Floats]:
    label, score = np.asarray(label_BC), np.asarray(score_BC, dtype=np.float64)
    if label.ndim != 2 or label.shape != score.shape or label.size == 0:
        raise InputError(f"labels {label.shape}, scores {score.shape}: both must be (records, classes), not empty")
    _refuse(label, (label != 0) & (label != 1), "label", "0 or 1")
    _refuse(score, ~np.isfinite(score), "score", "finite")
    return label.astype(np.bool_), score


def _checked_predictions(label_BC: Array, prediction_BC: Array) -> tuple[Bools, Bools]:
    label, prediction = checked(label_BC, prediction_BC)
    _refuse(prediction, (prediction != 0) & (prediction != 1), "prediction", "0 or 1")
    return label, prediction.astype(np.bool_)


def _refuse(array_BC: npt.NDArray[Any], wrong_BC: Bools, name: str, right: str) -> None:
    if wrong_BC.any():
        b, c = np.argwhere(wrong_BC)[0]
        raise InputError(f"{name} {array_BC[b, c]} of record {b}, class {c}: it must be {right}")


def load_challenge_weights(path: Path) -> tuple[tuple[str, ...], Floats]:
    """Read the challenge's partial credit, a CSV with the classes as first row and first column.

    Returns ``(classes, weights_CC)``, rows for labels and columns for predictions. Equivalent diagnoses share
    a class, joined by ``|`` in any order; they are returned sorted. Raises InputError naming the file for a
    table that is missing, not square, of different rows and columns, with a code twice, or not of numbers.
    """
    try:
        table = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "cannot be read as a CSV of challenge weights", error) from error
    if len(table) < 2 or any(len(row) != len(table) for row in table):
        sizes = sorted({len(row) for row in table})
        raise InputError(f"{path}: {len(table)} rows of {sizes} cells; names above and left of a square are needed")
    classes = tuple(sorted_alternatives(name) for name in table[0][1:])
    for name, (row_name, *_) in zip(classes, table[1:], strict=True):
        if sorted_alternatives(row_name) != name:
            raise InputError(f"{path}: row {row_name!r} stands where column {name!r} does; names must agree")
    codes = sorted(code for name in classes for code in name.split("|"))
    for code, following in pairwise(codes):
        if code == following:
            raise InputError(f"{path}: code {code!r} stands in two places; each may stand in one class")
    return classes, np.array([[_weight(cell, path, name) for cell in cells] for name, *cells in table[1:]])


def _weight(cell: str, path: Path, row: str) -> float:
    try:
        weight = float(cell)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"{path}: {cell!r} in row {row!r} is not a weight; a finite number is needed")
    return weight


def sorted_alternatives(name: str) -> str:
    return "|".join(sorted(code.strip() for code in name.split("|")))


def labels_for_classes(codes: Sequence[Sequence[str]], classes: Sequence[str]) -> Bools:
    """(B, C): whether a record's SNOMED codes name the class or one of its ``|``-joined alternatives.

    Codes of no class are left out, as the official scorer does.
    """
    column = {code: c for c, name in enumerate(classes) for code in sorted_alternatives(name).split("|")}
    label_BC = np.zeros((len(codes), len(classes)), dtype=np.bool_)
    for b, record_codes in enumerate(codes):
        label_BC[b, [column[code] for code in record_codes if code in column]] = True
    return label_BC


def challenge_score(
    label_BC: Array,
    prediction_BC: Array,
    weights_CC: Floats,
    classes: Sequence[str],
    normal: str = SINUS_RHYTHM,
) -> float:
    """The challenge metric of 2021: 1 for perfect predictions, 0 for always predicting the normal class.

    A record earns Σ weights[label, prediction] over its pairs, divided by the number of classes that are
    labelled or predicted. Where perfect and always-normal predictions earn the same, the score is 0.
    Raises InputError as ``f_measure`` does, or for a normal class that is none of the classes.
    """
    return float(weighted_challenge(weights_CC, classes, normal, label_BC, prediction_BC, None)[0])


def weighted_challenge(
    weights_CC: Floats,
    classes: Sequence[str],
    normal: str,
    label_BC: Array,
    prediction_BC: Array,
    count_BR: Floats | None,
) -> Floats:
    """The score as a metric of one figure: (1,) or (1, R)."""
    label, prediction = _checked_predictions(label_BC, prediction_BC)
    if {label.shape[1], *weights_CC.shape} != {len(classes)}:
        raise InputError(f"labels {label.shape}, weights {weights_CC.shape}: {len(classes)} classes are needed")
    is_normal_C = np.array([normal in name.split("|") for name in classes])
    if not is_normal_C.any():
        raise InputError(f"normal class {normal!r} is none of the classes {', '.join(classes)}")
    observed_B, perfect_B, inactive_B = (
        ((label @ weights_CC) * choice_BC).sum(axis=1) / np.maximum((label | choice_BC).sum(axis=1), 1)
        for choice_BC in (prediction, label, np.broadcast_to(is_normal_C, label.shape))
    )
    # Differences per record first: equal credit then spans exactly zero, whatever the order of the sum.
    drawn_BR = _drawn(label, count_BR)
    gain_R, span_R = (observed_B - inactive_B) @ drawn_BR, (perfect_B - inactive_B) @ drawn_BR
    value_R: Floats = np.divide(gain_R, span_R, out=np.zeros_like(span_R), where=span_R != 0)
    return value_R if count_BR is None else value_R[None]


def resampled(
    metric: Metric,
    label_BC: Array,
    score_BC: Array,
    resamples: int = 1000,
    seed: int = 0,
    groups_B: Array | None = None,
) -> Floats:
    """(K, resamples) figures of bootstrap resamples; NaN where a resample does not define one.

    The K = C + 1 figures are the classes and, last, their macro average. With ``groups_B``, one patient code
    per record, patients are drawn with all their records (cluster bootstrap). Which are drawn depends on seed, number
    of records and groups alone: what two methods score on the same records is resampled alike, and the difference of
    two results is a paired one. Raises InputError as the metric does, or for less than one resample.
    """
    if resamples < 1:
        raise InputError(f"{resamples} resamples: at least 1 is needed")
    records = len(np.asarray(label_BC))
    figures = (metric(label_BC, score_BC, count_BR) for count_BR in _resamples(records, resamples, seed, groups_B))
    return np.hstack([with_macro(value_CR) for value_CR in figures])


def interval(value_KR: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """``(low_K, high_K)``: the quantiles that leave out equal tails; undefined values do not count."""
    if not 0 < level < 1:
        raise InputError(f"level {level}: give one between 0 and 1")
    tails = ((1 - level) / 2, (1 + level) / 2)
    defined = (value_R[~np.isnan(value_R)] for value_R in value_KR)
    low_high_K2 = np.array([np.quantile(value, tails) if value.size else (np.nan, np.nan) for value in defined])
    return low_high_K2[:, 0], low_high_K2[:, 1]


def with_macro(value_CR: Floats) -> Floats:
    return np.vstack([value_CR, _macro_R(value_CR)])


def _resamples(records: int, resamples: int, seed: int, groups_B: Array | None) -> Iterator[Floats]:
    """Chunks (B, R) of how often each record is drawn, as float64 for the arithmetic to come."""
    group_B = np.arange(records) if groups_B is None else np.unique(groups_B, return_inverse=True)[1]
    if group_B.shape != (records,) or not records:
        raise InputError(f"patient codes {group_B.shape} for {records} records: one code per record is needed")
    groups = int(group_B.max()) + 1
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // records)
    for first in range(0, resamples, chunk):
        width = min(chunk, resamples - first)
        cell_RG = generator.integers(groups, size=(width, groups)) * width + np.arange(width)[:, None]
        count_GR = np.bincount(cell_RG.ravel(), minlength=groups * width).reshape(groups, width)
        yield count_GR[group_B].astype(np.float64)
