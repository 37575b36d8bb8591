"""Where a run stands, and what follows a step: pure functions, which the loop carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ecgscale.training.boundary import Wish
from ecgscale.training.train_config import TrainConfig


@dataclass(frozen=True)
class Standing:
    """Where a run stands, at a step boundary."""

    step: int = 0
    """Steps done, those that were skipped included."""
    skipped: int = 0
    """Steps that were skipped for a gradient that is not finite."""
    skipped_in_a_row: int = 0
    """Those of them since the last update."""
    validation_due: bool = False
    """Whether the run was stopped before it had scored the held-out recordings at this step."""

    @staticmethod
    def of(state: dict[str, Any]) -> Standing:
        """Where a checkpoint's run stands."""
        due = state.get("validation_due", False)
        return Standing(state["step"], state["skipped"], state["skipped_in_a_row"], due)

    def stepped(self, updated: bool) -> Standing:
        """After one more step."""
        if updated:
            return Standing(self.step + 1, self.skipped)
        return Standing(self.step + 1, self.skipped + 1, self.skipped_in_a_row + 1)

    @property
    def updates(self) -> int:
        """Steps that were not skipped."""
        return self.step - self.skipped

    @property
    def proven(self) -> int:
        """The last step whose weights have given a finite gradient: the one before the last update."""
        return max(0, self.step - self.skipped_in_a_row - 1)


class Actions(NamedTuple):
    """What follows a step, in this order."""

    log: bool
    """Write a log line."""
    validate: bool
    """Score the held-out recordings."""
    save: bool
    """Write a checkpoint."""
    validation_due: bool
    """The checkpoint says that the held-out recordings are to be scored first when the run goes on."""
    stop: bool
    """End before the last step is done and scored."""


def after(step: int, wish: Wish, train: TrainConfig) -> Actions:
    """What follows ``step`` (from 1) where the ranks have agreed on ``wish``.

    A run that is to stop saves at once and leaves its validation to the next start.
    """
    last = step == train.steps
    stop = wish is Wish.STOP
    due = last or _every(train.validate_every, step)
    return Actions(
        log=last or _every(train.log_every, step),
        validate=due and not stop,
        save=last or wish is not Wish.GO_ON or _every(train.checkpoint_every, step),
        validation_due=due and stop,
        stop=stop,
    )


def _every(steps: int, step: int) -> bool:
    """Whether it is a multiple; of 0 none is."""
    return steps > 0 and step % steps == 0
