"""How the ranks of a job find each other, and what is said where some do not come."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from ecgscale.training.environment import MEETING_TIMEOUT_S, NODES

MEET = """
import sys
from ecgscale.cli import run_as_command

def meet(arguments):
    from ecgscale.training.ranks import start_ranks
    start_ranks()
    return 0

sys.exit(run_as_command("meet", meet, []))
"""


@pytest.fixture
def start():
    """Starts one rank of four, which waits three seconds for the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {MEETING_TIMEOUT_S: "3", NODES: "n1,n2"}
    started = []

    def rank(number: int) -> subprocess.Popen[str]:
        env = os.environ | common | {"RANK": str(number), "LOCAL_RANK": str(number % 2)}
        started.append(subprocess.Popen([sys.executable, "-c", MEET], env=env, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield rank
    for process in started:
        process.kill()
        process.communicate()


def test_missing_ranks_are_named_with_their_nodes(start) -> None:
    first, other = start(0), start(1)
    assert "meet: after 3 s ranks 2 (n2), 3 (n2) are missing\n" in first.communicate(timeout=60)[1]
    assert "meet: rank 1 lost or never found rank 0 at 127.0.0.1:" in other.communicate(timeout=60)[1]
    assert (first.returncode, other.returncode) == (1, 1)


def test_a_rank_without_the_first_says_so(start) -> None:
    alone = start(2)
    assert "meet: rank 2 lost or never found rank 0 at 127.0.0.1:" in alone.communicate(timeout=60)[1]
    assert alone.returncode == 1
