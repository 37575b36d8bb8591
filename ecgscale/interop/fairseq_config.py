"""The reference's ``cfg`` <-> our shape of a model and its preprocessing. Pure: no file is touched."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from torch import Tensor

from ecgscale.errors import InputError
from ecgscale.export import Profile
from ecgscale.interop.fairseq_layout import Codes, Contents
from ecgscale.lead_names import LEADS, canonical_leads
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import preset_of
from ecgscale.model.stem import BLOCKS

PROFILES = {
    "mv-500hz": Profile(500.0, 5.0, "mv"),
    "zscore-500hz": Profile(500.0, 5.0, "zscore"),
    "mv-250hz": Profile(250.0, 5.0, "mv"),
}
_LONGEST = 64  # convolutional layers of a cfg, so that "* 10**9" makes no list

# Our field, the reference's key, and what the reference takes where the key is missing; the tensors' shapes tell the
# truth of it. None: no shape tells, so that the file must say it.
_SHAPE: tuple[tuple[str, str, Any], ...] = (
    ("width", "encoder_embed_dim", 768),
    ("depth", "encoder_layers", 12),
    ("heads", "encoder_attention_heads", None),
    ("ffn_width", "encoder_ffn_embed_dim", 3072),
    ("position_kernel", "conv_pos", 128),
    ("position_groups", "conv_pos_groups", 16),
    ("pre_norm", "layer_norm_first", None),
    ("stem_bias", "conv_bias", False),
)
_NOT_OURS = ("filter", "mean_path", "std_path")  # ways to prepare signals
_TRAINING: tuple[tuple[str, str, Any], ...] = (  # of no consequence but in training
    ("dropout", "dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("feature_dropout", "dropout_input", 0.0),
    ("stem_gradient_scale", "feature_grad_mult", 1.0),
)
_ONLY: tuple[tuple[str, Any], ...] = (  # what else would be another network
    ("extractor_mode", "default"),
    ("in_d", len(LEADS)),
    ("activation_fn", "gelu"),
    ("quantize_input", False),
    ("same_quantizer", False),
    ("target_glu", False),
)


def contents_of(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> Contents:
    """What a checkpoint holds, by its cfg and the names of its tensors; ``to_ours`` checks the shapes.

    Raises InputError for tensors of another system and for what would be another network than ours.
    """
    stem = "feature_extractor.conv_layers.0.0.weight"
    fine_tuned = f"encoder.{stem}" in tensors
    if not fine_tuned and stem not in tensors:
        shown = ", ".join(list(tensors)[:3])
        raise InputError(
            f"its {len(tensors)} tensors ({shown}, …) are those of another system, not of fairseq-signals' ECG models"
        )
    below = "encoder." if fine_tuned else ""
    given, model = cfg["model"], _model(cfg["model"])
    if model.depth > len(tensors):  # before a list of as many layers is made
        raise InputError(f"cfg.model.encoder_layers {model.depth}: there are but {len(tensors)} tensors")
    return Contents(
        model=model,
        fine_tuned=fine_tuned,
        old_names=f"{below}conv_pos.pos_conv.0.weight_g" in tensors,
        mask_token=f"{below}mask_emb" in tensors,
        codes=_codes(given, tensors),
        classes=_rows(tensors, "proj.weight"),
        persons=_rows(tensors, "kernel"),
    )


def notes_of(cfg: dict[str, Any]) -> list[str]:
    """What of a cfg an import leaves behind, since only the reference's training knows it."""
    given = cfg["model"]
    notes = [
        f"cfg.model.{key} {given[key]} is of the reference's training alone and is left out"
        for key in ("activation_dropout", "encoder_layerdrop")
        if given.get(key)
    ]
    if bucket := _task(cfg).get("leads_bucket"):
        notes.append(f"cfg.task.leads_bucket {bucket!r}: it was trained with some of these leads at a time")
    features, targets = given.get("dropout_input", 0.0), given.get("dropout_features", 0.0)
    if features != targets:
        notes.append(f"one dropout stands for dropout_input {features} and dropout_features {targets}: the former")
    return notes


