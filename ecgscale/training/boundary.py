"""What the ranks agree on at a step boundary: to go on, to save, or to save and stop."""

from __future__ import annotations

import time
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from ecgscale import stopping
from ecgscale.training.ranks import Ranks


class Wish(IntEnum):
    """What a rank wants done at a boundary; the greatest wish of all ranks counts."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # and save


class Boundary:
    """The meeting of the ranks at step boundaries.

    Wishes travel while the next step is computed, over sockets of their own beside the device's queue: nothing waits,
    and a wish is granted one boundary later, by all ranks at the same.
    """

    def __init__(self, ranks: Ranks, save_every_s: float) -> None:
        """``save_every_s`` is the first rank's clock for checkpoints; 0: none."""
        self._ranks, self._save_every_s = ranks, save_every_s
        self._group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._travelling: tuple[torch.Tensor, Any] | None = None
        self._saved = time.monotonic()

    def agree(self) -> Wish:
        """The wish that was granted. All ranks call it together, at every boundary."""
        granted = self._wish() if self._group is None else self._arrived()
        # After STOP nobody meets again, and a wish that is sent would never be taken in.
        if self._group is not None and granted is not Wish.STOP:
            own = self._wish()
            if granted is own is Wish.SAVE:  # it is about to be fulfilled
                own = Wish.GO_ON
            wish = torch.tensor(int(own))
            work = dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._travelling = (wish, work)
        return granted

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.monotonic()

    def close(self) -> None:
        """Wait for what still travels. All ranks that end without an error call it."""
        self._arrived()

    def _wish(self) -> Wish:
        if stopping.asked():
            return Wish.STOP
        due = self._ranks.first and self._save_every_s and time.monotonic() - self._saved >= self._save_every_s
        return Wish.SAVE if due else Wish.GO_ON

    def _arrived(self) -> Wish:
        if self._travelling is None:
            return Wish.GO_ON
        wish, work = self._travelling
        work.wait()
        self._travelling = None
        return Wish(int(wish))
