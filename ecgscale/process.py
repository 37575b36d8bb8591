"""What the system knows of this process."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")  # of Linux


def memory_bytes(what: str) -> int:
    """A size in ``STATUS``: VmRSS is what is held, VmHWM the most that was, RssAnon what is held beside mapped files.

    VmHWM is of this process alone, unlike getrusage's, which keeps the peak of the one that this one was started from.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024
