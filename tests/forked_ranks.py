"""Starts the ranks of jobs by forking, after the slow imports were done once, and kills them when told so.

Reads one JSON object per line: world_size, program (module:function), jobs (the argument lists with which each rank
calls it one after the other), errors (a file for each rank's stderr), environment (more variables), and kill (the run,
the step after whose log line all ranks get SIGKILL, and how many seconds later; or null). Answers with a line: the exit
code of each rank, negative for a signal.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print while they are imported is no answer

# What a run would import when it gets there.
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import setuptools  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.flop_counter  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import ecgscale.downstream.finetune  # noqa: E402
import ecgscale.pretrain  # noqa: E402, F401


def start(rank: int, program: str, jobs: list[list[str]], errors: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        module, _, name = program.partition(":")
        main = getattr(importlib.import_module(module), name)
        code = next((code for arguments in jobs if (code := main(arguments))), 0)
    finally:  # an error ends the rank, not the server whose copy it is
        if sys.exc_info()[0]:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)


def logged(run: Path, step: int) -> bool:
    events = run / "events.jsonl"
    return events.exists() and f'"step": {step}, "train/' in events.read_text()


def run(
    world_size: int,
    program: str,
    jobs: list[list[str]],
    errors: list[str],
    kill: tuple[str, int, float] | None,
    environment: dict[str, str],
) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids = [start(rank, program, jobs, errors[rank], environment) for rank in range(world_size)]
    if kill is not None:
        folder, step, later_s = kill
        while not logged(Path(folder), step) and os.waitpid(pids[0], os.WNOHANG) == (0, 0):
            time.sleep(0.01)
        time.sleep(later_s)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # ranks collect garbage before their first step, and need not walk what is here
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)
