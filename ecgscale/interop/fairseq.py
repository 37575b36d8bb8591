"""Checkpoint files of the reference implementation (fairseq-signals): read into an export, written from a model.

The only place that calls ``torch.load``, and with ``weights_only=True``: code in a file is refused, never run.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecgscale.errors import InputError
from ecgscale.export import Profile, about_model, described, is_export, read_model, write_export
from ecgscale.interop.fairseq_config import PROFILES, cfg_for, contents_of, leads_of, notes_of, profile_of
from ecgscale.interop.fairseq_layout import Codes, Contents, to_ours, to_theirs
from ecgscale.interop.output import write_over
from ecgscale.lead_names import LEADS, chosen_leads
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives.wav2vec2 import CODES
from ecgscale.weights import refuse_nonfinite

SYSTEM = "fairseq-signals"
_MOST_VALUES, _DEEPEST = 100_000, 32  # of a cfg; the reference's has a few hundred, four deep
_MARK = "ecgscale"  # key of extra_state in files that we write: what a cfg does not say
_DTYPES = {f"{dtype}".removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def import_checkpoint(path: Path, out: Path, profile_name: str | None = None, classes: tuple[str, ...] = ()) -> str:
    """A checkpoint as an export in ``out``; returns what to print.

    ``classes`` name the rows of a classification head. What ecgscale wrote into a file, its classes and its profile,
    may be given again but not otherwise. Raises InputError for that, and for anything that is not accounted for.
    """
    if profile_name is not None and profile_name not in PROFILES:
        raise InputError(f"--profile {profile_name!r} is unknown; known are {', '.join(PROFILES)}")
    if out.exists() and not is_export(out):
        raise InputError(f"{out}: exists and is no export; give a new folder")
    state = read_checkpoint(path)
    try:
        cfg, tensors = _cfg_of(state), _tensors_of(state, path.stat().st_size)
        contents = contents_of(cfg, tensors)
        weights = to_ours(tensors, contents)
        ours = _our_mark(state)
        profile, why = _own_profile(ours, profile_name) if ours else profile_of(cfg, profile_name)
        about = about_model(contents.model, profile, step=_updates(state), source=_source(path, cfg, tensors, contents))
        about |= _about_classes(contents, classes, _classes_of(ours))
        about["leads"] = list(chosen_leads(ours["leads"]) if "leads" in ours else leads_of(cfg))
        if contents.codes is not None:
            about["codes"] = dict(zip(CODES, contents.codes, strict=True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    write_export(out, weights, about)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    lines = [f"{path}: {_kind(contents)}, {parameters:,} parameters in {len(tensors)} tensors, all accounted for"]
    notes = notes_of(cfg)
    if not contents.mask_token:
        notes = [*notes, f"no mask token is in it; the export has one beside, of {contents.model.width} parameters"]
    if about["leads"]:
        notes = [*notes, f"trained with leads {','.join(about['leads'])} alone; it is used with these"]
    lines += [f"profile: {why}", *(f"note: {note}" for note in notes), f"export: {out}"]
    return "\n".join(lines)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict of a checkpoint file; raises InputError for code in it, and for damaged and other files."""
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder; give a .pt file' if path.is_dir() else 'no such file'}")
    is_zip = zipfile.is_zipfile(path)
    if is_zip and (entry := _damaged_entry(path)):
        raise InputError(f"{path}: damaged, its entry {entry} misses its checksum; fetch or save it again")
    try:
        # Mapped where it can be: the optimizer's state, twice the weights, is never touched.
        with warnings.catch_warnings(action="ignore"):  # of plain pickles, which are refused
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever bytes may be in a file, torch has an error for
        raise InputError(f"{path}: {_unreadable(str(error))}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        keys = (
            f"has {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else f"is {type(state).__name__}"
        )
        raise InputError(f"{path}: {keys}, while a checkpoint of {SYSTEM} is a dict with cfg and model")
    return state


