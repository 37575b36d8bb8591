"""How the reference implementation (fairseq-signals) names and shapes what we have. Pure: no file is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.stem import BLOCKS

_SHOWN = 5  # names of an error message


class Codes(NamedTuple):
    """Size of the local objective's head."""

    groups: int
    codes: int  # of a group
    width: int  # of the quantised targets and of the predictions


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of the reference holds."""

    model: ModelConfig
    fine_tuned: bool = False
    """Everything of the encoder stands below ``encoder.``."""
    old_names: bool = False
    """The positional convolution has ``weight_g`` and ``weight_v``, as before PyTorch's parametrizations."""
    mask_token: bool = True
    codes: Codes | None = None
    """Heads of pretraining."""
    classes: int = 0
    """Rows of a classification head; 0: none."""
    persons: int = 0
    """Rows of ArcFace's kernel; 0: none."""

    @property
    def has_projection(self) -> bool:
        """The reference projects the stem's features only where their width differs from the transformer's."""
        return self.model.stem_channels != self.model.width


class Place(NamedTuple):
    """Where one tensor of ours stands in the reference: in one tensor, or in several that are its equal parts."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    their_shape: tuple[int, ...]  # of each part


def layout(contents: Contents) -> list[Place]:
    """Every tensor of a checkpoint."""
    model, places = contents.model, []
    below = "encoder." if contents.fine_tuned else ""

    def add(ours: str, shape: tuple[int, ...], *theirs: str, their_shape: tuple[int, ...] | None = None) -> None:
        places.append(Place(ours, shape, tuple(below + name for name in theirs), their_shape or shape))

    def linear(ours: str, theirs: str, inputs: int, outputs: int) -> None:
        add(f"{ours}.weight", (outputs, inputs), f"{theirs}.weight")
        add(f"{ours}.bias", (outputs,), f"{theirs}.bias")

    def norm(ours: str, theirs: str, width: int) -> None:
        add(f"{ours}.weight", (width,), f"{theirs}.weight")
        add(f"{ours}.bias", (width,), f"{theirs}.bias")

    channels, width = model.stem_channels, model.width
    if contents.mask_token:
        add("encoder.mask.token", (width,), "mask_emb")
    for block in range(BLOCKS):
        convolution, inputs = f"feature_extractor.conv_layers.{block}.0", len(LEADS) if block == 0 else channels
        add(f"encoder.stem.weight_{block}", (channels, inputs, 2), f"{convolution}.weight")
        if model.stem_bias:
            add(f"encoder.stem.bias_{block}", (channels,), f"{convolution}.bias")
    for kind in ("weight", "bias"):
        add(f"encoder.stem.norm_{kind}", (channels,), f"feature_extractor.conv_layers.0.2.{kind}")
    norm("encoder.feature_norm", "layer_norm", channels)
    if contents.has_projection:
        linear("encoder.feature_projection", "post_extract_proj", channels, width)
    kernel, position = model.position_kernel, "conv_pos.pos_conv.0"
    g, v = ("weight_g", "weight_v") if contents.old_names else (f"parametrizations.weight.original{i}" for i in (0, 1))
    add("encoder.position.g", (kernel,), f"{position}.{g}", their_shape=(1, 1, kernel))
    add("encoder.position.v", (width, width // model.position_groups, kernel), f"{position}.{v}")
    add("encoder.position.bias", (width,), f"{position}.bias")
    norm("encoder.norm", "encoder.layer_norm", width)
    for i in range(model.depth):
        ours, theirs = f"encoder.layers.{i}", f"encoder.layers.{i}"
        parts = [f"{theirs}.self_attn.{part}_proj" for part in ("q", "k", "v")]
        for kind, rest in (("weight", (width,)), ("bias", ())):
            names = [f"{part}.{kind}" for part in parts]
            add(f"{ours}.query_key_value.{kind}", (3 * width, *rest), *names, their_shape=(width, *rest))
        linear(f"{ours}.attention_out", f"{theirs}.self_attn.out_proj", width, width)
        norm(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm", width)
        linear(f"{ours}.ffn_in", f"{theirs}.fc1", width, model.ffn_width)
        linear(f"{ours}.ffn_out", f"{theirs}.fc2", model.ffn_width, width)
        norm(f"{ours}.ffn_norm", f"{theirs}.final_layer_norm", width)
    if contents.codes is not None:
        groups, codes, code_width = contents.codes
        book = (groups * codes, code_width // groups)
        add("local_head.quantizer.codebook", book, "quantizer.vars", their_shape=(1, *book))
        linear("local_head.quantizer.logits", "quantizer.weight_proj", channels, groups * codes)
        linear("local_head.target_projection", "project_q", code_width, code_width)
        linear("local_head.prediction_projection", "final_proj", width, code_width)
    below = ""  # heads of fine-tuning stand beside the encoder
    if contents.classes:
        linear("head", "proj", width, contents.classes)
    if contents.persons:
        add("arcface.weight", (contents.persons, width), "kernel")
    return places


def to_ours(tensors: dict[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names, float32; raises InputError that lists all that do not fit."""
    places = layout(contents)
    expected = {name: place.their_shape for place in places for name in place.theirs}
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"left over {name}" for name in tensors if name not in expected]
    wrong += [
        f"shape of {name} {tuple(tensors[name].shape)} where cfg.model gives {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(f"tensors do not fit cfg.model: {', '.join(wrong[:_SHOWN])}{more}")
    ours = {p.ours: torch.cat([tensors[name] for name in p.theirs]).float().reshape(p.shape) for p in places}
    if not contents.has_projection:  # there it is left out
        ours["encoder.feature_projection.weight"] = torch.eye(contents.model.width)
        ours["encoder.feature_projection.bias"] = torch.zeros(contents.model.width)
    if not contents.mask_token:  # a new one, as an encoder begins with
        noise = torch.Generator().manual_seed(0)
        ours["encoder.mask.token"] = torch.empty(contents.model.width).uniform_(generator=noise)
    return ours


def to_theirs(weights: dict[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    """The way back. Raises InputError for weights that have no place in the reference, and where some are missing."""
    places = layout(contents)
    wrong = [f"missing {p.ours}" for p in places if p.ours not in weights]
    wrong += [f"shape of {p.ours}" for p in places if p.ours in weights and weights[p.ours].shape != p.shape]
    if wrong:
        raise InputError(f"weights do not fit the model: {', '.join(wrong[:_SHOWN])}")
    given = {place.ours for place in places} | {"encoder.mask.token"}
    if not contents.has_projection:
        projection = [f"encoder.feature_projection.{kind}" for kind in ("weight", "bias")]
        given |= set(projection)
        matrix, bias = (weights[name] for name in projection)
        if not torch.equal(matrix, torch.eye(contents.model.width)) or bias.any():
            raise InputError(
                f"the reference projects no features where the stem's channels are the width "
                f"({contents.model.width}), but this model does"
            )
    if extra := sorted(weights.keys() - given):
        raise InputError(f"the reference has no place for {', '.join(extra[:_SHOWN])}")
    theirs: dict[str, Tensor] = {}
    for place in places:
        parts = weights[place.ours].reshape(len(place.theirs), *place.their_shape)
        theirs |= {name: part.clone() for name, part in zip(place.theirs, parts, strict=True)}
    return theirs
