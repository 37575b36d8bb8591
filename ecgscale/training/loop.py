"""The training loop, readable as one page, for pretraining and fine-tuning alike."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import torch
import yaml
from torch import Tensor

from ecgscale import progress
from ecgscale.data.batch import ECGBatch
from ecgscale.data.stream import Batches
from ecgscale.errors import Diverged, InputError, MachineError
from ecgscale.run_folder import RECORDINGS
from ecgscale.stopping import Stopped, listening
from ecgscale.training import checkpoint
from ecgscale.training.beginning import begin, state_of
from ecgscale.training.boundary import Boundary, Wish
from ecgscale.training.engine import Engine
from ecgscale.training.following import after
from ecgscale.training.job import Job
from ecgscale.training.monitor import Monitor, RecordingsLog
from ecgscale.training.profile import StepProfiler, steps_to_profile
from ecgscale.training.ranks import Ranks, log
from ecgscale.training.train_config import TrainConfig

__all__ = ["Job", "TrainConfig", "Trainer", "train"]

Parts = dict[str, Tensor]  # of the loss of a micro-step, by name


def train(job: Job, ranks: Ranks) -> Engine:
    """Run to the last step, from the newest checkpoint if there is one; returns the engine with the final weights.

    Raises Stopped where the process was asked to stop, at a step boundary and with everything saved.
    """
    with listening():
        try:
            engine = Trainer(job, ranks).run()
        except Stopped:
            progress.at(job.train.steps, "")
            raise
    progress.at(job.train.steps, "export")
    return engine


class Trainer:
    """Takes a run from where it stands to its last step. All ranks do the same together."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self.job, self.ranks = job, ranks
        self.engine, self.standing, self.anew = begin(job, ranks)

    def run(self) -> Engine:
        """Train to the last step. Raises Stopped where the ranks agreed to stop before, with everything saved."""
        with self._opened():
            if self.standing.validation_due and not self._validate():
                raise Stopped(f"stopped before the validation at step {self.standing.step}")
            self.monitor.clock.take()  # what was before is no step
            while self.standing.step < self.job.train.steps:
                parts = self._update()
                actions = after(self.standing.step, self.boundary.agree(), self.job.train)
                if actions.log:
                    self._log(parts)
                # A validation of minutes would be the slowest "step" of the log line that follows it.
                with self.monitor.clock.pause():
                    # A stop that was agreed on meanwhile is carried out here: the boundary grants each wish once.
                    if actions.validate and not self._validate():
                        actions = after(self.standing.step, Wish.STOP, self.job.train)
                    if actions.save:
                        self._save(actions.validation_due)
                if actions.stop:
                    self._stop()
            self.boundary.close()
        return self.engine

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """What a run reads from and writes to, while it runs."""
        job, step = self.job, self.standing.step
        config = yaml.safe_dump(job.config, sort_keys=False)
        with ExitStack() as stack:
            self.seen = RecordingsLog(job.run / RECORDINGS, self.ranks.rank) if job.train.log_recordings else None
            if self.seen:
                stack.enter_context(closing(self.seen))
            work = job.work(self.ranks.device)
            monitor = Monitor(job.run, self.ranks, step, job.train.steps, job.name, config, work)
            self.monitor = stack.enter_context(monitor)
            if job.picture and self.anew and self.ranks.first:
                self.monitor.figure("input/masked_ecg", job.picture(job.stream.micro_batch(0, 0)), 0)
            self.profiler = stack.enter_context(closing(self._profiler()))
            self.batches: Batches = stack.enter_context(closing(job.stream.from_batch(step, self.engine.put.copied)))
            stack.enter_context(_settled())
            self.boundary = Boundary(self.ranks, job.train.checkpoint_every_s)
            self.boundary.agree()  # sends the first wishes on their way
            yield

    def _update(self) -> list[Parts]:
        """One step: the loss parts of each micro-step."""
        step, clock, parts = self.standing.step, self.monitor.clock, []
        self.profiler.begin(step + 1)
        for micro_step in range(self.job.train.accumulation):
            batch = self._batch(step, micro_step)
            _seed_dropout(self.job.train.seed, step, micro_step, self.ranks.rank)
            progress.at(step, "forward")
            with clock("forward"):
                loss, micro_parts = self.engine.forward(batch, step=step)
            progress.at(step, "backward")
            with clock("backward"):
                self.engine.backward(loss)
            progress.at(step, "update")
            with clock("optimizer"):
                updated = self.engine.step(self.job.learning_rate(step), step)
            parts.append(micro_parts)
        self.standing = self.standing.stepped(updated)
        self.profiler.end(self.standing.step)
        self.monitor.count()
        if not updated:
            self._tell_of_skipped()
        return parts

    def _batch(self, step: int, micro_step: int) -> ECGBatch:
        """The next batch, on the device."""
        progress.at(step, "batch")
        batch = self.monitor.waiting(self.batches)
        if self.seen:
            self.seen.write(step, micro_step, batch)
        with self.monitor.clock("transfer"):
            return self.engine.put(batch)

    def _tell_of_skipped(self) -> None:
        """Raises Diverged after ``train.max_skipped`` steps in a row."""
        step, in_a_row = self.standing.step, self.standing.skipped_in_a_row
        self.monitor.event("skipped", step=step, in_a_row=in_a_row)
        self.monitor.say(f"step {step} skipped on all ranks: its gradient is not finite ({in_a_row} in a row)")
        if in_a_row >= self.job.train.max_skipped:
            raise Diverged(
                f"{self.job.run}: {in_a_row} steps in a row had a non-finite gradient (the last was step {step}); "
                "lower engine.learning_rate, set engine.clip_norm, or look for damaged recordings. Checkpoints after "
                f"step {self.standing.proven} have shown no finite gradient"
            )

    def _log(self, parts: list[Parts]) -> None:
        step = self.standing.step
        scalars = {
            "train/learning_rate": self.job.learning_rate(step - 1),
            "train/gradient_norm": self.engine.gradient_norm(),
            "train/skipped_steps": float(self.standing.skipped),
        }
        self.monitor.log(step, parts, scalars | self.job.stream.counts(step), self.job.stream.own_counts())

    def _validate(self) -> bool:
        """Score the held-out recordings; False where the ranks agreed to stop meanwhile."""
        step = self.standing.step

        def stop() -> bool:
            progress.at(step, "validate")
            return self.boundary.agree() is Wish.STOP

        scalars = self.job.validate(self.engine, stop)
        if scalars is not None:
            self.monitor.write("validation", step, scalars)
        return scalars is not None

    def _save(self, validation_due: bool) -> None:
        """Write a checkpoint, and remove those that are not to be kept."""
        train, step = self.job.train, self.standing.step
        progress.at(step, "save")
        self.standing = replace(self.standing, validation_due=validation_due)
        checkpoint.save(self.job.checkpoints, self.engine, step, state_of(self.job, self.engine, self.standing))
        if self.ranks.first:
            try:
                checkpoint.prune(self.job.checkpoints, train.keep_last, train.keep_every, self.standing.proven)
            except (InputError, MachineError) as error:  # as where a reader on another machine keeps a file
                self.monitor.say(f"{error}; tried again after the next checkpoint")
        self.monitor.event("saved", step=step)
        self.boundary.saved()

    def _stop(self) -> None:
        step = self.standing.step
        self.monitor.event("stopped", step=step)
        raise Stopped(f"stopped as asked at step {step} of {self.job.train.steps}, which is saved")

    def _profiler(self) -> StepProfiler:
        train = self.job.train
        first, last = steps_to_profile(self.standing.step, train.steps, train.profile_step, train.profile_steps)
        if train.profile_steps and train.profile_step and last < first:
            log(self.ranks, f"nothing to profile: step {train.profile_step} is not among those that are to be done")
        return StepProfiler(self.job.run, self.ranks, self.monitor, first, last)


@contextmanager
def _settled() -> Iterator[None]:
    """The garbage collector leaves alone what is there: a walk over all of it would hold up a step for 0.1 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Dropout is the one draw that depends on the rank: exact on resume at the same world size."""
    # Knuth's linear congruential generator, one round per number: a plain sum would give (step 1, rank 0) and
    # (step 0, rank 1) the same dropout.
    mixed = seed
    for number in (step, micro_step, rank):
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**64
    torch.manual_seed(mixed % 2**63)
