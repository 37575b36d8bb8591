"""What a batch script executes: ``python -m ecgscale_launch.supervise JOB_FOLDER …``, on the first node of a job.

Of an array each task has its own folder, in their order. What to run stands in the folder's job.json.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main(folders: list[str]) -> int:
    """Run the job of a folder; of several, that of this task of an array. Its exit code."""
    asked: list[int] = []  # until the supervisor listens: the imports take a moment
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: asked.append(number))
    from ecgscale.cli import run_as_command
    from ecgscale_launch.job_record import read_job
    from ecgscale_launch.places import supervise

    folder = Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))])
    return run_as_command("ecgscale-launch", lambda _: supervise(read_job(folder.parent), asked), [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
