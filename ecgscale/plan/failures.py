"""How often to save, and which share of the time is training where machines fail.

Young, "A first order approximation to the optimum checkpoint interval" (1974); Daly, "A higher order estimate of the
optimum checkpoint interval for restart dumps" (2006). Failures come at random moments, independently, with a mean time
between them that is a GPU's over the number of GPUs; while a run restarts it can fail again.
"""

from __future__ import annotations

from math import exp, sqrt

import numpy as np

_HOPELESS = 10.0
"""Means between failures that an interval, its checkpoint and a restart may last: beyond, less than 0.05 % is kept."""


def young_interval_s(save_s: float, between_failures_s: float) -> float:
    """Seconds of training between two checkpoints, to first order."""
    return sqrt(2 * save_s * between_failures_s)


def daly_interval_s(save_s: float, between_failures_s: float) -> float:
    """Seconds of training between two checkpoints; Daly's equation 37."""
    if save_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = save_s / (2 * between_failures_s)
    return young_interval_s(save_s, between_failures_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_s


def effective_share(interval_s: float, save_s: float, restart_s: float, between_failures_s: float) -> float:
    """Share of the time that is training which is kept; Daly's equation 20 (complete, without approximation).

    0 where failures come so fast that hardly ever a next checkpoint is reached.
    """
    m = between_failures_s
    if (interval_s + save_s + restart_s) / m > _HOPELESS:
        return 0.0
    return interval_s / (m * exp(restart_s / m) * (exp((interval_s + save_s) / m) - 1))


def simulated_share(
    interval_s: float, save_s: float, restart_s: float, between_failures_s: float, failures: int, seed: int
) -> float:
    """The same by trying: a run until so many failures, whose times are drawn.

    Each is followed by a restart, in which it can fail again; then by intervals with their checkpoints, of which the
    last is thrown away unless it is whole.
    """
    between_F = np.random.default_rng(seed).exponential(between_failures_s, failures)
    reached_F = np.maximum(between_F - restart_s, 0.0) // (interval_s + save_s)
    return float(reached_F.sum() * interval_s / between_F.sum())
