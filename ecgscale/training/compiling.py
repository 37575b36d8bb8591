"""torch.compile for the layers of a module, which are many times the same graph and so are compiled once."""

from __future__ import annotations

import os
import shlex
import shutil

import torch
from torch import nn

from ecgscale.errors import InputError
from ecgscale.model import Encoder


def compile_layers(module: nn.Module, device: torch.device) -> None:
    """Compile the blocks of its encoder in place, for the shapes that come; names of parameters stay.

    Raises InputError where there is no compiler: on a CPU of C++, on a GPU Triton.
    """
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise InputError(
                f"engine.compile: this machine has no C++ compiler {compiler}; install one, or name it in CXX"
            )
    else:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise InputError("engine.compile: needs triton on a GPU; pip install 'ecgscale[gpu]'") from error
    for encoder in module.modules():
        for block in encoder.blocks() if isinstance(encoder, Encoder) else ():
            block.compile(dynamic=False)
