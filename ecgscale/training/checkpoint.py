"""Checkpoints: folders that are complete or absent, independent of world size and ZeRO stage.

Tensors by name in safetensors files, one per rank that wrote them, each hashed by its writer: ``weight.NAME`` of every
parameter and ``SLOT.NAME`` of what the optimizer keeps of it (AdamW: exp_avg, exp_avg_sq), float32; ``buffer.NAME`` of
persistent buffers in their own type. Scalars, configuration and versions in ``state.json``, which is written last.
Nothing in a checkpoint can execute. A checkpoint is checked to be finite, written beside its place, verified, renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecgscale.errors import Diverged, InputError, MachineError, naming_file
from ecgscale.files import file_sha256, put_in_place, sync
from ecgscale.run_folder import PARTIAL, checkpoint_name, checkpoints, step_of, unfinished_checkpoints
from ecgscale.training.engine import Engine
from ecgscale.training.module_state import persistent_buffers
from ecgscale.training.optimizers import OptimizerState
from ecgscale.training.ranks import Ranks, all_succeed, first_rank, log
from ecgscale.training.state import STATE, check_resumable, read_state, write_state
from ecgscale.weights import open_tensors, save_tensors

_REMOVED = ".removed-"  # in front of the name of a checkpoint that is being deleted
_ATTEMPTS = 2  # one error of a disk or of a network between is no reason to end a job of many machines


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
        state = read_state(folder)
        if folder.name.split(".")[0] != checkpoint_name(state["step"]):
            raise InputError(f"{folder / STATE}: of step {state['step']}; remove {folder} to go on from the one before")
        for name, about in state["files"].items() if verify else ():
            file = folder / name
            with naming_file(file, "cannot read"):
                if not file.is_file():
                    raise InputError(f"{file}: missing; remove {folder} to go on from the checkpoint before")
                size = file.stat().st_size
            if size != about["bytes"] or file_sha256(file) != about["sha256"]:
                raise InputError(
                    f"{file}: damaged, its sha256 differs from {STATE}; remove {folder} to go on from the one before"
                )
        return Checkpoint(folder, state)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind (weight, buffer, or a slot of the optimizer such as exp_avg) by name.

        Raises InputError where one is not finite: versions that did not look saved such.
        """
        return {
            name.removeprefix(f"{kind}."): self._finite(name, opened.get_tensor(name))
            for name, opened in self._entries()
            if name.startswith(f"{kind}.")
        }

    def module_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by the names that the module has for them."""
        return self.tensors("weight") | self.tensors("buffer")

    def reader(self) -> Callable[[str, str], Tensor]:
        """(parameter name, kind) -> tensor, read when asked for; raises InputError where it is not finite."""
        entries = dict(self._entries())

        def read(name: str, kind: str) -> Tensor:
            key = f"{kind}.{name}"
            return self._finite(key, entries[key].get_tensor(key))

        return read

    def optimizer(self) -> OptimizerState:
        """What the optimizer had kept, but its slots' tensors. Earlier versions knew AdamW alone."""
        if self._early:
            return OptimizerState(["exp_avg", "exp_avg_sq"], {"step": float(self.state["optimizer_steps"])}, {})
        return OptimizerState(**self.state["optimizer"])

    @property
    def _early(self) -> bool:
        """Whether it is of a version that saved no buffers."""
        return "optimizer" not in self.state

    def check_fits(self, module: nn.Module) -> None:
        """Raises InputError unless a run of ``module`` can go on from it, with a tensor for each that it keeps."""
        check_resumable(self.folder, self.state)
        expected = self._expected(module)
        shapes: dict[str, tuple[str, list[int]]] = {}
        for name, opened in self._entries():
            if name in shapes:
                raise InputError(f"{self.folder}: holds {name[:80]} twice; {self._go_on}")
            shapes[name] = _type_and_shape(name, opened)
        for name in sorted(expected.keys() | shapes.keys()):
            saved, own = shapes.get(name), expected.get(name)
            if saved and own and saved[0] != own[0]:
                raise InputError(f"{self.folder}: {name[:80]} is {saved[0]}, not {own[0]}; {self._go_on}")
            if saved != own:
                what = "is missing" if saved is None else f"has the shape {saved[1]}"
                wanted = "knows none" if own is None else f"has {own[1]}"
                raise InputError(f"{self.folder}: {name[:80]} {what}, the model {wanted}; {self._go_on}")

    def _expected(self, module: nn.Module) -> dict[str, tuple[str, list[int]]]:
        """Type and shape of each tensor that a run of ``module`` has saved."""
        expected: dict[str, tuple[str, list[int]]] = {}
        for name, parameter in module.named_parameters():
            kinds = ("weight", *self.optimizer().slots) if parameter.requires_grad else ("weight",)
            expected |= {f"{kind}.{name}": ("F32", list(parameter.shape)) for kind in kinds}
        for name in [] if self._early else persistent_buffers(module):
            buffer = module.get_buffer(name)
            expected[f"buffer.{name}"] = (str(buffer.dtype), list(buffer.shape))
        return expected

    @property
    def _go_on(self) -> str:
        return f"remove {self.folder} to go on from the one before"

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """(name of a tensor, the opened file that holds it)."""
        for file in sorted(self.state["files"]):
            opened = open_tensors(self.folder / file)
            for name in opened.keys():  # noqa: SIM118
                yield name, opened

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not _is_sound(name, tensor):
            raise InputError(f"{self.folder}: {name[:80]} is not finite; {self._go_on}")
        return tensor


