"""The method as one would write it first, in plain PyTorch: the baseline of `ecgscale bench step`.

Float millivolts through Conv1d modules, masked leads by multiplication, attention with all its weights, negatives as
one explicit tensor, torch's own random numbers. Modules and tensors are named as in the reference implementation. Given
the same weights and the same draws, losses and gradients equal those of ecgscale's objective (Oh et al. 2022).

Shape suffixes: B rows, L leads, T samples, N tokens, C stem channels, D width, H heads, M masked places, K negatives,
G code groups, V codes of a group, Q code width, P pairs of segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ecgscale.data.batch import ECGBatch
from ecgscale.interop.fairseq_layout import Codes, Contents, to_theirs
from ecgscale.lead_names import LEADS
from ecgscale.model.base import EncoderConfig
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.stem import BLOCKS
from ecgscale.objectives import ObjectiveConfig
from ecgscale.objectives.objective import Draws
from ecgscale.objectives.wav2vec2_cmsc import Wav2Vec2CMSC


class PlainDraws(NamedTuple):
    """What is random about a step, but dropout."""

    keep_BL: Tensor  # 1.0 for a lead that is kept
    place_BM: Tensor  # token numbers of the masked places
    negative_BMK: Tensor  # numbers of other masked places of the same row
    gumbel_BMGV: Tensor


def can_be_written(model: EncoderConfig, objective: ObjectiveConfig) -> bool:
    """Whether this is the method of the paper, the only one that is written here."""
    if not (isinstance(model, ModelConfig) and isinstance(objective, Wav2Vec2CMSC.Config)):
        return False
    plain = objective.time_mask_rule == "fixed" and objective.global_form == "reference"
    noise = objective.augmentations and objective.augmentations != ["none"]
    return model.stem == "conv" and plain and not noise


class Straightforward(nn.Module):
    """Encoder, heads and loss of wav2vec 2.0 + CMSC with random lead masking."""

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        assert isinstance(objective, Wav2Vec2CMSC.Config)
        self.model, self.objective = model, objective
        self.mask_emb = nn.Parameter(torch.empty(model.width).uniform_())
        self.feature_extractor = FeatureExtractor(model.stem_channels, model.stem_bias)
        self.layer_norm = nn.LayerNorm(model.stem_channels)
        self.post_extract_proj = nn.Linear(model.stem_channels, model.width)
        self.conv_pos = PositionalConvolution(model)
        self.encoder = Transformer(model)
        self.quantizer = Quantizer(model.stem_channels, objective)
        self.project_q = nn.Linear(objective.code_width, objective.code_width)
        self.final_proj = nn.Linear(model.width, objective.code_width)

    def forward(self, batch: ECGBatch, step: int = 0) -> Tensor:
        """The loss of a batch, for draws of torch's own generator."""
        return self.loss(batch, self.draw(batch), step)

    def loss(self, batch: ECGBatch, draws: PlainDraws, step: int) -> Tensor:
        """The loss of a batch without padding."""
        model, config = self.model, self.objective
        mv_BLT = batch.gain_BL[..., None] * (batch.signal_BLT.float() - batch.offset_BL[..., None])
        stem_BNC = self.feature_extractor(mv_BLT * draws.keep_BL[..., None]).transpose(1, 2)
        scale = model.stem_gradient_scale
        stem_BNC = scale * stem_BNC + (1 - scale) * stem_BNC.detach()
        feature_penalty = stem_BNC.float().square().mean()
        normed_BNC = self.layer_norm(stem_BNC)
        token_BND = F.dropout(self.post_extract_proj(normed_BNC), model.feature_dropout, self.training)
        target_BNC = F.dropout(normed_BNC, model.feature_dropout, self.training)
        masked_BN = torch.zeros(token_BND.shape[:2], dtype=torch.bool, device=token_BND.device)
        masked_BN = masked_BN.scatter(1, draws.place_BM, True)
        token_BND = torch.where(masked_BN[..., None], self.mask_emb.to(token_BND.dtype), token_BND)
        context_BND = self.encoder(token_BND + self.conv_pos(token_BND))

        temperature = max(config.gumbel_end, config.gumbel_start * config.gumbel_factor**step)
        code_BMQ, probability_BMGV = self.quantizer(_at(target_BNC, draws.place_BM), draws.gumbel_BMGV, temperature)
        prediction_BMQ = self.final_proj(_at(context_BND, draws.place_BM))
        local = info_nce(prediction_BMQ, self.project_q(code_BMQ), draws.negative_BMK, config.local_temperature)
        mean_GV = probability_BMGV.mean(dim=(0, 1))
        perplexity = (-(mean_GV * (mean_GV + 1e-7).log()).sum(dim=-1)).exp().sum()
        diversity = (mean_GV.numel() - perplexity) / mean_GV.numel()
        glob = cmsc(context_BND.float().mean(dim=1), batch.patient_B, batch.segment_B, config.global_temperature)
        loss: Tensor = local + config.diversity_weight * diversity + config.feature_weight * feature_penalty + glob
        return loss

    def draw(self, batch: ECGBatch) -> PlainDraws:
        """Lead masks, spans, negatives and noise of a step."""
        config, device = self.objective, batch.signal_BLT.device
        rows, tokens = batch.rows, batch.signal_BLT.shape[-1] // self.model.patch_samples
        keep_BL = (torch.rand(rows, len(LEADS), device=device) >= config.lead_mask_probability).float()
        place_BM = torch.stack([self._draw_places(tokens) for _ in range(rows)]).to(device)
        places = place_BM.shape[1]
        negative_BMK = torch.randint(places - 1, (rows, places, config.negatives), device=device)
        negative_BMK += negative_BMK >= torch.arange(places, device=device)[:, None]
        gumbel_BMGV = -torch.empty(rows, places, config.code_groups, config.codes, device=device).exponential_().log()
        return PlainDraws(keep_BL, place_BM, negative_BMK, gumbel_BMGV)

    def _draw_places(self, tokens: int) -> Tensor:
        """(M,) places of one row: spans until enough tokens are covered, then random ones of them."""
        span, covered = self.objective.time_mask_span, torch.zeros(tokens, dtype=torch.bool)
        masked = max(1, round(self.objective.time_mask_share * tokens))
        for start in torch.randperm(max(1, tokens - span + 1)).tolist():
            covered[start : start + span] = True
            if covered.sum() >= masked:
                break
        place_M = covered.nonzero()[:, 0]
        return place_M[torch.randperm(len(place_M))[:masked]]


