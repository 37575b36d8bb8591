"""One job of several processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

_GRACE_S = 30.0  # between asking the other ranks to end and killing them


def run_local(processes: int, command: list[str]) -> int:
    """Run ``ecgscale COMMAND …`` on ``processes`` ranks; the first exit code that is not 0, or 0.

    When one rank fails, the others are asked to end and, after 30 s, killed. Output of rank 0 is shown as it comes,
    and errors of all ranks.
    """
    port = _free_port()
    ranks = [_start(rank, processes, port, command) for rank in range(processes)]

    def forward(number: int, _: FrameType | None) -> None:
        _tell(ranks, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(rank: int, processes: int, port: int, command: list[str]) -> subprocess.Popen[bytes]:
    cores = max(1, (os.cpu_count() or 1) // processes)
    env = {"OMP_NUM_THREADS": str(cores)} | os.environ
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shown = None if rank == 0 else subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "ecgscale.cli", *command], env=env, stdout=shown)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            code = codes[failed] or 0
            how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
            _end(ranks)
            print(f"ecgscale-launch: rank {failed} {how}; the others were ended", file=sys.stderr)
            return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(0.1)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    _tell(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _tell(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
