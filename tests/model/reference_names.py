"""How the reference implementation names what we have, for the golden tests."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_RULES = (
    (r"^mask_emb$", "encoder.mask.token"),
    (r"^feature_extractor\.conv_layers\.0\.2\.(weight|bias)$", r"encoder.stem.norm_\1"),
    (r"^feature_extractor\.conv_layers\.(\d)\.0\.(weight|bias)$", r"encoder.stem.\2_\1"),
    (r"^layer_norm\.", "encoder.feature_norm."),
    (r"^post_extract_proj\.", "encoder.feature_projection."),
    (r"^conv_pos\.pos_conv\.0\.bias$", "encoder.position.bias"),
    (r"^conv_pos\.pos_conv\.0\.parametrizations\.weight\.original0$", "encoder.position.g"),
    (r"^conv_pos\.pos_conv\.0\.parametrizations\.weight\.original1$", "encoder.position.v"),
    (r"^encoder\.layer_norm\.", "encoder.norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"encoder.layers.\1.attention_out."),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layers.\1.attention_norm."),
    (r"^encoder\.layers\.(\d+)\.fc1\.", r"encoder.layers.\1.ffn_in."),
    (r"^encoder\.layers\.(\d+)\.fc2\.", r"encoder.layers.\1.ffn_out."),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"encoder.layers.\1.ffn_norm."),
    (r"^quantizer\.vars$", "local_head.quantizer.codebook"),
    (r"^quantizer\.weight_proj\.", "local_head.quantizer.logits."),
    (r"^project_q\.", "local_head.target_projection."),
    (r"^final_proj\.", "local_head.prediction_projection."),
)


def to_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reference names and shapes -> ours; query, key and value become one tensor."""
    ours = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            layer, kind = match.groups()
            parts = [tensors[f"encoder.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            ours[f"encoder.layers.{layer}.query_key_value.{kind}"] = torch.cat(parts)
            continue
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        for pattern, replacement in _RULES:
            if re.search(pattern, name):
                ours[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            raise AssertionError(f"no name of ours for {name}")
    if "encoder.position.g" in ours:
        ours["encoder.position.g"] = ours["encoder.position.g"].flatten()
    if "local_head.quantizer.codebook" in ours:
        ours["local_head.quantizer.codebook"] = ours["local_head.quantizer.codebook"].squeeze(0)
    return ours
