"""Tensors by name in safetensors files: written whole, read back only where every number is finite."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecgscale.errors import InputError, MachineError, file_error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a file. Raises InputError where the path is wrong, MachineError where the disk fails."""
    try:
        path.touch()
        mode = path.stat().st_mode  # as of any other file; safetensors makes one that its owner alone may read
        save_file(tensors, path)
        path.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise _of_system(path, "cannot write", error) or MachineError(f"{path}: cannot write: {error}") from error


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped.

    Raises InputError that names it where it is missing or damaged, MachineError where the disk does not give it.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a readable safetensors file ({'a folder' if path.is_dir() else 'missing'})")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        damaged = InputError(f"{path}: not a readable safetensors file ({error})")
        raise _of_system(path, "cannot read", error) or damaged from error


def refuse_nonfinite(tensors: Mapping[str, Tensor], place: Path | str) -> None:
    """Raises InputError that names ``place`` and the first tensor with NaN or infinity: nothing right comes of it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{place}: {name} holds NaN or infinity; take a state from before it diverged")


def _of_system(path: Path, doing: str, error: Exception) -> InputError | MachineError | None:
    """What the system said, which safetensors gives as text only; None where it was not the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return file_error(path, doing, error)
    number = re.search(r"os error (\d+)", str(error))
    return file_error(path, doing, OSError(int(number[1]), os.strerror(int(number[1])))) if number else None