def _model(given: dict[str, Any]) -> ModelConfig:
    for key, only in _ONLY:
        if given.get(key, only) != only:
            raise InputError(f"cfg.model.{key} {given[key]!r} is another network than ecgscale has ({only!r})")
    fields: dict[str, Any] = {"stem_channels": _stem_channels(given.get("conv_feature_layers", "[(256, 2, 2)] * 4"))}
    for field, key, usual in (*_SHAPE, *_TRAINING):
        value = given.get(key, usual)
        kind = type(getattr(ModelConfig, field))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            fault = "is missing" if value is None else f"{value!r} is no {kind.__name__}"
            raise InputError(f"cfg.model.{key} {fault}, and the shape of the model depends on it")
        fields[field] = value
    try:
        return replace(ModelConfig(**fields), preset=preset_of(ModelConfig(**fields)))
    except InputError as error:
        raise InputError(f"cfg.model: {error}") from error


def _stem_channels(text: Any) -> int:
    """``[(256, 2, 2)] * 4`` -> 256; read as a list, never run."""
    try:
        layers = _list(ast.parse(text, mode="eval").body)
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(
            f"cfg.model.conv_feature_layers {text!r}: no list such as '[(256, 2, 2)] * {BLOCKS}'"
        ) from error
    channels = layers[0][0] if layers else 0
    if layers != [(channels, 2, 2)] * BLOCKS:
        raise InputError(
            f"cfg.model.conv_feature_layers {text!r}: the conv stem of ecgscale has {BLOCKS} equal ones of kernel 2 "
            f"and stride 2, such as '[(256, 2, 2)] * {BLOCKS}'"
        )
    return channels


