"""The training loop, readable as one page, for pretraining and fine-tuning alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ecgscale import progress
from ecgscale.data.batch import ECGBatch
from ecgscale.data.order import Order, check_world_size, default_lanes
from ecgscale.data.selection import Selection
from ecgscale.data.stream import Batches, TrainStream
from ecgscale.errors import Diverged, InputError, MachineError
from ecgscale.provenance import versions
from ecgscale.stopping import Stopped, listening
from ecgscale.training import checkpoint
from ecgscale.training.boundary import Boundary, Wish
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.metrics import Work, device_peak
from ecgscale.training.monitor import Monitor, RecordingsLog
from ecgscale.training.profile import StepProfiler, steps_to_profile
from ecgscale.training.ranks import Ranks, log
from ecgscale.training.schedule import Schedule, falls, learning_rate_factor
from ecgscale.training.state import empty_checkpoints
from ecgscale.training.validation import Validation

_VERSIONS_OF = ("ecgscale", "torch", "deepspeed")


@dataclass(frozen=True)
class TrainConfig:
    """How long, with which batches, and what is written down."""

    steps: int = 1000
    """Updates of the weights."""
    global_batch: int = 512
    """G: recordings per step over all ranks. Pretraining takes two segments of each."""
    contrast_batch: int = 0
    """C: recordings per micro-step over all ranks, among which the global objective contrasts. 0: the global batch."""
    lanes: int = 0
    """Lanes of the order; the number of ranks must divide it. 0: 64, or the largest divisor of it and C."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: constant, linear, cosine or tri_stage."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises."""
    final_lr_ratio: float = 0.01
    """Share of the peak learning rate at the end of linear, cosine and tri_stage."""
    seed: int = 0
    """Seed of everything that is drawn: order, crops, masks, noise, dropout, initial weights."""
    log_every: int = 10
    """Steps between two log lines."""
    validate_every: int = 0
    """Steps between two validations; 0: at the end only."""
    validation_recordings: int = 0
    """Recordings of the validation split that are scored, from as few shards as hold them; 0: all."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; there is always one at the end."""
    checkpoint_every_s: float = 0.0
    """Seconds between two checkpoints, by the first rank's clock, beside those by steps; 0: only by steps."""
    keep_last: int = 2
    """Newest checkpoints that are kept, and the newest whose weights have shown to be good: a later step's gradient was
    finite."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept too; 0: none."""
    max_skipped: int = 10
    """Steps in a row with a non-finite gradient after which the run stops."""
    projected_recordings: int = 200
    """Recordings of the validation split whose embeddings TensorBoard's projector shows after pretraining; 0: none."""
    log_recordings: bool = False
    """Write the numbers of the recordings that each rank has seen in each step to recordings/rank-N.jsonl."""
    profile_steps: int = 0
    """Steps of this start whose trace is written to profile/, with the ten costliest operations; 0: none. `--profile`
    is `--train.profile_steps 3`."""
    profile_step: int = 0
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


def train(job: Job, ranks: Ranks) -> Engine:
    """Run to the last step, from the newest checkpoint if there is one; returns the engine with the final weights.

    Raises Stopped where the process was asked to stop, at a step boundary and with everything saved.
    """
    with listening():
        try:
            engine = _train(job, ranks)
        except Stopped:
            progress.at(job.train.steps, "")
            raise
    progress.at(job.train.steps, "export")
    return engine


