"""The task of identification: who is it, of persons whom the model has not seen.

Shape suffixes: R recordings of the whole set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.identification import Identification, identify, session_days
from ecgscale.downstream.labelled import LabelledSet
from ecgscale.downstream.task import (
    Labelling,
    Outcome,
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


@dataclass(frozen=True, kw_only=True)
class Sessions(Labelling):
    """When each recording was taken: the patients are the classes, so every recording counts that has a session."""

    session_R: npt.NDArray[np.int64]  # in the sessions' order


class IdentificationTask(Task):
    """ArcFace on the training patients; recordings of the test patients' later sessions against their first one's."""

    @dataclass(frozen=True)
    class Config(TaskConfig):
        """Keys of identification."""

        kind: str = "identification"

        session: str = ""
        """The label or header comment that dates the sessions, such as ECG date; as 2005-03-15, 15.03.2005 or a whole
        number. None: each recording is a session of its own."""
        one_probe: bool = False
        """Score each person's last recording alone, as the paper does, not all of the later sessions."""
        arcface_scale: float = 192.0
        """Factor on the cosines."""
        arcface_margin: float = 1.0
        """Angle in radians by which a recording must be nearer to its person than to all others."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (self.arcface_scale > 0 and 0 <= self.arcface_margin < math.pi):
                raise InputError(
                    f"task.arcface_scale {self.arcface_scale:g}, task.arcface_margin {self.arcface_margin:g}: "
                    "give a positive scale and an angle from 0 to below 3.14"
                )

    protocols = ("finetune", "probe")
    untrained = ("probe",)
    validated = False  # the head does not know the persons
    config: Config

    def label(
        self, shards: ShardSet, splits: Sequence[str] = SPLITS, seed: int = 0, trained: Mapping[str, Any] | None = None
    ) -> Sessions:
        config, reasons = self.config, []
        reason_R, session_R = np.zeros(len(shards), np.uint8), np.arange(len(shards), dtype=np.int64)
        if config.session:
            sessions = label_values(shards, config.session, "task.session", metadata=True)
            reasons.append("no_session")
            dated_R = np.array([bool(values) for values in sessions])
            leave_out(reason_R, ~dated_R, "no_session")
            texts = ["|".join(values) for values in sessions if values]
            dataset_S = np.array([shard.dataset for shard in shards.shards])
            datasets = dataset_S[shards.shard_of(np.flatnonzero(dated_R))].tolist()
            session_R = np.zeros(len(shards), np.int64)
            session_R[dated_R] = session_days(texts, datasets)
        reasons += leave_out_undrawn(shards, reason_R, config.label_fraction, seed)
        refuse_empty_splits(shards, reason_R, splits, f" with {config.session!r}" if config.session else "")
        nothing_RC = np.zeros((len(shards), 0), np.float32)
        return Sessions(nothing_RC, reason_R, tuple(reasons), session_R=session_R)

    def objective(self, encoder: Encoder, labelling: Labelling, patient_R: npt.NDArray[np.int64]) -> Identification:
        return Identification(encoder, np.unique(patient_R), self.config.arcface_scale, self.config.arcface_margin)

    def score(self, model: ECGModel, labelled: LabelledSet, split: str, as_trained: bool) -> Outcome:
        assert isinstance(labelled.labelling, Sessions)
        patient_R, session_R = labelled.patients(split), labelled.labelling.session_R[labelled.selection(split).numbers]
        embedding_RD = model.embed_recordings(labelled.recordings(split)).record_embedding
        report = identify(embedding_RD, patient_R, session_R, self.config.one_probe)
        nothing_RC = np.zeros((len(patient_R), 0), np.float32)
        names = [f"patient {code}" for code in patient_R]
        return Outcome(report, embedding_RD, names, nothing_RC, nothing_RC, left_out=report.left_out)