def _list(node: ast.expr) -> list[tuple[int, ...]]:
    """Lists of tuples of whole numbers, their sums and their multiples."""
    if isinstance(node, ast.List | ast.Tuple):
        values = [ast.literal_eval(item) for item in node.elts]
        if not all(isinstance(layer, tuple | list) and all(type(n) is int for n in layer) for layer in values):
            raise ValueError("not tuples of whole numbers")
        return [tuple(layer) for layer in values]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _list(node.left) + _list(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        one, times = (node.left, node.right) if isinstance(node.right, ast.Constant) else (node.right, node.left)
        if isinstance(times, ast.Constant) and type(times.value) is int and 0 < times.value <= _LONGEST:
            layers = _list(one)
            if len(layers) * times.value <= _LONGEST:
                return layers * times.value
    raise ValueError("not a list")


def _codes(given: dict[str, Any], tensors: dict[str, Tensor]) -> Codes | None:
    heads = ("quantizer.", "project_q.", "final_proj.")
    if not any(name.startswith(heads) for name in tensors):
        return None
    width = given.get("final_dim") or given.get("encoder_embed_dim", 768)
    latent = given.get("latent_dim") or width
    if not given.get("quantize_targets", True) or latent != width:
        key = "latent_dim" if latent != width else "quantize_targets"
        raise InputError(f"cfg.model.{key} {given[key]!r} gives other pretraining heads than ecgscale has")
    codes = Codes(given.get("latent_groups", 2), given.get("latent_vars", 320), width)
    if not all(type(number) is int and number > 0 for number in codes) or width % codes.groups:
        raise InputError(f"cfg.model: latent_groups, latent_vars and final_dim {tuple(codes)} make no quantizer")
    return codes


def _rows(tensors: dict[str, Tensor], name: str) -> int:
    return len(tensors[name]) if name in tensors and tensors[name].ndim else 0


def profile_of(cfg: dict[str, Any], name: str | None) -> tuple[Profile, str]:
    """The preprocessing of a checkpoint and why it is that; ``name`` is one of PROFILES, or None: from the cfg."""
    task, known = _task(cfg), ", ".join(PROFILES)
    normalize, rate_hz = task.get("normalize"), task.get("sample_rate")
    others = [f"cfg.task.{key} {task[key]!r}" for key in _NOT_OURS if task.get(key)]
    if name is not None:
        profile = PROFILES[name]
        if type(normalize) is bool and normalize != (profile.normalisation == "zscore"):
            others.insert(0, f"cfg.task.normalize is {str(normalize).lower()}")
        if isinstance(rate_hz, int | float) and rate_hz != profile.rate_hz:  # the reference reads no other rate
            raise InputError(f"--profile {name}: cfg.task.sample_rate is {rate_hz:g}; give a profile of that rate")
        return profile, f"{name}, as given{', although ' if others else ''}{' and '.join(others)}"
    if type(normalize) is not bool:
        raise InputError(f"cfg.task.normalize does not say how signals were prepared; give --profile, one of {known}")
    if others:
        raise InputError(
            f"{others[0]}: ecgscale does not prepare signals so; do it before, and give --profile, one of {known}"
        )
    kind = "zscore" if normalize else "mv"
    stated = f"cfg.task.normalize is {str(normalize).lower()}"
    if isinstance(rate_hz, int | float) and rate_hz > 0:
        for profile_name, profile in PROFILES.items():
            if (profile.normalisation, profile.rate_hz) == (kind, rate_hz):
                return profile, f"{profile_name}, since {stated} and cfg.task.sample_rate {rate_hz:g}"
        raise InputError(
            f"{stated} and cfg.task.sample_rate {rate_hz:g}, which no profile is; give --profile of {known}"
        )
    name = f"{kind}-500hz"
    return PROFILES[name], f"{name}, since {stated}; the file does not say the rate: give --profile if it is not 500 Hz"


def leads_of(cfg: dict[str, Any]) -> tuple[str, ...]:
    """The leads that the reference read, all others being 0; (): all. Raises InputError for what names none."""
    told = _task(cfg).get("leads_to_load")
    try:
        numbers = ast.literal_eval(told) if isinstance(told, str) else told
        leads = () if numbers is None else tuple(LEADS[number] for number in numbers if number >= 0)
        if numbers is not None and (len(leads) != len(numbers) or not leads):
            raise ValueError("a negative number, or none")
    except (ValueError, TypeError, SyntaxError, IndexError, RecursionError, MemoryError) as error:
        raise InputError(f"cfg.task.leads_to_load {told!r}: no list of numbers of the twelve leads, 0 to 11") from error
    return canonical_leads(sorted(leads, key=LEADS.index))


def _task(cfg: dict[str, Any]) -> dict[str, Any]:
    task = cfg.get("task")
    return task if isinstance(task, dict) else {}


def cfg_for(contents: Contents, profile: Profile) -> dict[str, Any]:
    """A cfg from which the reference builds a model of this shape."""
    model = contents.model
    given: dict[str, Any] = {"_name": _name(contents), "all_gather": False, "args": None}
    given |= {f"{name}": f"${{task.{name}}}" for name in ("normalize", "filter", "data")}
    given |= {key: getattr(model, field) for field, key, _ in (*_SHAPE, *_TRAINING)}
    given |= {"dropout_features": model.feature_dropout, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}
    given |= {"extractor_mode": "default", "in_d": len(LEADS)}
    given |= {"conv_feature_layers": f"[({model.stem_channels}, 2, 2)] * {BLOCKS}", "saliency": False}
    given |= {"mask_prob": 0.65, "mask_length": 10, "mask_selection": "static", "mask_other": 0.0}
    given |= {"no_mask_overlap": False, "mask_min_space": 1, "apply_mask": not contents.fine_tuned}
    given |= {"mask_channel_prob": 0.0, "mask_channel_length": 10, "mask_channel_selection": "static"}
    given |= {"mask_channel_other": 0.0, "no_mask_channel_overlap": False, "mask_channel_min_space": 1}
    if contents.codes is not None:
        groups, codes, width = contents.codes
        given |= {"quantize_targets": True, "quantize_input": False, "same_quantizer": False, "target_glu": False}
        given |= {"latent_vars": codes, "latent_groups": groups, "latent_dim": 0, "final_dim": width}
        given |= {"logit_temp": 0.1, "num_negatives": 100, "negatives_from_everywhere": False}
        given |= {"cross_sample_negatives": 0, "codebook_negatives": 0, "latent_temp": [2.0, 0.5, 0.999995]}
    task = "ecg_pretraining"
    if contents.fine_tuned:
        given |= {"num_labels": contents.persons or contents.classes, "final_dropout": 0.0, "model_path": None}
        given |= {"no_pretrained_weights": True, "freeze_finetune_updates": 0}
        task = "ecg_identification" if contents.persons else "ecg_classification"
    rate_hz = int(profile.rate_hz) if float(profile.rate_hz).is_integer() else profile.rate_hz
    prepared = {"normalize": profile.normalisation == "zscore", "filter": False, "sample_rate": rate_hz, "data": None}
    return {"common": {"seed": 1, "fp16": False}, "model": given, "task": {"_name": task} | prepared}


def _name(contents: Contents) -> str:
    """What the reference calls such a model."""
    if contents.fine_tuned:
        return "arcface" if contents.persons else "ecg_transformer_classifier"
    return "wav2vec2_cmsc" if contents.codes else "ecg_transformer"
