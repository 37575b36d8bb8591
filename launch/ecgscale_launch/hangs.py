"""Whether the ranks of an attempt still move, by what each writes of its progress."""

from __future__ import annotations

import time
from pathlib import Path

from ecgscale.files import read_json_now


class HangWatch:
    """Looks at ``rank-*.alive.json`` in the folder of an attempt."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self._folder, self._limit_s = folder, limit_s
        self._looked = self._moved = time.monotonic()
        self._counts: dict[int, int] = {}
        self._written: dict[int, tuple[float, float]] = {}  # rank -> the time that it wrote, when we saw that change

    def first_step(self) -> float | None:
        """When rank 0 had done its first step."""
        return (read_json_now(self._folder / "rank-0.alive.json") or {}).get("first_step")

    def stuck(self) -> str | None:
        """Which rank is stuck, when none has begun anything new for the limit; the rest waits for it."""
        now = time.monotonic()
        if not self._limit_s or now - self._looked < min(10.0, self._limit_s / 4):
            return None
        self._looked = now
        reports = list(filter(None, map(read_json_now, self._folder.glob("rank-*.alive.json"))))
        running = [report for report in reports if not report.get("ended")]
        if reports and not running:
            return None
        for report in running:
            if self._written.get(report["rank"], (0.0, 0.0))[0] != report["time"]:
                self._written[report["rank"]] = (report["time"], now)
        counts = {report["rank"]: report["count"] for report in running}
        outside_of_steps = running and all(not report["phase"] for report in running)
        if counts != self._counts or outside_of_steps:
            self._counts, self._moved = counts, now
        if now - self._moved < self._limit_s:
            return None
        if not running:
            return f"no rank has begun within {self._limit_s:g} s"
        silent = [report for report in running if now - self._written[report["rank"]][1] > self._limit_s / 2]
        last = min(silent or running, key=lambda report: report["count"])
        where = f"rank {last['rank']} on {last['host']} is stuck in {last['phase'] or 'its end'} at step {last['step']}"
        return f"no progress for {self._limit_s:g} s: {where}" + (" and does not answer" if silent else "")