def _train(job: Job, ranks: Ranks) -> Engine:
    for empty in empty_checkpoints(job.run / "checkpoints"):
        log(ranks, f"{empty}: empty, so it is passed over; remove it")
    resumed = checkpoint.latest(job.run / "checkpoints")
    engine, step, skipped = _start(job, ranks, resumed)
    if resumed:
        log(ranks, f"going on from {resumed.folder}" + (": nothing to do" if step >= job.train.steps else ""))
        if changed := _changed_versions(resumed.state):
            log(ranks, f"versions have changed since: {changed}")
        if bent := _bent_schedule(job, resumed):
            log(ranks, bent)
    config = yaml.safe_dump(job.config, sort_keys=False)
    with ExitStack() as stack:
        seen = RecordingsLog(job.run / "recordings", ranks.rank) if job.train.log_recordings else None
        if seen:
            stack.enter_context(closing(seen))
        work = _work(job, ranks)
        monitor = stack.enter_context(Monitor(job.run, ranks, step, job.train.steps, job.name, config, work))
        if job.picture and resumed is None and ranks.first:
            monitor.figure("input/masked_ecg", job.picture(job.stream.micro_batch(0, 0)), 0)
        profiler = stack.enter_context(closing(_profiler(job, ranks, monitor, step)))
        batches = stack.enter_context(closing(job.stream.from_batch(step, engine.put.copied)))
        stack.enter_context(_settled())
        boundary = Boundary(ranks, job.train.checkpoint_every_s)
        boundary.agree()  # sends the first wishes on their way
        if resumed and resumed.state.get("validation_due") and not _validated(job, engine, monitor, boundary, step):
            raise Stopped(f"stopped before the validation at step {step}")
        monitor.clock.take()  # what was before is no step
        while step < job.train.steps:
            profiler.begin(step + 1)
            learning_rate = _learning_rate(job, step, job.train.steps)
            updated, parts = _update(job, engine, monitor, batches, seen, step, learning_rate)
            step += 1
            profiler.end(step)
            wish = boundary.agree()
            skipped = _count_skipped(job, monitor, skipped, step, updated)
            monitor.count()
            last = step == job.train.steps
            if last or step % job.train.log_every == 0:
                scalars = {
                    "train/learning_rate": learning_rate,
                    "train/gradient_norm": engine.gradient_norm(),
                    "train/skipped_steps": float(skipped.total),
                }
                monitor.log(step, parts, scalars | job.stream.counts(step), job.stream.own_counts())
            with monitor.clock.pause():
                due = last or bool(job.train.validate_every and step % job.train.validate_every == 0)
                if due and wish is not Wish.STOP and _validated(job, engine, monitor, boundary, step):
                    due = False
                elif due:
                    wish = Wish.STOP
                if last or wish or step % job.train.checkpoint_every == 0:
                    _save(job, engine, monitor, step, skipped, validation_due=due)
                    boundary.saved()
            if wish is Wish.STOP and (due or not last):
                monitor.event("stopped", step=step)
                raise Stopped(f"stopped as asked at step {step} of {job.train.steps}, which is saved")
        boundary.close()
    return engine


@contextmanager
def _settled() -> Iterator[None]:
    """The garbage collector leaves alone what is there: a walk over all of it would hold up a step for 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _update(
    job: Job,
    engine: Engine,
    monitor: Monitor,
    batches: Batches,
    seen: RecordingsLog | None,
    step: int,
    learning_rate: float,
) -> tuple[bool, list[dict[str, Tensor]]]:
    """One step: whether it was not skipped, and the loss parts of each micro-step."""
    clock, parts = monitor.clock, []
    for micro_step in range(job.train.accumulation):
        progress.at(step, "batch")
        batch = monitor.waiting(batches)
        if seen:
            seen.write(step, micro_step, batch)
        with clock("transfer"):
            batch = engine.put(batch)
        _seed_dropout(job.train.seed, step, micro_step, engine.ranks.rank)
        progress.at(step, "forward")
        with clock("forward"):
            loss, micro_parts = engine.forward(batch, step=step)
        progress.at(step, "backward")
        with clock("backward"):
            engine.backward(loss)
        progress.at(step, "update")
        with clock("optimizer"):
            updated = engine.step(learning_rate)
        parts.append(micro_parts)
    return updated, parts


@dataclass
class Skipped:
    """Steps that were skipped for a non-finite gradient."""

    total: int = 0
    in_a_row: int = 0

    def proven(self, step: int) -> int:
        """The last step, of ``step`` so far, whose weights have given a finite gradient: the one before an update."""
        return max(0, step - self.in_a_row - 1)


def _start(job: Job, ranks: Ranks, resumed: checkpoint.Checkpoint | None) -> tuple[Engine, int, Skipped]:
    if resumed and resumed.state.get("data") != job.identity:
        raise InputError(
            f"{resumed.folder}: was trained on other data than data.shards now names; take another run.dir"
        )
    if resumed:
        resumed.check_fits(job.objective)
    weights = resumed.tensors("weight") if resumed else None
    micro_rows = job.train.contrast // ranks.world_size
    engine = Engine(job.objective, job.engine, ranks, job.train.accumulation, micro_rows, weights)
    engine.create_optimizer_state(engine.put(job.stream.micro_batch(0, 0)))
    if resumed is None:
        return engine, 0, Skipped()
    engine.set_optimizer(resumed.reader(), resumed.state["optimizer_steps"])
    return engine, resumed.step, Skipped(resumed.state["skipped"], resumed.state["skipped_in_a_row"])


def _changed_versions(state: dict[str, Any]) -> str:
    """Which versions differ from those that a checkpoint was written with; empty where none does."""
    before, now = state.get("versions", {}), versions(_VERSIONS_OF)
    names = sorted(name for name in now if before.get(name) != now[name])
    return ", ".join(f"{name} {str(before.get(name))[:40]} -> {now[name]}" for name in names)


def _work(job: Job, ranks: Ranks) -> Work:
    segments = job.train.global_batch * job.stream.segments
    return Work(
        recordings=job.train.global_batch,
        segments=segments,
        tokens=segments * (job.stream.selection.samples // job.patch_samples),
        flops=job.flops * job.train.accumulation,
        peak_flops=device_peak(job.engine, ranks.device),
    )


def _profiler(job: Job, ranks: Ranks, monitor: Monitor, step: int) -> StepProfiler:
    first, last = steps_to_profile(step, job.train.steps, job.train.profile_step, job.train.profile_steps)
    if job.train.profile_steps and job.train.profile_step and last < first:
        log(ranks, f"nothing to profile: step {job.train.profile_step} is not among those that are to be done")
    return StepProfiler(job.run, ranks, monitor, first, last)


def _learning_rate(job: Job, step: int, steps: int) -> float:
    """The rate at ``step`` (from 0) of a run of ``steps``."""
    train = job.train
    factor = learning_rate_factor(step, steps, train.schedule, train.warmup_steps, train.final_lr_ratio)
    return job.engine.learning_rate * factor


def _bent_schedule(job: Job, resumed: checkpoint.Checkpoint) -> str:
    """What another train.steps than the checkpoint's does to the learning rate; empty where it does nothing."""
    before, now, step = resumed.state["config"].get("train", {}).get("steps"), job.train.steps, resumed.step
    known = type(before) is int and 0 < before < 1 << 63  # it may differ, so nobody has compared it
    if not known or before == now or step >= now or not falls(job.train.schedule):
        return ""
    old_rate, new_rate = (_learning_rate(job, step, steps) for steps in (before, now))
    return (
        f"train.steps was {before}, now it is {now}: the learning rate of step {step + 1} was {old_rate:.4g}, "
        f"now it is {new_rate:.4g} and falls until step {now} ({job.train.schedule})"
    )


