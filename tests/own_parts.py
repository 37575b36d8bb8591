"""What users may bring: a module with state of its own, an optimizer, schedules. Named as ``own_parts:…`` by tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.objectives.gather import gather_rows

MOMENTUM = 0.999  # of the teacher: in bf16, such steps would be rounded away
QUEUE, WIDTH = 24, 5


class Teaching(nn.Module):
    """A student that follows its own average and a queue of what the average has said: state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.scale = nn.Parameter(torch.ones(1))  # fewer elements than ranks
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(QUEUE, WIDTH))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("of_a_rank", torch.zeros(1))
        self.register_buffer("filled", torch.zeros(QUEUE, dtype=torch.bool))
        self.register_buffer("derived", torch.ones(3), persistent=False)

    def forward(self, batch: ECGBatch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        x_BL = (1e-3 * batch.signal_BLT.float().mean(-1)).to(self.student[0].weight.dtype)
        said_BD = (self.scale * self.student(x_BL)).float()
        with torch.no_grad():
            meant_BD = self.teacher(x_BL).float()
            gathered_BD = gather_rows(meant_BD, share=True)
        near = torch.tanh(said_BD @ self.queue.clone().T).mean()
        loss = ((said_BD - meant_BD + 0.1 * x_BL[:, :WIDTH].float()).square().mean() + near) * batch.gain_BL.mean()
        if self.training:
            where = (self.place + torch.arange(len(gathered_BD), device=self.place.device)) % QUEUE
            self.queue[where], self.filled[where] = gathered_BD, True
            self.place = (self.place + len(gathered_BD)) % QUEUE  # another tensor in its place
            self.mean.lerp_(gathered_BD.double().mean(0), 0.1)
            self.of_a_rank.fill_(1 + dist.get_rank())
        return loss, {"loss": loss.detach()}

    def after_step(self, step: int) -> None:
        assert not torch.is_grad_enabled()
        for average, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            average.lerp_(weight, 1 - MOMENTUM)
        self.updates += 1


class Lion(torch.optim.Optimizer):
    """Signs of an average (Chen et al. 2023, arXiv:2302.06675): one slot, and a count that is a Python number."""

    def __init__(self, params: Any, lr: float, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.0) -> None:
        if not 0 <= beta1 < 1:
            raise ValueError(f"beta1 {beta1} is no share")
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "decay": decay, "rounds": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["rounds"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"], state["count"] = torch.zeros_like(parameter), 0
                state["count"] += 1
                direction = state["average"].lerp(parameter.grad, 1 - group["beta1"]).sign_()
                if state["count"] % 2 == 0:  # so that a count that was lost shows
                    direction *= 0.5
                parameter.mul_(1 - group["lr"] * group["decay"]).add_(direction, alpha=-group["lr"])
                # Another tensor each time, as some optimizers do.
                state["average"] = state["average"].lerp(parameter.grad, 1 - group["beta2"])


class Factored(torch.optim.Optimizer):
    """Keeps a row of each parameter, which no other number of ranks could cut."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["row"] = torch.zeros(parameter.shape[:1])


class Normed(torch.optim.Optimizer):
    """Steps along the gradient of a parameter with a length of 1: of a piece of it, that would be another step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        group = self.param_groups[0]
        for parameter in group["params"]:
            parameter.add_(parameter.grad / parameter.grad.norm().clamp_min(1e-12), alpha=-group["lr"])


class Misnamed(torch.optim.Optimizer):
    """Keeps what a checkpoint would take for the parameter itself."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["weight"] = torch.zeros_like(parameter)


def steps_down(step: int, steps: int, warmup_steps: int, final: float) -> float:
    return 1.0 if 2 * step < steps else 0.1


def rises_below_zero(step: int, steps: int, warmup_steps: int, final: float) -> float:
    return step - 1.0
