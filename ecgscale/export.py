"""Exports: ``config.json`` + ``model.safetensors`` with everything needed to use an encoder, or to train it further.

Its shape, its weights and those of its heads, the preprocessing profile that it was trained with and, for a classifier,
its task.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecgscale import run_folder
from ecgscale.data.selection import Normalisation
from ecgscale.errors import InputError, naming_file
from ecgscale.files import SEAL, file_sha256, read_json, seal_holds, sealed, standing, whole_folder, write_json
from ecgscale.lead_names import LEADS
from ecgscale.model import DEFAULT, ENCODERS, EncoderConfig, build_encoder
from ecgscale.registry import is_code
from ecgscale.run_folder import CHECKPOINTS, EXPORT, RUN_ID, TRAINED_ON, newest_checkpoint, step_of
from ecgscale.training.checkpoint import Checkpoint
from ecgscale.training.engine import Engine
from ecgscale.training.ranks import first_rank
from ecgscale.weights import open_tensors, refuse_nonfinite, save_tensors

FORMAT = "ecgscale-export/2"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FORMAT_WITHOUT_CHECKSUMS = "ecgscale-export/1"  # as earlier versions wrote it
_LONGEST_SAMPLES = 1 << 20  # of a segment: attention over its tokens has long gone beyond any memory
_WEIGHTS_SHA256 = "weights_sha256"  # key of the config
_PARTS = "parts"  # key of the config: the modules whose weights it holds, such as encoder
_PARTS_BEFORE = ["encoder", "head", "local_head", "arcface"]  # which an export without that key may hold

# What a config says beside model and profile, by the type that its readers rely on.
_TYPES: dict[str, type] = {
    "step": int,
    "classes": list,
    "thresholds": list,
    "leads": list,
    "task": dict,
    "codes": dict,
    "source": dict,
    "neighbours": int,
    "run": str,
    "exclusive": bool,
    _PARTS: list,
}


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
        if not self.rate_hz * self.segment_s <= _LONGEST_SAMPLES:
            raise InputError(
                f"profile: segments of {self.segment_s:g} s at {self.rate_hz:g} Hz have more than {_LONGEST_SAMPLES} "
                "samples"
            )
        if self.normalisation not in ("mv", "zscore"):
            raise InputError(f"profile: normalisation {self.normalisation!r}; known are mv and zscore")
        if self.leads != LEADS:
            raise InputError(f"profile: leads {self.leads}; this version knows {LEADS}")


def write_export(
    folder: Path, weights: dict[str, Tensor], about: dict[str, Any], trained_on: Path | None = None
) -> Path:
    """Write weights with what is to be known about them; complete or absent.

    All of them, or those of the ``parts`` alone that ``about`` names.

    ``trained_on``: the file that says on which recordings, which is copied if it is there.
    Raises InputError for weights that are not finite and where the path is wrong, MachineError where the disk fails;
    an export that stood there then still stands.
    """
    parts = about.get(_PARTS) or parts_of(weights)
    used = {name: tensor.float().contiguous().cpu() for name, tensor in weights.items() if part_of(name) in parts}
    refuse_nonfinite(used, f"{folder}: not exported")
    with whole_folder(folder) as partial:
        save_tensors(partial / WEIGHTS, used)
        if trained_on is not None and trained_on.is_file():
            shutil.copyfile(trained_on, partial / TRAINED_ON)
        more = {_PARTS: parts, _WEIGHTS_SHA256: file_sha256(partial / WEIGHTS)}
        write_json(partial / CONFIG, _sealed(about | more))
    return folder


def part_of(name: str) -> str:
    """The module that a weight belongs to: encoder.norm.bias -> encoder."""
    return name.partition(".")[0]


def parts_of(names: Iterable[str]) -> list[str]:
    """The modules that weights belong to, each once."""
    return list(dict.fromkeys(map(part_of, names)))


def _sealed(about: dict[str, Any]) -> dict[str, Any]:
    return sealed(about | {"format": FORMAT})


def check_token(model: EncoderConfig, profile: Profile) -> None:
    """Raises InputError where the profile's segments are shorter than one token of the model."""
    if profile.segment_s * profile.rate_hz < model.patch_samples:
        raise InputError(
            f"segments of {profile.segment_s:g} s at {profile.rate_hz:g} Hz are shorter than one token of "
            f"{model.patch_samples} samples; give longer ones (data.segment_s)"
        )


