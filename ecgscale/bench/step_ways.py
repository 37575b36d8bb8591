"""Ways to take a training step: ecgscale's, the same model in a plain DDP loop, and the method written plainly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ecgscale.bench.step_case import Case, shard_stream, synthetic_batches
from ecgscale.bench.straightforward import Straightforward, can_be_written, named_as_here, same_draws
from ecgscale.data.batch import ECGBatch
from ecgscale.data.stream import Copied
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives.keys import TimeMasking
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.ranks import Ranks

OURS, SHARDS, DDP, STRAIGHTFORWARD, PRODUCT = "ecgscale", "shards", "ddp", "straightforward", "product"
TITLES = {
    OURS: "ecgscale",
    SHARDS: "ecgscale, batches from shards",
    DDP: "the same model, plain PyTorch DDP",
    STRAIGHTFORWARD: "straightforward PyTorch, fp32",
    PRODUCT: "one large matrix product",
}
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}

Step = Callable[[], Tensor]  # takes one step and returns its loss


class Equality(NamedTuple):
    """How far two ways are apart, relatively, in fp32 and without dropout."""

    loss: float
    gradient: float  # of all gradients as one vector


def prepare(way: str, case: Case, ranks: Ranks) -> Step:
    """The step of a way, from the same initial weights as those of the others."""
    if way == PRODUCT:
        return _product(case, ranks)
    if way == SHARDS:
        return _ours(case, ranks, partial(shard_stream(case, ranks.rank).from_batch, 0))
    batches = synthetic_batches(case, ranks.rank)
    if way == OURS:
        return _ours(case, ranks, lambda _: batches)
    return {DDP: _ddp, STRAIGHTFORWARD: _straightforward}[way](case, ranks, batches)


def possible(case: Case) -> list[str]:
    """Ways that the case can be taken by."""
    written = can_be_written(case.config.model, case.config.objective)
    return [OURS, *([SHARDS] if case.shards else []), DDP, *([STRAIGHTFORWARD] if written else [])]


def _ours(case: Case, ranks: Ranks, begin: Callable[[Copied], Iterator[ECGBatch]]) -> Step:
    """As the training loop does it."""
    engine = Engine(case.build(), case.config.engine, ranks, accumulation=1, micro_batch=case.batch)
    batches, done = begin(engine.put.copied), 0

    def step() -> Tensor:
        nonlocal done
        loss, _ = engine.forward(engine.put(next(batches)), step=done)
        engine.backward(loss)
        engine.step(case.config.engine.learning_rate)
        done += 1
        return loss.detach()

    return step


def _ddp(case: Case, ranks: Ranks, batches: Iterator[ECGBatch]) -> Step:
    """DistributedDataParallel, autocast for bf16, PyTorch's fused AdamW, nothing compiled."""
    # Only the local loss learns from what stands for masked tokens.
    unused = not isinstance(case.config.objective, TimeMasking)
    module = _distributed(case.build(), ranks, unused)
    optimizer = _adamw(module, case.config.engine)
    bf16 = case.config.engine.precision == "bf16"
    done = 0

    def step() -> Tensor:
        nonlocal done
        with torch.autocast(case.device, torch.bfloat16) if bf16 else nullcontext():
            loss: Tensor = module(next(batches).to(ranks.device), step=done)[0]
        return _update(loss, optimizer)

    return step


def _straightforward(case: Case, ranks: Ranks, batches: Iterator[ECGBatch]) -> Step:
    """fp32; on several ranks with DDP, each contrasting its own rows."""
    plain = _plain_twin(case)
    module: nn.Module = _distributed(plain, ranks) if ranks.world_size > 1 else plain.to(ranks.device)
    optimizer = _adamw(module, case.config.engine)
    done = 0

    def step() -> Tensor:
        nonlocal done
        done += 1
        return _update(module(next(batches).to(ranks.device), done - 1), optimizer)

    return step


def _product(case: Case, ranks: Ranks) -> Step:
    """What the device multiplies at most: a large product in the precision of the case."""
    dtype = torch.bfloat16 if case.config.engine.precision == "bf16" else torch.float32
    side = PRODUCT_SIDE[case.device]
    a, b = (torch.randn(side, side, device=ranks.device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _plain_twin(case: Case) -> Straightforward:
    """The straightforward module with the weights of the case's objective."""
    model, objective = case.config.model, case.config.objective
    assert isinstance(model, ModelConfig)
    plain = Straightforward(model, objective)
    plain.load_state_dict(named_as_here(case.build().state_dict(), model, objective))
    return plain


def _distributed(module: nn.Module, ranks: Ranks, unused: bool = False) -> DistributedDataParallel:
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module.to(ranks.device), device_ids=devices, find_unused_parameters=unused)


def _adamw(module: nn.Module, config: EngineConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def equality(case: Case, ranks: Ranks) -> Equality:
    """Losses and gradients of ecgscale's objective and of the straightforward one, for the same weights and draws.

    Raises InputError where they are not finite, so that nothing can be said of them.
    """
    case = case.without_dropout()
    model, objective = case.config.model, case.config.objective
    assert isinstance(model, ModelConfig)
    batch = next(synthetic_batches(case, ranks.rank)).to(ranks.device)
    ours, plain = case.build().to(ranks.device), _plain_twin(case).to(ranks.device)
    draws = ours.draw(batch, share=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        loss, _ = ours.losses(batch, draws, 0, share=False)
        plain_loss = plain.loss(batch, same_draws(draws, len(LEADS)), 0)
        loss.backward()  # type: ignore[no-untyped-call]
        plain_loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    renamed = named_as_here(gradients, model, objective)
    pairs = [(renamed[name], p.grad) for name, p in plain.named_parameters() if p.grad is not None]
    assert len(pairs) == len(renamed)
    apart = sum(float((one - other).square().sum()) for one, other in pairs)
    whole = sum(float(other.square().sum()) for _, other in pairs)
    if not all(math.isfinite(value) for value in (loss.item(), plain_loss.item(), apart, whole)):
        raise InputError("losses or gradients are not finite")
    return Equality(abs(loss.item() / plain_loss.item() - 1), float((apart / whole) ** 0.5))
