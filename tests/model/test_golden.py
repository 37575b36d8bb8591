"""The model, its losses and all gradients agree with the public reference implementation."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.interop.fairseq_layout import Codes, Contents, to_ours
from ecgscale.model.base import mean_over_time
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.objectives import build_objective, objective_config
from ecgscale.objectives.masking import TimeMask
from ecgscale.objectives.objective import Draws
from ecgscale_kernels import info_nce_logits


def model_config(config: dict) -> ModelConfig:
    return ModelConfig(
        stem_channels=32,
        width=config["encoder_embed_dim"],
        depth=config["encoder_layers"],
        heads=config["encoder_attention_heads"],
        ffn_width=config["encoder_ffn_embed_dim"],
        position_kernel=config["conv_pos"],
        position_groups=config["conv_pos_groups"],
        pre_norm=config.get("layer_norm_first", False),
        stem_bias=config.get("conv_bias", False),
        stem_gradient_scale=config["feature_grad_mult"],
    )


def contents(objective) -> Contents:
    config = objective.config
    return Contents(objective.encoder.config, codes=Codes(config.code_groups, config.codes, config.code_width))


def batch_of(signal_BLT: Tensor, **rows: Tensor) -> ECGBatch:
    n = len(signal_BLT)
    zeros = torch.zeros(n, dtype=torch.long)
    length_B = rows.pop("length_B", torch.full((n,), signal_BLT.shape[-1]))
    fields = {"patient_B": zeros, "segment_B": zeros, "position_B": torch.arange(n)} | rows
    fields |= {"record_B": zeros}
    return ECGBatch(
        signal_BLT,
        torch.ones(n, 12),
        torch.zeros(n, 12),
        length_B,
        padded=bool((length_B < signal_BLT.shape[-1]).any()),
        **fields,
    )


@pytest.fixture(scope="session", params=["pretrain_default", "pretrain_prenorm"])
def golden(request, shared_reference):
    tensors = load_file(shared_reference / f"{request.param}.safetensors")
    about = json.loads((shared_reference / f"{request.param}.json").read_text())
    config = about["config"]
    chosen = objective_config(
        code_groups=config["latent_groups"], codes=config["latent_vars"], code_width=config["final_dim"]
    )
    objective = build_objective(model_config(config), chosen, seed=0, rate_hz=500).eval()
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    objective.load_state_dict(to_ours(weights, contents(objective)))
    batch = batch_of(tensors["input.signal"], patient_B=tensors["input.patient_id"], segment_B=tensors["input.segment"])
    return objective, batch, tensors, about["scalars"]


def draws_of(tensors: dict[str, Tensor]) -> Draws:
    masked_BN = tensors["input.mask_indices"]
    rows, places = masked_BN.shape[0], int(masked_BN[0].sum())
    place_BM = masked_BN.nonzero()[:, 1].view(rows, places)
    first_B11 = (torch.arange(rows) * places)[:, None, None]
    negative_BMK = tensors["input.negative_idx"].view(rows, places, -1) - first_B11
    mask = TimeMask(masked_BN, place_BM, torch.full((rows,), places))
    return Draws(None, mask, negative_BMK, None)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_outputs(golden) -> None:
    objective, batch, tensors, _ = golden
    encoder = objective.encoder
    with torch.no_grad():
        features = encoder.features(batch)
        close(features.stem_BNC.transpose(1, 2), tensors["out.conv_features"])
        close(encoder.contextualise(features.token_BND, None), tensors["out.encoder_unmasked"])
        masked_BND = encoder.contextualise(features.token_BND, None, tensors["input.mask_indices"])
        close(masked_BND, tensors["out.encoder_masked"])
        close(mean_over_time(masked_BND, None), tensors["out.record_embedding"])


def test_logits(golden) -> None:
    objective, batch, tensors, _ = golden
    draws = draws_of(tensors)
    head, place_BM1 = objective.local_head, draws.time_mask.place_BM[..., None]
    with torch.no_grad():
        features = objective.encoder.features(batch)
        context_BND = objective.encoder.contextualise(features.token_BND, None, draws.time_mask.masked_BN)
        quantized = head.quantizer(features.normed_BNC.gather(1, place_BM1.expand(-1, -1, 32)), 1.0, None)
        prediction = head.prediction_projection(context_BND.gather(1, place_BM1.expand(-1, -1, context_BND.shape[-1])))
        logits = info_nce_logits(
            prediction,
            head.target_projection(quantized.code_BMQ),
            quantized.index_BMG,
            draws.negative_BMK,
            0.1,
        )
    close(logits.permute(2, 0, 1), tensors["out.logits"])


def test_losses(golden) -> None:
    objective, batch, tensors, scalars = golden
    with torch.no_grad():
        loss, parts = objective.losses(batch, draws_of(tensors), step=0, share=False)
    size = scalars["sample_size"]
    expected = {
        "local": scalars["loss_local_sum"] / size,
        "diversity": scalars["diversity_penalty"],
        "feature_penalty": scalars["feature_penalty"],
        "cmsc": scalars["loss_cmsc"],
        "soft_perplexity": scalars["prob_perplexity"],
        "code_perplexity": scalars["code_perplexity"],
    }
    assert {name: parts[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(scalars["loss_total_sum"] / size, rel=1e-4)


def test_every_gradient(golden) -> None:
    objective, batch, tensors, scalars = golden
    objective.zero_grad()
    loss, _ = objective.losses(batch, draws_of(tensors), step=0, share=False)
    (loss * scalars["sample_size"]).backward()
    theirs = {name.removeprefix("grad."): t for name, t in tensors.items() if name.startswith("grad.")}
    theirs = to_ours(theirs, contents(objective))
    ours = {name: p.grad for name, p in objective.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(grad.norm() for grad in theirs.values())
    wrong = {
        name: float((ours[name] - grad).norm() / grad.norm())
        for name, grad in theirs.items()
        if (ours[name] - grad).norm() > 1e-4 * grad.norm() + 1e-6 * largest
    }
    assert not wrong


def test_classifier_with_and_without_padding(shared_reference) -> None:
    tensors = load_file(shared_reference / "classifier.safetensors")
    about = json.loads((shared_reference / "classifier.json").read_text())
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    encoder = ECGEncoder(model_config(about["config"])).eval()
    ours = to_ours(weights, Contents(encoder.config, fine_tuned=True, mask_token=False, classes=about["num_labels"]))
    head = ours.pop("head.weight"), ours.pop("head.bias")
    encoder.load_state_dict({name.removeprefix("encoder."): t for name, t in ours.items()})
    signal_BLT = tensors["input.signal"]
    padded_length_B = (~tensors["input.padding_mask"][:, 0]).sum(dim=1)
    for length_B, expected in ((None, "out.logits"), (padded_length_B, "out.logits_padded")):
        rows = {} if length_B is None else {"length_B": length_B}
        with torch.no_grad():
            embedding_BD = mean_over_time(*encoder(batch_of(signal_BLT, **rows)))
        close(torch.nn.functional.linear(embedding_BD, *head), tensors[expected])
