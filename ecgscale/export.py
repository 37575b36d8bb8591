"""Exports: ``config.json`` + ``model.safetensors`` with everything needed to use an encoder.

Its shape, its weights, the preprocessing profile that it was trained with and, for a classifier, its task.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ecgscale.data.selection import Normalisation
from ecgscale.data.shards import write_whole
from ecgscale.errors import InputError
from ecgscale.model.encoder import ModelConfig
from ecgscale.record import LEADS
from ecgscale.training.checkpoint import Checkpoint, checkpoints, open_tensors, step_of
from ecgscale.training.engine import Engine
from ecgscale.training.ranks import first_rank

FORMAT = "ecgscale-export/1"


@dataclass(frozen=True)
class Profile:
    """The preprocessing that a model was trained with. Feeding it anything else fails silently, so it travels along."""

    rate_hz: float
    segment_s: float
    normalisation: Normalisation
    leads: tuple[str, ...] = LEADS

    def __post_init__(self) -> None:
        if not (self.rate_hz > 0 and self.segment_s > 0):
            raise InputError(f"profile: rate_hz {self.rate_hz} and segment_s {self.segment_s} must be positive")
        if self.normalisation not in ("mv", "zscore"):
            raise InputError(f"profile: normalisation {self.normalisation!r}; known are mv and zscore")
        if self.leads != LEADS:
            raise InputError(f"profile: leads {self.leads}; this version knows {LEADS}")


def write_export(folder: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write ``encoder.*`` and ``head.*`` weights with what is to be known about them; complete or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        used = {
            name: tensor.float().contiguous().cpu()
            for name, tensor in weights.items()
            if name.startswith(("encoder.", "head."))
        }
        save_file(used, partial / "model.safetensors")
        write_whole(partial / "config.json", json.dumps(about | {"format": FORMAT}, indent=1, sort_keys=True).encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{folder}: cannot write the export: {error}") from error
    return folder


def check_token(model: ModelConfig, profile: Profile) -> None:
    """Raises InputError where the profile's segments are shorter than one token of the model."""
    if profile.segment_s * profile.rate_hz < model.patch_samples:
        raise InputError(
            f"segments of {profile.segment_s:g} s at {profile.rate_hz:g} Hz are shorter than one token of "
            f"{model.patch_samples} samples; give longer ones (data.segment_s)"
        )


def about_model(model: ModelConfig, profile: Profile, **task: Any) -> dict[str, Any]:
    """What an export's config.json says. Raises InputError where the profile's segments hold no token."""
    check_token(model, profile)
    return {"model": asdict(model), "profile": asdict(profile)} | task


def export_engine(folder: Path, engine: Engine, about: dict[str, Any], step: int) -> Path:
    """The engine's weights as an export. All ranks call it together."""
    weights = {name: engine.weight(name).cpu() for name in engine.shapes}
    first_rank(engine.ranks, lambda: write_export(folder, weights, about | {"step": step}))
    return folder


def amend_export(folder: Path, **more: Any) -> None:
    """Add to what an export says of its model."""
    write_whole(folder / "config.json", json.dumps(_read_about(folder) | more, indent=1, sort_keys=True).encode())


def export_run(run: Path, out: Path) -> Path:
    """The newest state of a run as an export; refuses to overwrite anything that is no export."""
    if out.exists():
        try:
            _read_about(out)
        except InputError as error:
            raise InputError(f"{out}: exists and is no export; give a new folder") from error
    _, weights, about = read_model(run)
    return write_export(out, weights, about)


def read_model(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Place, weights and description of an export, or of a run's newest state: its export or a later checkpoint."""
    if (path / "config.json").is_file():
        return path, *_read_export(path)
    export, saved = path / "export", checkpoints(path / "checkpoints")
    if (export / "config.json").is_file():
        weights, about = _read_export(export)
        if not saved or step_of(saved[-1]) <= about.get("step", 0):
            return export, weights, about
    if not saved:
        raise InputError(f"{path}: neither an export (config.json) nor a run folder with checkpoints")
    checkpoint = Checkpoint.open(saved[-1])
    return checkpoint.folder, checkpoint.tensors("weight"), checkpoint.state["about"] | {"step": checkpoint.step}


def _read_export(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about, path = _read_about(folder), folder / "model.safetensors"
    tensors = open_tensors(path)
    weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for name in weights:
        if not name.startswith(("encoder.", "head.")):
            raise InputError(f"{path}: left over {name}; an export holds encoder.* and head.* alone")
    return weights, about


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'config.json'}: damaged ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder / 'config.json'}: not the config of an ecgscale export (format {FORMAT!r})")
    return about