def about_model(model: EncoderConfig, profile: Profile, **task: Any) -> dict[str, Any]:
    """What an export's config.json says. Raises InputError where the profile's segments hold no token."""
    check_token(model, profile)
    return {"model": asdict(model), "profile": asdict(profile)} | task


def export_engine(run: Path, engine: Engine, about: dict[str, Any], step: int) -> Path:
    """The engine's weights as the export of a run folder. All ranks call it together."""
    weights = engine.module_state()
    first_rank(engine.ranks, lambda: export_of_run(run, weights, about | {"step": step}))
    return run / EXPORT


def export_of_run(run: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """The export in a run folder, which says whose it is."""
    return write_export(run / EXPORT, weights, about | run_of(run), run / TRAINED_ON)


def run_of(run: Path) -> dict[str, str]:
    """What an export says of the run that it is of; nothing of one that an earlier version began."""
    path = run / RUN_ID
    with naming_file(path, "cannot read"):
        return {"run": path.read_text().strip()} if path.is_file() else {}


def amend_export(folder: Path, **more: Any) -> None:
    """Add to what an export says of its model."""
    write_json(folder / CONFIG, _sealed(_read_about(folder) | more))


def export_run(run: Path, out: Path) -> Path:
    """The newest state of a run as an export; refuses to overwrite anything that is no export."""
    if out.exists() and not is_export(out):
        raise InputError(f"{out}: exists and is no export; give a new folder")
    place, weights, about = read_model(run)
    return write_export(out, weights, about, trained_on_file(place))


def read_model(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Place, weights and description of an export, or of a run's newest state: its export or a later checkpoint."""
    place, about = _newest(path)
    if (place / CONFIG).is_file():
        return place, _read_weights(place, about), about
    checkpoint = Checkpoint.open(place)
    weights = checkpoint.tensors("weight")
    _check_numbers(weights, place)
    return place, weights | {name: buffer.float() for name, buffer in checkpoint.tensors("buffer").items()}, about


def read_about(path: Path) -> tuple[Path, dict[str, Any]]:
    """What ``read_model`` gives but the weights, of which none is read."""
    return _newest(path)


def trained_on_file(place: Path) -> Path:
    """Where it stands of an export, or of a checkpoint in ``checkpoints/`` of a run, whether it is there or not."""
    return (place if (place / CONFIG).is_file() else place.parents[1]) / TRAINED_ON


def weights_sha256(path: Path) -> str:
    """Of the weights that ``read_model`` reads."""
    place, _ = _newest(path)
    hashes = [f"{file.name} {file_sha256(file)}" for file in sorted(place.glob("*.safetensors"))]
    return sha256("\n".join(hashes).encode()).hexdigest()


def is_export(folder: Path) -> bool:
    """Whether an export stands there, which may be written anew."""
    try:
        _read_about(standing(folder))
    except InputError:
        return False
    return True


def is_model(path: Path) -> bool:
    """Whether a folder is an export or a run folder; what it holds may still be damaged."""
    place = standing(path)
    return any((place / name).exists() for name in (CONFIG, run_folder.CONFIG, CHECKPOINTS))


def described(place: Path, about: dict[str, Any], encoder: str = "") -> tuple[EncoderConfig, Profile]:
    """Shape and preprocessing of a model.

    ``encoder`` is what the user has named, which may be code that is not ours: a model's own word imports nothing.
    Raises InputError where this version does not know them, and where the weights in ``place`` are those of another
    shape: a shape may be anybody's, and is believed before memory is taken for it.
    """
    name = _encoder_name(place, about, encoder)
    try:
        config: Any = ENCODERS.find(name).Config
        model = config(**{"encoder": name} | _typed(about["model"], config(encoder=name)))
        profile = Profile(**_typed(about["profile"], Profile(1.0, 1.0, "mv")))
        check_token(model, profile)
        _check_shape(model, _shapes(place))
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{place}: does not describe a model of this version ({error})") from error
    return model, profile


def _encoder_name(place: Path, about: dict[str, Any], encoder: str) -> str:
    """Which encoder a model says it has. Raises InputError for code that is not ours, unless the user names it too."""
    model = about.get("model")
    name = model.get("encoder", DEFAULT) if isinstance(model, dict) else DEFAULT
    if encoder and encoder != name:
        raise InputError(f"{place}: its encoder is {str(name)[:80]!r}, not {encoder!r}")
    if is_code(name):
        ENCODERS.find_read(name, place, [encoder])
    return str(name)


def _typed(given: Any, example: EncoderConfig | Profile) -> dict[str, Any]:
    """The fields of a dataclass out of JSON. Raises InputError for one whose type is not that of the example's."""
    if not isinstance(given, dict):
        raise InputError(f"{str(given)[:40]!r} where fields should be")
    fields = {}
    for name, value in given.items():
        kind = type(getattr(example, name, None))
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not kind:
            raise InputError(f"{name} is {str(value)[:40]!r}")
        fields[name] = value
    return fields


def _shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """Of the weights of an export or a checkpoint, by their names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in place.glob("*.safetensors"):
        tensors = open_tensors(path)
        for name in tensors.keys():  # noqa: SIM118, it is no dict
            shapes[name.removeprefix("weight.")] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _check_shape(model: EncoderConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises InputError unless an encoder of this shape has these weights; takes no memory for them."""
    model.refuse_size(len(shapes), sum(map(math.prod, shapes.values())))
    try:
        with torch.device("meta"):
            expected = build_encoder(model).state_dict()
    except RuntimeError as error:  # sizes whose products overflow
        raise InputError("its shape has more weights than any memory") from error
    for name, tensor in expected.items():
        shape = shapes.get(f"encoder.{name}")
        if shape is not None and shape != tensor.shape:
            raise InputError(f"encoder.{name} is {shape}, its shape says {tuple(tensor.shape)}")


def _newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """An export, or of a run the export or a later checkpoint, and its description."""
    path = standing(path)
    if (path / CONFIG).is_file():
        return path, _read_about(path)
    export, saved = standing(path / EXPORT), newest_checkpoint(path)
    if (export / CONFIG).is_file():
        about = _read_about(export)
        own = run_of(path)
        if own and "run" in about and about["run"] != own["run"]:
            raise InputError(f"{export}: is of another run than {path}; put it elsewhere and give it by its own path")
        if saved is None or step_of(saved) <= about.get("step", 0):
            return export, about
    if saved is None:
        raise InputError(f"{path}: neither an export (config.json) nor a run folder with checkpoints")
    checkpoint = Checkpoint.open(saved, verify=False)
    return saved, checkpoint.state["about"] | {"step": checkpoint.step} | run_of(path)


def _read_weights(folder: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """All finite, and as they were written; exports of format 1 do not say what they were."""
    path = folder / WEIGHTS
    if _WEIGHTS_SHA256 in about and path.is_file() and file_sha256(path) != about[_WEIGHTS_SHA256]:
        raise InputError(f"{path}: damaged, its sha256 differs from {CONFIG}; copy it or export the model again")
    tensors = open_tensors(path)
    weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    parts = about.get(_PARTS, _PARTS_BEFORE)
    for name in weights:
        if part_of(name) not in parts:
            known = ", ".join(f"{part}.*" for part in parts)
            raise InputError(f"{path}: left over {name}; an export holds {known} alone")
    _check_numbers(weights, path)
    return weights


def _check_numbers(weights: dict[str, Tensor], path: Path) -> None:
    """Raises InputError for weights that are not finite, or of another type than all that ecgscale writes."""
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise InputError(f"{path}: {name} is {tensor.dtype}; ecgscale writes torch.float32 alone")
    refuse_nonfinite(weights, path)


def _read_about(folder: Path) -> dict[str, Any]:
    """The description of an export, without what it says of the files themselves."""
    path = folder / CONFIG
    about = read_json(path)
    known = about.get("format")
    if known not in (FORMAT, _FORMAT_WITHOUT_CHECKSUMS):
        raise InputError(f"{path}: not the config of an ecgscale export (format {FORMAT!r})")
    if known == FORMAT and not seal_holds(about):
        raise InputError(f"{path}: damaged or edited, its content differs from its own sha256; export the model again")
    about.pop(SEAL, None)
    for name, kind in _TYPES.items():
        if name in about and type(about[name]) is not kind:
            raise InputError(f"{path}: {name} is {str(about[name])[:40]!r}, no {kind.__name__}; export the model again")
    return about
