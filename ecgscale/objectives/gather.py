"""Sums and gathers over ranks that gradients flow through, so that losses do not depend on the world size.

Every rank computes the same global quantity, and the engine averages gradients over ranks; the backward passes below
are written for that: they sum over ranks what each rank contributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Sent(NamedTuple):
    """One exchange: what it is, and bytes of the whole tensor as every rank has it before or behind."""

    kind: Literal["all-gather", "all-reduce"]
    bytes: int


_pretended: tuple[int, list[Sent]] | None = None


@contextmanager
def pretended_ranks(count: int) -> Iterator[list[Sent]]:
    """So many ranks while it lasts, of which only this one is there; yields what would be sent between them. Nothing is
    sent, and what others have is made up: it is for costs, not for values."""
    global _pretended
    before, _pretended = _pretended, (count, [])
    try:
        yield _pretended[1]
    finally:
        _pretended = before


def world_size() -> int:
    if _pretended:
        return _pretended[0]
    return dist.get_world_size() if dist.is_initialized() else 1


def _all_gather(x: Tensor) -> Tensor:
    if _pretended:
        ranks, sent = _pretended
        sent.append(Sent("all-gather", ranks * x.nbytes))
        return torch.cat([x] * ranks)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _all_reduce(x: Tensor, kind: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """In place."""
    if _pretended:
        _pretended[1].append(Sent("all-reduce", x.nbytes))
        return
    dist.all_reduce(x, kind)


def gather_rows(x: Tensor, share: bool) -> Tensor:
    """(B, …) of each rank -> (W·B, …) on all ranks, in rank order; ``x`` itself where the rows are not a share."""
    if not share or world_size() == 1:
        return x
    gathered: Tensor = _GatherRows.apply(x)  # type: ignore[no-untyped-call]
    return gathered


def sum_over_ranks(x: Tensor, share: bool) -> Tensor:
    """The sum over ranks, the same on all; ``x`` itself where the rows are not a share."""
    if not share or world_size() == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


def lowest_of_ranks(x: Tensor, share: bool) -> Tensor:
    """The smallest over ranks, the same on all, without gradient."""
    if share and world_size() > 1:
        x = x.clone()
        _all_reduce(x, dist.ReduceOp.MIN)
    return x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()  # all-reduce and a slice: gloo has no reduce-scatter
        _all_reduce(grad)
        return grad.chunk(world_size())[0 if _pretended else dist.get_rank()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        _all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        _all_reduce(grad)
        return grad
