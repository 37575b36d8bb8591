"""A small task of one's own: how many findings a recording has, as one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.nn.functional import mse_loss

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.labelled import LabelledSet
from ecgscale.downstream.report import Estimate, json_ready
from ecgscale.downstream.task import (
    Labelling,
    Outcome,
    Supervised,
    Task,
    TaskConfig,
    label_values,
    leave_out,
    leave_out_undrawn,
    refuse_empty_splits,
)
from ecgscale.errors import InputError
from ecgscale.inference import ECGModel
from ecgscale.model import Encoder


@dataclass(frozen=True)
class MeanError:
    """By how many findings a model is wrong."""

    mean_error: Estimate
    recordings: int
    samples: dict[str, npt.NDArray[np.float64]] = field(repr=False)

    @staticmethod
    def of(error_R: npt.NDArray[np.float64], resamples: int = 100) -> MeanError:
        drawn_KR = np.random.default_rng(0).integers(len(error_R), size=(resamples, len(error_R)))
        sample_K = error_R[drawn_KR].mean(axis=1)
        low, high = np.quantile(sample_K, [0.025, 0.975]).tolist()
        return MeanError(Estimate(float(error_R.mean()), low, high), len(error_R), {"mean_error": sample_K})

    @property
    def headline(self) -> dict[str, Estimate]:
        return {"mean_error": self.mean_error}

    def to_dict(self) -> dict[str, Any]:
        return json_ready(self)

    def scalars(self) -> dict[str, float]:
        return {"mean_error": self.mean_error.value}

    def table(self) -> str:
        return f"wrong by {self.mean_error} findings"


class HowMany(Task):
    """Regresses the number of codes of a label."""

    @dataclass(frozen=True)
    class Config(TaskConfig):
        """Keys of the task of numbers."""

        codes: str = "Dx"
        """The label whose codes are counted."""
        most: int = 5
        """More count as that many."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.most < 1:
                raise InputError(f"task.most {self.most}: give 1 or more")

    config: Config

    def label(
        self, shards: ShardSet, splits: Sequence[str] = SPLITS, seed: int = 0, trained: Mapping[str, Any] | None = None
    ) -> Labelling:
        codes = label_values(shards, self.config.codes, "task.codes")
        reason_R = np.zeros(len(shards), np.uint8)
        leave_out(reason_R, np.array([code is None for code in codes]), "no_label")
        reasons = ("no_label", *leave_out_undrawn(shards, reason_R, self.config.label_fraction, seed))
        refuse_empty_splits(shards, reason_R, splits, f" with {self.config.codes!r}")
        number_R = np.array([min(len(set(code or [])), self.config.most) for code in codes], np.float32)
        return Labelling(number_R[:, None], reason_R, reasons)

    def objective(self, encoder: Encoder, labelling: Labelling, patient_R: npt.NDArray[np.int64]) -> Supervised:
        return Supervised(encoder, 1, mse_loss)

    def score(self, model: ECGModel, labelled: LabelledSet, split: str, as_trained: bool) -> Outcome:
        embedding_RD, said_R1 = model.embed_and_classify(labelled.recordings(split))
        target_R1 = labelled.targets(split)
        report = MeanError.of(np.abs(said_R1 - target_R1)[:, 0].astype(np.float64))
        names = [f"{number:g} findings" for number in target_R1[:, 0]]
        return Outcome(report, embedding_RD, names, target_R1, said_R1)