def _seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Dropout is the one draw that depends on the rank: exact on resume at the same world size."""
    mixed = seed
    for number in (step, micro_step, rank):
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**64
    torch.manual_seed(mixed % 2**63)


def _count_skipped(job: Job, monitor: Monitor, skipped: Skipped, step: int, updated: bool) -> Skipped:
    if updated:
        return Skipped(skipped.total, 0)
    skipped = Skipped(skipped.total + 1, skipped.in_a_row + 1)
    monitor.event("skipped", step=step, in_a_row=skipped.in_a_row)
    monitor.say(f"step {step} skipped on all ranks: its gradient is not finite ({skipped.in_a_row} in a row)")
    if skipped.in_a_row >= job.train.max_skipped:
        raise Diverged(
            f"{job.run}: {skipped.in_a_row} steps in a row had a non-finite gradient (the last was step {step}); "
            "lower engine.learning_rate, set engine.clip_norm, or look for damaged recordings. Checkpoints after step "
            f"{skipped.proven(step)} have shown no finite gradient"
        )
    return skipped


def _validated(job: Job, engine: Engine, monitor: Monitor, boundary: Boundary, step: int) -> bool:
    """Score the held-out recordings; False where the ranks agreed to stop meanwhile."""

    def stop() -> bool:
        progress.at(step, "validate")
        return boundary.agree() is Wish.STOP

    scalars = job.validate(engine, stop)
    if scalars is not None:
        monitor.write("validation", step, scalars)
    return scalars is not None


def _save(job: Job, engine: Engine, monitor: Monitor, step: int, skipped: Skipped, validation_due: bool) -> None:
    progress.at(step, "save")
    folder = job.run / "checkpoints"
    state = {
        "validation_due": validation_due,
        "position": step * job.train.global_batch,
        "skipped": skipped.total,
        "skipped_in_a_row": skipped.in_a_row,
        "optimizer_steps": engine.optimizer_steps(),
        "data": job.identity,
        "config": job.config,
        "about": job.about,
        "world_size": engine.ranks.world_size,
        "versions": versions(_VERSIONS_OF),
    }
    checkpoint.save(folder, engine, step, state)
    if engine.ranks.first:
        try:
            checkpoint.prune(folder, job.train.keep_last, job.train.keep_every, skipped.proven(step))
        except (InputError, MachineError) as error:  # as where a reader on another machine keeps a file
            monitor.say(f"{error}; tried again after the next checkpoint")
    monitor.event("saved", step=step)
