"""Tensors by name in safetensors files: written whole, read back only where every number is finite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecgscale.errors import InputError, MachineError, file_error, naming_file


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a file. Raises InputError where the path is wrong, MachineError where the disk fails."""
    try:
        with naming_file(path, "cannot write"):
            save_file(tensors, path)
    except SafetensorError as error:  # how safetensors says what the system did
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise MachineError(f"{path}: cannot write: {error}") from error
        raise file_error(path, "cannot write", OSError(int(number[1]), str(error))) from error


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped. Raises InputError that names it where it is missing or damaged, MachineError else."""
    try:
        with naming_file(path, "cannot read"):
            return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: damaged, not a safetensors file ({error})") from error


def refuse_nonfinite(tensors: Mapping[str, Tensor], place: Path | str) -> None:
    """Raises InputError that names ``place`` and the first tensor with NaN or infinity: nothing right comes of it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{place}: {name} holds NaN or infinity; take a checkpoint from before it diverged")
