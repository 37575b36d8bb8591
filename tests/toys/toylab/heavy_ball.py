"""A small optimizer of one's own: gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class HeavyBall(torch.optim.Optimizer):
    """Each step goes along an average of the gradients (Polyak 1964)."""

    def __init__(self, params: Any, lr: float, friction: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "friction": friction})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(1 - group["friction"]).add_(parameter.grad)
                parameter.add_(state["velocity"], alpha=-group["lr"])
