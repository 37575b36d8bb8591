"""What a scored model shows in TensorBoard: figures, ROC curves per class, and the embeddings for its projector.

Shape suffixes: R recordings, C classes, T points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ecgscale.downstream.evaluate import Scored
from ecgscale.downstream.metrics import roc_curve
from ecgscale.downstream.report import Report
from ecgscale.lead_names import lead_set_name
from ecgscale.run_folder import TENSORBOARD
from ecgscale.training.monitor import board_of, project

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROJECTED = 2000  # recordings: the projector lays them out in the browser
Floats = npt.NDArray[np.float32]


def show(run: Path, step: int, scored: Sequence[Scored]) -> None:
    """Write what was found about a run's model into its TensorBoard folder, as test/LEADS/…"""
    with board_of(run / TENSORBOARD) as board:
        for result in scored:
            place = f"test/{lead_set_name(result.leads)}"
            report, embedding_RD, label_R, target_RC, score_RC, *_ = result.outcome
            for name, value in report.scalars().items():
                board.add_scalar(f"{place}/{name}", value, step)
            if isinstance(report, Report):
                board.add_figure(f"{place}/roc", roc_figure(report, target_RC, score_RC), step)
            shown = slice(0, _PROJECTED)
            project(board, place, embedding_RD[shown], label_R[shown], step)


def roc_figure(report: Report, target_RC: Floats, score_RC: Floats) -> Figure:
    """The ROC curve of each class that has positives and negatives, with its area and interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    for row, target_R, score_R in zip(report.classes, target_RC.T, score_RC.T, strict=True):
        if 0 < target_R.sum() < len(target_R):
            false_T, hit_T = roc_curve(target_R > 0, score_R)
            axes.plot(false_T, hit_T, linewidth=1, label=f"{row.name}: {row.auroc}")
    axes.plot([0, 1], [0, 1], color="lightgrey", linewidth=0.7)
    axes.set_xlabel("1 − specificity")
    axes.set_ylabel("sensitivity")
    axes.legend(fontsize="small", loc="lower right")
    return figure
