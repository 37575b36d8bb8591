"""Sums and gathers over ranks that gradients flow through, so that losses do not depend on the world size.

Every rank computes the same global quantity, and the engine averages gradients over ranks; the backward passes below
are written for that: they sum over ranks what each rank contributes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()  # all-reduce and a slice: gloo has no reduce-scatter
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad
