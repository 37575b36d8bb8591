"""Exports: ``config.json`` + ``model.safetensors`` with everything needed to use an encoder, or to train it further.

Its shape, its weights and those of its heads, the preprocessing profile that it was trained with and, for a classifier,
its task.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ecgscale.data.selection import Normalisation
from ecgscale.errors import InputError
from ecgscale.files import file_sha256, write_whole
from ecgscale.model.encoder import ModelConfig
from ecgscale.record import LEADS
from ecgscale.training.checkpoint import Checkpoint, checkpoints, step_of
from ecgscale.training.engine import Engine
from ecgscale.training.ranks import first_rank
from ecgscale.weights import open_tensors

FORMAT = "ecgscale-export/1"
PREFIXES = ("encoder.", "head.", "local_head.", "arcface.")  # of the weights that an export holds


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
    """Write the weights of PREFIXES with what is to be known about them; complete or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        used = {
            name: tensor.float().contiguous().cpu() for name, tensor in weights.items() if name.startswith(PREFIXES)
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
    if out.exists() and not is_export(out):
        raise InputError(f"{out}: exists and is no export; give a new folder")
    _, weights, about = read_model(run)
    return write_export(out, weights, about)


def read_model(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Place, weights and description of an export, or of a run's newest state: its export or a later checkpoint."""
    place, about = _newest(path)
    if (place / "config.json").is_file():
        return place, _read_weights(place), about
    return place, Checkpoint.open(place).tensors("weight"), about


def read_about(path: Path) -> tuple[Path, dict[str, Any]]:
    """What ``read_model`` gives but the weights, of which none is read."""
    return _newest(path)


def weights_sha256(path: Path) -> str:
    """Of the weights that ``read_model`` reads."""
    place, _ = _newest(path)
    hashes = [f"{file.name} {file_sha256(file)}" for file in sorted(place.glob("*.safetensors"))]
    return sha256("\n".join(hashes).encode()).hexdigest()


def is_export(folder: Path) -> bool:
    """Whether an export stands there, which may be written anew."""
    try:
        _read_about(folder)
    except InputError:
        return False
    return True


def is_model(path: Path) -> bool:
    """Whether a folder is an export or a run folder; what it holds may still be damaged."""
    return any((path / name).exists() for name in ("config.json", "config.yaml", "checkpoints"))


def described(place: Path, about: dict[str, Any]) -> tuple[ModelConfig, Profile]:
    """Shape and preprocessing of a model; raises InputError where this version does not know them."""
    try:
        model = ModelConfig(**about["model"])
        profile = Profile(**about["profile"] | {"leads": tuple(about["profile"]["leads"])})
        check_token(model, profile)
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{place}: does not describe a model of this version ({error})") from error
    return model, profile


def _newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """An export, or of a run the export or a later checkpoint, and its description."""
    if (path / "config.json").is_file():
        return path, _read_about(path)
    export, saved = path / "export", checkpoints(path / "checkpoints")
    if (export / "config.json").is_file():
        about = _read_about(export)
        if not saved or step_of(saved[-1]) <= about.get("step", 0):
            return export, about
    if not saved:
        raise InputError(f"{path}: neither an export (config.json) nor a run folder with checkpoints")
    checkpoint = Checkpoint.open(saved[-1], verify=False)
    return saved[-1], checkpoint.state["about"] | {"step": checkpoint.step}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    tensors = open_tensors(path)
    weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for name in weights:
        if not name.startswith(PREFIXES):
            known = ", ".join(f"{prefix}*" for prefix in PREFIXES)
            raise InputError(f"{path}: left over {name}; an export holds {known} alone")
    return weights


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'config.json'}: damaged ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder / 'config.json'}: not the config of an ecgscale export (format {FORMAT!r})")
    return about
