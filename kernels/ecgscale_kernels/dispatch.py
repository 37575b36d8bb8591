"""Which implementation runs: Triton kernels on a GPU, plain PyTorch elsewhere, or what is forced."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

Backend = Literal["reference", "triton"]
VARIABLE = "ECGSCALE_KERNELS"

_forced: list[Backend] = []


def backend(device_type: str) -> Backend:
    """What runs for tensors on ``cuda`` or ``cpu``.

    ``ECGSCALE_KERNELS`` forces one. On a CPU Triton runs in its interpreter, which ``TRITON_INTERPRET=1`` must have
    turned on when the process began. Raises ValueError where what is forced cannot run.
    """
    chosen = _forced[-1] if _forced else os.environ.get(VARIABLE, "")
    if chosen not in ("", *get_args(Backend)):
        raise ValueError(f"{VARIABLE}={chosen}: give reference or triton, or leave it unset")
    has_triton = find_spec("triton") is not None
    if chosen == "triton":
        if not has_triton:
            raise ValueError(f"{VARIABLE}=triton: Triton is not installed; pip install 'ecgscale[gpu]'")
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"{VARIABLE}=triton: {device_type} tensors need TRITON_INTERPRET=1; or use a GPU")
    elif chosen == "reference" or device_type != "cuda" or not has_triton:
        return "reference"
    for name in (
        "patch_embed",
        "conv_stem",
    ):  # registers the ops, and imports triton, which only now is known to be there
        importlib.import_module(f"ecgscale_kernels.{name}")
    return "triton"


# As torch.compiler.assume_constant_result does, which imports the compiler, and with it Triton: 1.7 s at every start.
backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def forced(name: Backend) -> Iterator[None]:
    """One implementation, whatever the environment says, while it lasts."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
