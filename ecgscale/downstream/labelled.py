"""Labelled data sets, read with a model's preprocessing: which recordings of a split are used, and why others are not.

Shape suffixes: R recordings, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import SPLITS
from ecgscale.downstream.coverage import Coverage
from ecgscale.downstream.task import LEFT_OUT_FOR, Labelling, Task, leave_out
from ecgscale.errors import InputError
from ecgscale.inference import ECGModel, Recording, recordings_of

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledSet:
    """Shards with what a task knows of them, read with a model's preprocessing."""

    shards: ShardSet
    data: DataConfig
    labelling: Labelling
    shortest_s: Mapping[str, float]  # of each split: shorter recordings are left out
    usual_s: float  # data.min_record_s of the training

    @staticmethod
    def open(
        model: ECGModel,
        data: DataConfig,
        task: Task,
        trained: Mapping[str, Any] | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 0,
        training: bool = False,
    ) -> LabelledSet:
        """Raises InputError where the shards have another rate than the model, not the labels, or no long recordings.

        ``trained``: what the export of a fine-tuned model says. ``seed`` draws the patients of ``task.label_fraction``.
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
        shortest_s = dict.fromkeys(SPLITS, max(task.config.min_scored_s, token_s))
        if training:
            shortest_s["train"] = max(data.min_record_s, token_s)
        labelling = task.label(shards, splits, seed, trained)
        labelled = LabelledSet(shards, read_as, labelling, shortest_s, data.min_record_s)
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
        return Selection(self.shards, data, split, self.labelling.labelled_R & (self._kept_leads_R > 0))

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
        kept_R, reason_R = self._kept_leads_R[in_split_R], self.labelling.reason_R[in_split_R].copy()
        leave_out(reason_R, kept_R == 0, "no_lead")
        leave_out(reason_R, seconds_R < self.shortest_s[split], "too_short")
        counts = np.bincount(reason_R, minlength=len(LEFT_OUT_FOR)).tolist()
        left_out = {
            reason: counts[LEFT_OUT_FOR.index(reason)] for reason in (*self.labelling.reasons, "no_lead", "too_short")
        }
        used_R, negative_R = reason_R == 0, self.labelling.negative_R
        assert counts[0] + sum(left_out.values()) == len(reason_R)
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
            negative=None if negative_R is None else int(negative_R[in_split_R][used_R].sum()),
            other_classes=self.labelling.other_classes.get(split, {}),
        )

    def recordings(self, split: str) -> Iterator[Recording]:
        """The labelled recordings of a split with the leads that are kept, in their order on disk; a progress bar."""
        return recordings_of(self.selection(split))

    def targets(self, split: str) -> Floats:
        """(R, C) labels in the order of ``recordings``."""
        return self.labelling.target_RC[self.selection(split).numbers]

    def patients(self, split: str) -> npt.NDArray[np.int64]:
        """(R,) patient codes in the order of ``recordings``."""
        codes: npt.NDArray[np.int64] = self.shards.take("patient", self.selection(split).numbers)
        return codes
