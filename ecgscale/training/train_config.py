"""How long a run goes on, with which batches, and what is written down."""

from __future__ import annotations

from dataclasses import dataclass

from ecgscale.data.order import Order, check_world_size, default_lanes
from ecgscale.data.selection import Selection
from ecgscale.errors import InputError
from ecgscale.settings import option
from ecgscale.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class TrainConfig:
    """How long, with which batches, and what is written down."""

    steps: int = option(1000, resumable=True)
    """Updates of the weights."""
    global_batch: int = 512
    """G: recordings per step over all ranks. Pretraining takes two segments of each."""
    contrast_batch: int = 0
    """C: recordings per micro-step over all ranks, among which the global objective contrasts. 0: the global batch."""
    lanes: int = 0
    """Lanes of the order; the number of ranks must divide it. 0: 64, or the largest divisor of it and C."""
    schedule: str = "constant"
    """Learning rate after the warm-up: constant, linear, cosine, tri_stage, or package.module:function of your own that
    gives the share of the peak rate for (step, steps, warmup_steps, final_lr_ratio)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises."""
    final_lr_ratio: float = 0.01
    """Share of the peak learning rate at the end of linear, cosine and tri_stage."""
    seed: int = 0
    """Seed of everything that is drawn: order, crops, masks, noise, dropout, initial weights."""
    log_every: int = option(10, resumable=True)
    """Steps between two log lines."""
    validate_every: int = option(0, resumable=True)
    """Steps between two validations; 0: at the end only."""
    validation_recordings: int = option(0, resumable=True)
    """Recordings of the validation split that are scored, from as few shards as hold them; 0: all."""
    checkpoint_every: int = option(500, resumable=True)
    """Steps between two checkpoints; there is always one at the end."""
    checkpoint_every_s: float = option(0.0, resumable=True)
    """Seconds between two checkpoints, by the first rank's clock, beside those by steps; 0: only by steps."""
    keep_last: int = option(2, resumable=True)
    """Newest checkpoints that are kept, and the newest whose weights have shown to be good: a later step's gradient was
    finite."""
    keep_every: int = option(0, resumable=True)
    """Checkpoints at multiples of this step are kept too; 0: none."""
    max_skipped: int = option(10, resumable=True)
    """Steps in a row with a non-finite gradient after which the run stops."""
    projected_recordings: int = option(200, resumable=True)
    """Recordings of the validation split whose embeddings TensorBoard's projector shows after pretraining; 0: none."""
    log_recordings: bool = option(False, resumable=True)
    """Write the numbers of the recordings that each rank has seen in each step to recordings/rank-N.jsonl."""
    profile_steps: int = option(0, without_value="3", resumable=True)
    """Steps of this start whose trace is written to profile/, with the ten costliest operations; 0: none. `--profile`
    is `--train.profile_steps 3`."""
    profile_step: int = option(0, resumable=True)
    """The first of them; 0: the fourth step of this start."""

    def __post_init__(self) -> None:
        if self.seed >= 1 << 63:
            raise InputError(f"train.seed {self.seed}: give less than 2^63")
        for name in ("steps", "global_batch", "log_every", "checkpoint_every", "keep_last", "max_skipped"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} {getattr(self, name)}: give 1 or more")
        for name in (
            "contrast_batch",
            "lanes",
            "warmup_steps",
            "validate_every",
            "validation_recordings",
            "projected_recordings",
            "keep_every",
            "checkpoint_every_s",
            "seed",
            "profile_steps",
            "profile_step",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"train.{name} {getattr(self, name)}: give 0 or more")
        if self.profile_step and not self.profile_steps:
            raise InputError(f"train.profile_step {self.profile_step}: give train.profile_steps too, how many")
        if not 0 <= self.final_lr_ratio <= 1:
            raise InputError(f"train.final_lr_ratio {self.final_lr_ratio:g}: give a share from 0 to 1")
        if self.global_batch % self.contrast:
            raise InputError(
                f"train.global_batch {self.global_batch} is no multiple of train.contrast_batch {self.contrast}"
            )

        self.learning_rate_factor(self.warmup_steps)  # refuses a schedule that is none

    def learning_rate_factor(self, step: int, steps: int = 0) -> float:
        """The share of the peak learning rate at ``step`` (from 0) of ``steps``; 0: of as many as there are."""
        return learning_rate_factor(step, steps or self.steps, self.schedule, self.warmup_steps, self.final_lr_ratio)

    @property
    def contrast(self) -> int:
        return self.contrast_batch or self.global_batch

    def order(self, selection: Selection, world_size: int) -> Order:
        """The order in which a selection is read; raises InputError where batches, lanes and ranks do not fit."""
        return selection.order(self.global_batch, self.contrast, self.lanes_for(world_size), self.seed)

    def lanes_for(self, world_size: int) -> int:
        """Lanes of the order; raises InputError where so many ranks cannot share them."""
        lanes = self.lanes or default_lanes(self.contrast)
        check_world_size(world_size, lanes)
        return lanes

    @property
    def accumulation(self) -> int:
        return self.global_batch // self.contrast
