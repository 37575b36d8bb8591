"""One process writes into a run folder at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from ecgscale import run_folder as module
from ecgscale.errors import MachineError, RankError

HOLD = """
import sys, time
from pathlib import Path
from ecgscale.run_folder import lock_run
lock_run(Path(sys.argv[1]))
print("up", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_by_name_until_the_first_has_gone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.1)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "up\n"
        with pytest.raises(RankError, match=rf"run\.dir .*: process {other.pid} of .* trains there"):
            module.lock_run(tmp_path)
        other.kill()
    monkeypatch.setattr(module, "_WAIT_S", 10.0)
    module.lock_run(tmp_path)
    module.lock_run(tmp_path)  # the same process may go on
    module.leave_run(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_left_unguarded(number, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    module.lock_run(tmp_path)
    module.leave_run(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_to_lock_is_named(number, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(MachineError, match=rf"{tmp_path}/\.writer: cannot lock: {os.strerror(number)}"):
        module.lock_run(tmp_path)


def failing(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
