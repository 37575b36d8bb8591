"""Checkpoints: folders that are complete or absent, independent of world size and ZeRO stage.

fp32 weights and Adam moments by parameter name in safetensors files, one per rank that wrote them, each hashed by its
writer; scalars, configuration and versions in ``state.json``, which is written last. Nothing in a checkpoint can
execute. A checkpoint is written beside its place, verified, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ecgscale.data.shards import file_sha256
from ecgscale.errors import InputError, MachineError, file_error, naming_file
from ecgscale.training.engine import MOMENTS, Engine
from ecgscale.training.ranks import all_succeed, first_rank

FORMAT = "ecgscale-checkpoint/1"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, opened."""

    folder: Path
    state: dict[str, Any]  # step, position, skipped, optimizer_steps, config, versions, files

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @staticmethod
    def open(folder: Path, verify: bool = True) -> Checkpoint:
        """Open and verify; raises InputError that names the missing or damaged file."""
        path = folder / STATE
        try:
            state = json.loads(path.read_bytes())
            files, known = state["files"], state["format"]
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing, so {folder} is no complete checkpoint; remove the folder") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove {folder} to go on from the one before") from error
        if known != FORMAT:
            raise InputError(f"{path}: format {known!r} is not {FORMAT!r}")
        if state.get("sha256") != _digest(state) or folder.name.split(".")[0] != _name(state["step"]):
            raise InputError(f"{path}: damaged or of another checkpoint; remove {folder} to go on from the one before")
        for name, about in files.items() if verify else ():
            file = folder / name
            if not file.is_file():
                raise InputError(f"{file}: missing; remove {folder} to go on from the checkpoint before")
            if file.stat().st_size != about["bytes"] or file_sha256(file) != about["sha256"]:
                raise InputError(
                    f"{file}: damaged, its sha256 differs from {STATE}; remove {folder} to go on from the one before"
                )
        return Checkpoint(folder, state)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind (weight, exp_avg, exp_avg_sq) by parameter name."""
        found: dict[str, Tensor] = {}
        for file in sorted(self.state["files"]):
            tensors = open_tensors(self.folder / file)
            names = [name for name in tensors.keys() if name.startswith(f"{kind}.")]  # noqa: SIM118
            found |= {name.removeprefix(f"{kind}."): tensors.get_tensor(name) for name in names}
        return found

    def reader(self) -> Callable[[str, str], Tensor]:
        """(parameter name, kind) -> tensor, read when asked for."""
        opened = [open_tensors(self.folder / file) for file in sorted(self.state["files"])]
        where = {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118
        return lambda name, kind: where[f"{kind}.{name}"].get_tensor(f"{kind}.{name}")


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped; raises InputError where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir())


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, verified; None where there is none."""
    found = checkpoints(folder)
    return Checkpoint.open(found[-1]) if found else None


def save(folder: Path, engine: Engine, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-XXXXXXXX`` below ``folder``. All ranks call it together and share out the files.

    Raises the same error on every rank, and leaves nothing behind, where any rank cannot write: InputError where the
    path is wrong, MachineError where the disk fails.
    """
    final, ranks = folder / _name(step), engine.ranks
    partial = final.with_suffix(".partial")
    first_rank(ranks, lambda: _make_empty(partial))
    name = f"tensors-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"
    outcome = _write_tensors(partial / name, _collect(engine))
    outcomes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(outcomes, (name, outcome))
    try:
        all_succeed(None if isinstance(outcome, dict) else outcome)
        first_rank(ranks, lambda: _finish(partial, final, state | {"step": step, "files": dict(outcomes)}))
    except (InputError, MachineError):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Write the state, read everything back, and give the folder its name."""
    with naming_file(partial, "cannot write the checkpoint"):
        write_state(partial, state)
        Checkpoint.open(partial)
        partial.replace(final)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's scalars with their own hash, down to the disk."""
    state = state | {"format": FORMAT}
    with (folder / STATE).open("wb") as file:
        file.write(json.dumps(state | {"sha256": _digest(state)}, indent=1, sort_keys=True).encode())
        file.flush()
        os.fsync(file.fileno())


def _digest(state: dict[str, Any]) -> str:
    """sha256 of a state but for its own hash."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _collect(engine: Engine) -> dict[str, Tensor]:
    """The tensors that this rank writes. Every rank takes part in gathering each, and its writer keeps it."""
    mine: dict[str, Tensor] = {}
    written = 0  # bytes given out so far decide the writer, so that files come out equal in size
    total = sum(shape.numel() for shape in engine.shapes.values())
    for name, shape in engine.shapes.items():
        writer = written * engine.ranks.world_size // total
        written += shape.numel()
        tensors = {f"weight.{name}": engine.weight(name)}
        if name in engine.trained:
            tensors |= {f"{kind}.{name}": engine.moment(name, kind) for kind in MOMENTS}
        if writer == engine.ranks.rank:
            mine |= {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}
    return mine


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any] | InputError | MachineError:
    """Size and hash of the written file, or what went wrong."""
    try:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    except OSError as error:
        return file_error(path, "cannot write the checkpoint", error)
    except SafetensorError as error:  # how safetensors says what the disk did
        return MachineError(f"{path}: cannot write the checkpoint: {error}")


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the last ``keep_last`` checkpoints and those at multiples of ``keep_every`` steps (0: none)."""
    for path in checkpoints(folder)[:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            shutil.rmtree(path)
