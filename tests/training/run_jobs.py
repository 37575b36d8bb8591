"""Run several `ecgscale` jobs one after the other in this process: what the tests start as real ranks."""

from __future__ import annotations

import json
import sys

import torch

from ecgscale.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[1]):
        code = main(arguments)
        if code:
            sys.exit(code)