def _type_and_shape(name: str, opened: Any) -> tuple[str, list[int]]:
    if name.startswith("buffer."):
        buffer = opened.get_tensor(name)  # safetensors' names of types are its own
        return str(buffer.dtype), list(buffer.shape)
    tensor = opened.get_slice(name)
    return tensor.get_dtype(), list(tensor.get_shape())


def _is_sound(name: str, tensor: Tensor) -> bool:
    """Whether a run can go on with it: finite, but a buffer may hold infinities, as masks do."""
    wrong = tensor.isnan() if name.startswith("buffer.") else ~tensor.isfinite()
    return not bool(wrong.any())


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, verified; None where there is none."""
    finished = checkpoints(folder)
    return Checkpoint.open(finished[-1]) if finished else None


def save(folder: Path, engine: Engine, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-XXXXXXXX`` below ``folder``. All ranks call it together and share out the files.

    Raises the same error on every rank, and leaves nothing behind: Diverged where a tensor is not finite, before
    anything is written; InputError where the path is wrong; MachineError where the disk fails twice.
    """
    tensors, ranks = _collect(engine), engine.ranks
    all_succeed(_diverged(folder, step, tensors))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _write(folder / checkpoint_name(step), ranks, tensors, state | {"step": step})
        except MachineError as error:
            if attempt == _ATTEMPTS:
                raise
            log(ranks, f"{error}; trying again")
    raise AssertionError("unreachable")


def _write(final: Path, ranks: Ranks, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """One attempt to write a checkpoint."""
    partial = final.with_suffix(PARTIAL)
    first_rank(ranks, lambda: _make_empty(partial))
    name = f"tensors-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"
    outcome = _write_tensors(partial / name, tensors)
    outcomes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(outcomes, (name, outcome))
    try:
        all_succeed(None if isinstance(outcome, dict) else outcome)
        first_rank(ranks, lambda: _finish(partial, final, state | {"files": dict(outcomes)}))
    except (InputError, MachineError):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _diverged(folder: Path, step: int, tensors: dict[str, Tensor]) -> Diverged | None:
    """What is not finite of the tensors that this rank writes: from such a checkpoint no run could go on."""
    spoilt = next((name for name, tensor in tensors.items() if not _is_sound(name, tensor)), None)
    if spoilt is None:
        return None
    before = checkpoints(folder)
    goes_on = f"goes on from {before[-1].name}" if before else "begins anew"
    return Diverged(
        f"{folder}: step {step} is not saved, {spoilt} is not finite; the same command {goes_on}. "
        "If it comes to this again, lower engine.learning_rate or set engine.clip_norm"
    )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Write the state, read everything back, and give the folder its name."""
    write_state(partial, state)
    try:
        Checkpoint.open(partial)
    except InputError as error:  # nobody gave it: the disk lost what was just written
        raise MachineError(f"{partial}: what was written does not read back ({error})") from error
    with naming_file(final, "cannot write the checkpoint"):
        put_in_place(partial, final)


def _collect(engine: Engine) -> dict[str, Tensor]:
    """The tensors that this rank writes. Every rank takes part in gathering each, and its writer keeps it."""
    mine: dict[str, Tensor] = {}
    written = 0  # elements given out so far decide the writer, so that files come out equal in size
    total = sum(shape.numel() for shape in engine.shapes.values())
    slots = engine.optimizer_state().slots
    for name, shape in engine.shapes.items():
        writer = written * engine.ranks.world_size // total
        written += shape.numel()
        tensors = {f"weight.{name}": engine.weight(name)}
        if name in engine.trained:
            tensors |= {f"{slot}.{name}": engine.slot(name, slot) for slot in slots}
        if writer == engine.ranks.rank:
            mine |= {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}
    if engine.ranks.first:
        kept = engine.untrained
        mine |= {f"buffer.{name}": kept.buffer(name).detach().to("cpu", copy=True) for name in kept.buffers}
    return mine


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any] | InputError | MachineError:
    """Size and hash of the written file, or what went wrong."""
    try:
        with naming_file(path, "cannot write"):
            save_tensors(path, tensors)
            sync(path)
            return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    except (InputError, MachineError) as error:
        return type(error)(f"cannot write the checkpoint: {error}")


def prune(folder: Path, keep_last: int, keep_every: int, proven: int = 0) -> None:
    """Remove all but the last ``keep_last`` checkpoints, those at multiples of ``keep_every`` steps (0: none), and the
    newest that is known to be good: at a step up to ``proven``, whose weights have given a finite gradient since.

    What killed saves of steps before the newest left goes too: those steps may never come again.
    """
    saved = checkpoints(folder)
    good = [path for path in saved if step_of(path) <= proven]
    kept = {*saved[-keep_last:], *good[-1:]}
    doomed = [path for path in saved if path not in kept and (not keep_every or step_of(path) % keep_every)]
    with naming_file(folder, "cannot remove old checkpoints"):
        for left in folder.glob(f"{_REMOVED}step-*"):  # by a kill, or by a reader on another machine
            shutil.rmtree(left, ignore_errors=True)
        for left in unfinished_checkpoints(folder):
            if saved and step_of(left) < step_of(saved[-1]):
                shutil.rmtree(left, ignore_errors=True)
        for path in doomed:  # under another name, so that a kill meanwhile leaves no half of one under its own
            shutil.rmtree(path.rename(folder / f"{_REMOVED}{path.name}"))