def _damaged_entry(path: Path) -> str | None:
    """The first entry of a zip whose bytes miss their CRC-32, which PyTorch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                return "list"  # PyTorch compresses nothing: sizes that do not fit are no work of its own
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError):
        return "list"


def _unreadable(message: str) -> str:
    """Why a file could not be read, in a few words of our own."""
    named = re.search(r"(?:GLOBAL|unrecognized function) ([\w.]+)", message)
    if named and named[1] == "argparse.Namespace":
        return "holds its settings as argparse.Namespace (an old `args`), which is not loaded; save it with a plain cfg"
    if named:
        return f"holds code ({named[1]}), which is not run; save it with weights and a plain cfg alone"
    return "damaged or no checkpoint of PyTorch"


def _cfg_of(state: dict[str, Any]) -> dict[str, Any]:
    cfg, args = state.get("cfg"), state.get("args")
    if cfg is None and isinstance(args, dict):  # of old, one flat group
        cfg = {"model": args, "task": args}
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model"), dict):
        raise InputError("has no cfg.model, which says the shape of the model; save it with a plain cfg")
    plain: dict[str, Any] = _plain(cfg)
    return plain


def _plain(cfg: Any) -> Any:
    """A cfg as JSON has it, NaN as a word. Raises InputError for one without end: a pickle's list may hold itself."""
    left = _MOST_VALUES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise InputError(f"cfg has more than {_MOST_VALUES} values, or more than {_DEEPEST} in one another")
        if isinstance(value, dict):
            return {key: copied(one, depth + 1) for key, one in value.items() if isinstance(key, str)}
        if isinstance(value, list | tuple):
            return [copied(one, depth + 1) for one in value]
        if isinstance(value, int) and abs(value) >= 1 << 63:
            return "a number of more than 64 bits"
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if value is None or isinstance(value, bool | int | float | str) else str(value)

    return copied(cfg, 0)


def _tensors_of(state: dict[str, Any], file_bytes: int) -> dict[str, Tensor]:
    """Raises InputError before memory is taken for more than the file holds: a stride of 0 makes much of nothing."""
    tensors: dict[str, Tensor] = dict(state["model"])
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise InputError(f"model.{name} is no plain tensor but {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES.values():
            raise InputError(f"model.{name} is {tensor.dtype}; an export keeps {', '.join(_DTYPES)} without loss")
        total += tensor.nbytes
        if tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes() or total > 2 * file_bytes:
            raise InputError(
                f"model.{name} has {tensor.numel()} elements, more than the file holds; save it contiguous"
            )
    refuse_nonfinite(tensors, "model")
    return tensors


def _updates(state: dict[str, Any]) -> int:
    history = state.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates", 0) if isinstance(last, dict) else 0
    return updates if type(updates) is int and 0 <= updates < 1 << 53 else 0


def _our_mark(state: dict[str, Any]) -> dict[str, Any]:
    """What ecgscale wrote beside the weights; empty for files of others."""
    extra = state.get("extra_state")
    mark = extra.get(_MARK) if isinstance(extra, dict) else None
    return mark if isinstance(mark, dict) else {}


def _classes_of(mark: dict[str, Any]) -> tuple[str, ...]:
    names = mark.get("classes")
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _own_profile(mark: dict[str, Any], given: str | None) -> tuple[Profile, str]:
    """Raises InputError where ``given``, one of PROFILES, is another; it stands for one that cannot be read."""
    try:
        profile = Profile(**mark["profile"] | {"leads": tuple(mark["profile"]["leads"])})
    except (KeyError, TypeError, InputError) as error:
        if given is not None:
            return PROFILES[given], f"{given}, as given, since the one in the file is not of this version"
        raise InputError(f"extra_state.{_MARK}: no profile of this version ({error}); give --profile") from error
    if given is not None and profile != PROFILES[given]:
        own = f"{profile.normalisation}, {profile.rate_hz:g} Hz, {profile.segment_s:g} s"
        raise InputError(f"--profile {given}: the file itself says {own}; leave --profile out")
    return profile, "the one that ecgscale wrote into the file"


def _source(path: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], contents: Contents) -> dict[str, Any]:
    """What the way back needs beside the weights."""
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    return {
        "system": SYSTEM,
        "file": path.name,
        "cfg": cfg,
        "fine_tuned": contents.fine_tuned,
        "old_names": contents.old_names,
        "dtype": usual,
        "other_dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != usual},
        "absent": [] if contents.mask_token else ["encoder.mask.token"],
    }


