"""What the host waits for in a step, counted on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WAYS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]


def test_a_step_reads_the_device_only_to_see_whether_to_skip() -> None:
    command = [sys.executable, str(Path(__file__).parent / "device_waits.py"), json.dumps(WAYS)]
    said = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True).stdout.splitlines()
    for (stage, precision), line in zip(WAYS, said, strict=True):
        found = json.loads(line)
        parameters, reads = found.pop("parameters"), found.pop("update reads")
        assert not found, "forward, backward, and DeepSpeed's own timer"
        if precision == "fp32" or stage == 3:
            assert reads == 1
        else:  # DeepSpeed 0.19.8: the finding of all ranks, and the norm; at stage 0 each parameter before
            assert reads == (parameters + 3 if stage == 0 else 2)
