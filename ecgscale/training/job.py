"""What a run is: everything that the loop needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecgscale.data.batch import ECGBatch
from ecgscale.data.stream import TrainStream
from ecgscale.run_folder import CHECKPOINTS
from ecgscale.training.engine import EngineConfig
from ecgscale.training.metrics import Work, device_peak
from ecgscale.training.train_config import TrainConfig
from ecgscale.training.validation import Validation


@dataclass
class Job:
    """What the loop needs to know of a run."""

    name: str  # pretrain or finetune, for the progress line
    run: Path
    objective: nn.Module
    stream: TrainStream
    train: TrainConfig
    engine: EngineConfig
    config: dict[str, Any]  # the resolved config
    patch_samples: int  # of a token
    about: dict[str, Any]  # what an export of this run says about its model
    identity: str  # of the data: a run continues only on what it began with
    validate: Validation
    flops: float = 0.0  # model FLOPs of a rank's micro-step, forward and backward; 0: unknown
    picture: Callable[[ECGBatch], Any] | None = None  # a figure of the first batch, for TensorBoard

    @property
    def checkpoints(self) -> Path:
        return self.run / CHECKPOINTS

    def learning_rate(self, step: int, steps: int = 0) -> float:
        """The rate at ``step`` (from 0) of a run of ``steps``; 0: of as many as it has."""
        return self.engine.learning_rate * self.train.learning_rate_factor(step, steps)

    def work(self, device: torch.device) -> Work:
        """What a step amounts to."""
        segments = self.train.global_batch * self.stream.segments
        return Work(
            recordings=self.train.global_batch,
            segments=segments,
            tokens=segments * (self.stream.selection.samples // self.patch_samples),
            flops=self.flops * self.train.accumulation,
            peak_flops=device_peak(self.engine, device),
        )
