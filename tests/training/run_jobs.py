"""Run several pretraining jobs one after the other in this process: what the tests start as real ranks."""

from __future__ import annotations

import json
import sys

import torch

from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError
from ecgscale.pretrain import pretrain

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(sys.argv[1]):
        try:
            pretrain(load(PretrainConfig, arguments))
        except InputError as error:
            print(f"ecgscale: {error}", file=sys.stderr)
            sys.exit(2)