def _about_classes(contents: Contents, given: tuple[str, ...], own: tuple[str, ...]) -> dict[str, Any]:
    """Of the names ``given`` and those in the file. Raises InputError where they differ or do not fit its head."""
    if given and own and given != own:
        raise InputError(f"--classes {','.join(given)}: the file itself says {','.join(own)}; leave --classes out")
    classes = given or own
    if not classes:
        return {}
    if len(classes) != contents.classes:
        has = f"{contents.classes} classes" if contents.classes else "no classification head"
        raise InputError(f"--classes names {len(classes)}, but the checkpoint has {has}")
    if len(set(classes)) < len(classes):
        raise InputError(f"--classes names one twice: {', '.join(classes)}")
    return {"classes": list(classes), "challenge_weights": None}


def _kind(contents: Contents) -> str:
    if not contents.fine_tuned:
        return "pretrained with its heads" if contents.codes else "pretrained, without heads"
    heads = [f"{contents.classes} classes"] * bool(contents.classes)
    heads += [f"{contents.persons} persons (ArcFace)"] * bool(contents.persons)
    return f"fine-tuned on {' and '.join(heads)}" if heads else "fine-tuned, without a head"


# -- the way back ----------------------------------------------------------------------------------------------------


def export_checkpoint(run: Path, out: Path) -> str:
    """A run's newest state, or an export, as a checkpoint file of the reference; returns what to print."""
    place, weights, about = read_model(run)
    model, profile = described(place, about)
    source = about.get("source") or {}
    if not isinstance(model, ModelConfig):
        raise InputError(f"{place}: model.encoder {model.encoder}: the reference knows the transformer alone")
    if model.stem != "conv":
        raise InputError(f"{place}: model.stem {model.stem}: the reference knows the conv stem alone")
    try:
        contents = _contents(weights, model, source)
        tensors = to_theirs(weights, contents)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    others = source.get("other_dtypes", {})
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(_DTYPES[others.get(name, source.get("dtype", "float32"))])
    cfg = source.get("cfg") or cfg_for(contents, profile)
    step = int(about.get("step", 0))
    state = {
        "args": None,
        "cfg": cfg,
        "model": tensors,
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "", "lr_scheduler_state": {}, "num_updates": step}],
        "task_state": {},
        "extra_state": {
            "epoch": 1,
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 0},
            _MARK: json.loads(json.dumps(_to_mark(profile, about))),
        },
        "last_optimizer_state": None,
    }
    write_over(out, ".pt", _is_ours, lambda path: _save(state, path))
    line = f"export: {out}, {_kind(contents)}, {len(tensors)} tensors"
    leads = chosen_leads(about.get("leads", []))
    return (
        line if leads in ((), LEADS) else f"{line}\nnote: trained with leads {','.join(leads)} alone; mask all others"
    )


def _to_mark(profile: Profile, about: dict[str, Any]) -> dict[str, Any]:
    """What a cfg does not say."""
    return {"profile": asdict(profile), "classes": about.get("classes"), "leads": about.get("leads", [])}


def _save(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, which hides behind an error of its own what the system said; raises OSError."""
    try:
        with path.open("xb") as file:  # given a path, it would not even hide it
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _is_ours(path: Path) -> bool:
    try:
        return bool(_our_mark(read_checkpoint(path)))
    except InputError:
        return False


def _contents(weights: dict[str, Tensor], model: ModelConfig, source: dict[str, Any]) -> Contents:
    """What a checkpoint of these weights holds, in the way of the file that they came from, if they did."""
    classes, persons = (len(weights[name]) if name in weights else 0 for name in ("head.weight", "arcface.weight"))
    fine_tuned = source.get("fine_tuned", bool(classes or persons))
    return Contents(
        model=model,
        fine_tuned=fine_tuned,
        old_names=source.get("old_names", False),
        mask_token="encoder.mask.token" not in source["absent"] if source else not fine_tuned,
        codes=_codes(weights, fine_tuned),
        classes=classes,
        persons=persons,
    )


def _codes(weights: dict[str, Tensor], fine_tuned: bool) -> Codes | None:
    book, projection = "local_head.quantizer.codebook", "local_head.target_projection.bias"
    if fine_tuned or book not in weights or projection not in weights:
        return None
    width = math.prod(weights[projection].shape)
    groups = max(1, width // weights[book].shape[-1])
    return Codes(groups, len(weights[book]) // groups, width)
