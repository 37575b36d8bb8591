"""Loss on held-out recordings, while a run trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ecgscale.data.selection import Selection, evaluation_batches
from ecgscale.training.engine import Engine
from ecgscale.training.monitor import average_over_ranks


@dataclass
class Validation:
    """Mean loss parts over every recording of a selection, once each, masked and cropped as in training."""

    selection: Selection
    batch: int  # recordings at once over all ranks
    segments: int
    seed: int
    target: npt.NDArray[np.float32] | None = None

    def __call__(self, engine: Engine, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Scalars by name, the same on all ranks, which call it together; none for an empty selection.

        ``stop`` is asked before each batch, and must answer alike on all ranks; None where it said yes.
        """
        ranks, sums, recordings = engine.ranks, defaultdict[str, float](float), 0
        batches = evaluation_batches(
            self.selection, self.batch, self.segments, self.seed, ranks.rank, ranks.world_size, self.target
        )
        with engine.evaluating():
            for batch, share in batches:
                if stop():
                    return None
                _, parts = engine.forward(engine.put(batch), share=share)
                # A shared batch has rows on each rank; the rest, which does not come out even, is the same on all.
                weight = batch.rows * (ranks.world_size if share else 1)
                for name, value in average_over_ranks(parts).items():
                    sums[name] += value * weight
                recordings += weight
        return {f"validation/{name}": total / recordings for name, total in sums.items()}