class FeatureExtractor(nn.Module):
    """Four strided convolutions; the first with a norm over time."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        first = [nn.Conv1d(len(LEADS), channels, 2, 2, bias=bias), nn.Identity()]
        blocks = [nn.Sequential(*first, nn.GroupNorm(channels, channels), nn.GELU())]
        for _ in range(1, BLOCKS):
            blocks.append(nn.Sequential(nn.Conv1d(channels, channels, 2, 2, bias=bias), nn.Identity(), nn.GELU()))
        self.conv_layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, T) -> (B, C, N)."""
        for block in self.conv_layers:
            x = block(x)
        return x


class PositionalConvolution(nn.Module):
    """Grouped convolution over tokens with weight norm over the kernel axis."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, kernel = model.width, model.position_kernel
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=model.position_groups)
        self.pos_conv = nn.Sequential(weight_norm(convolution, dim=2), nn.GELU())

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        y_BDN: Tensor = self.pos_conv[0](x_BND.transpose(1, 2))[..., : x_BND.shape[1]]
        return F.gelu(y_BDN).transpose(1, 2)


class Transformer(nn.Module):
    """Norm, dropout and layers."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.layer_norm = nn.LayerNorm(model.width)
        self.layers = nn.ModuleList(TransformerLayer(model) for _ in range(model.depth))

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if not self.model.pre_norm:
            x_BND = self.layer_norm(x_BND)
        x_BND = F.dropout(x_BND, self.model.dropout, self.training)
        for layer in self.layers:
            x_BND = layer(x_BND)
        return self.layer_norm(x_BND) if self.model.pre_norm else x_BND


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual and a norm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.dropout, self.pre_norm = model.dropout, model.pre_norm
        self.self_attn = SelfAttention(model.width, model.heads, model.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(model.width)
        self.fc1 = nn.Linear(model.width, model.ffn_width)
        self.fc2 = nn.Linear(model.ffn_width, model.width)
        self.final_layer_norm = nn.LayerNorm(model.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if self.pre_norm:
            x = x + self._dropped(self.self_attn(self.self_attn_layer_norm(x)))
            return x + self._dropped(self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))
        x = self.self_attn_layer_norm(x + self._dropped(self.self_attn(x)))
        out: Tensor = self.final_layer_norm(x + self._dropped(self.fc2(F.gelu(self.fc1(x)))))
        return out

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class SelfAttention(nn.Module):
    """Attention whose weights stand in memory."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        rows, tokens, width = x_BND.shape
        head = (rows, tokens, self.heads, width // self.heads)
        q_BHNd, k_BHNd, v_BHNd = (
            project(x_BND).view(head).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weight_BHNN = (q_BHNd * head[3] ** -0.5 @ k_BHNd.transpose(2, 3)).softmax(dim=-1)
        weight_BHNN = F.dropout(weight_BHNN, self.dropout, self.training)
        out: Tensor = self.out_proj((weight_BHNN @ v_BHNd).transpose(1, 2).reshape(rows, tokens, width))
        return out


class Quantizer(nn.Module):
    """Straight-through Gumbel-softmax over the codes of each group."""

    def __init__(self, channels: int, objective: Wav2Vec2CMSC.Config) -> None:
        super().__init__()
        self.groups, self.codes = objective.code_groups, objective.codes
        width = objective.code_width // self.groups
        self.vars = nn.Parameter(torch.empty(1, self.groups * self.codes, width).uniform_())
        self.weight_proj = nn.Linear(channels, self.groups * self.codes)

    def forward(self, x_BMC: Tensor, gumbel_BMGV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Codes (B, M, Q) and the softmax of their logits."""
        logit_BMGV = self.weight_proj(x_BMC).view(gumbel_BMGV.shape).float()
        soft_BMGV = ((logit_BMGV + gumbel_BMGV) / temperature).softmax(dim=-1)
        hard_BMGV = F.one_hot(soft_BMGV.argmax(dim=-1), self.codes).float()
        choice_BMGV = hard_BMGV - soft_BMGV.detach() + soft_BMGV
        book_GVW = self.vars.view(self.groups, self.codes, -1)
        code_BMQ = torch.einsum("bmgv,gvw->bmgw", choice_BMGV, book_GVW).flatten(2)
        return code_BMQ, logit_BMGV.softmax(dim=-1)


def info_nce(prediction_BMQ: Tensor, target_BMQ: Tensor, negative_BMK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the target against explicit negatives; those that equal the target are excluded."""
    row_B11 = torch.arange(len(target_BMQ), device=target_BMQ.device)[:, None, None]
    unit_BMQ, target_unit_BMQ = (F.normalize(vectors.float(), dim=-1) for vectors in (prediction_BMQ, target_BMQ))
    negative_BMKQ = target_unit_BMQ[row_B11, negative_BMK]
    candidate_BMKQ = torch.cat([target_unit_BMQ[:, :, None], negative_BMKQ], dim=2)
    logit_BMK = torch.einsum("bmq,bmkq->bmk", unit_BMQ, candidate_BMKQ) / temperature
    same_BMK = (target_BMQ[row_B11, negative_BMK] == target_BMQ[:, :, None]).all(dim=-1)
    logit_BMK = torch.cat([logit_BMK[..., :1], logit_BMK[..., 1:].masked_fill(same_BMK, float("-inf"))], dim=-1)
    first = torch.zeros(logit_BMK.shape[:2].numel(), dtype=torch.int64, device=logit_BMK.device)
    return F.cross_entropy(logit_BMK.flatten(0, 1), first)


def cmsc(embedding_BD: Tensor, patient_B: Tensor, segment_B: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of first against second segments and back; the norm is a constant in the gradient."""
    unit_BD = embedding_BD / embedding_BD.detach().norm(dim=1, keepdim=True)
    first, second = segment_B == 0, segment_B == 1
    logit_PP = unit_BD[first] @ unit_BD[second].T / temperature
    positive_PP = patient_B[first][:, None] == patient_B[second][None, :]
    likelihood_PP = logit_PP.log_softmax(dim=1) + logit_PP.log_softmax(dim=0)
    loss: Tensor = -likelihood_PP[positive_PP].sum() / (2 * positive_PP.sum())
    return loss


def _at(x_BNC: Tensor, place_BM: Tensor) -> Tensor:
    return x_BNC[torch.arange(len(x_BNC), device=x_BNC.device)[:, None], place_BM]


# -- held against ecgscale -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contents(Contents):
    """The stem's features are projected here whatever their width."""

    @property
    def has_projection(self) -> bool:
        return True


def named_as_here(tensors: dict[str, Tensor], model: ModelConfig, objective: ObjectiveConfig) -> dict[str, Tensor]:
    """Weights or gradients of ecgscale's objective under this file's names and in its shapes."""
    assert isinstance(objective, Wav2Vec2CMSC.Config)
    codes = Codes(objective.code_groups, objective.codes, objective.code_width)
    return to_theirs(tensors, _Contents(model, codes=codes))


def same_draws(draws: Draws, leads: int) -> PlainDraws:
    """What ecgscale's objective has drawn, as this file takes it."""
    assert draws.time_mask is not None
    assert draws.negative_BMK is not None
    assert draws.gumbel_BMGV is not None
    place_BM = draws.time_mask.place_BM
    keep_BL = (
        torch.ones(len(place_BM), leads, device=place_BM.device)
        if draws.lead_draw is None
        else draws.lead_draw.keep_BL(leads).float()
    )
    return PlainDraws(keep_BL, place_BM, draws.negative_BMK, draws.gumbel_BMGV)
