"""The ZeRO wrapper: the only place that knows DeepSpeed.

Stages 0 to 3 are configuration. PyTorch's own AdamW and no just-in-time compiled op, so that no node needs a compiler.
State goes in and out by parameter name, in float32, whatever the stage and the number of ranks.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.training.compiling import compile_layers
from ecgscale.training.ranks import Ranks
from ecgscale.training.transfer import Transfer

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 500_000_000
"""Most elements of the gradients that are reduced together."""


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed and spread over ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed ZeRO shares out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    whole_below: int = 100_000
    """At stage 3, parameters with fewer elements stay whole on every rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model. Weights and moments of the optimizer are fp32 in either case."""
    activation_checkpointing: bool | int = False
    """Recompute transformer layers in the backward pass instead of storing their activations: how many of them, from
    the first. true: all, false: none."""
    compile: bool = False
    """Compile the transformer layers with torch.compile, for the shapes that come; on a CPU with a C++ compiler."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on all parameters, as in the reference implementation."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; larger ones are scaled down. 0 turns it off."""
    peak_tflops: float = 0.0
    """Peak rate of one device in 1e12 FLOP/s, of which MFU is a share. 0: by the table of known GPUs."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "clip_norm", "peak_tflops"):
            if getattr(self, name) < 0:
                raise InputError(f"engine.{name} {getattr(self, name):g}: give 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"engine.{name} {getattr(self, name):g}: give 0 or more and below 1")
        if self.activation_checkpointing < 0:
            raise InputError(f"engine.activation_checkpointing {self.activation_checkpointing}: give 0 or more layers")
        if self.compile and self.zero_stage == 3:
            raise InputError("engine.compile: not with engine.zero_stage 3, whose parameters come and go; use stage 2")
        if self.whole_below < 0:
            raise InputError(f"engine.whole_below {self.whole_below}: give 0 or more")
        if self.epsilon <= 0:
            raise InputError(f"engine.epsilon {self.epsilon:g}: give a positive number")


class Engine:
    """A module, its optimizer and the exchange between ranks."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        ranks: Ranks,
        accumulation: int,
        micro_batch: int,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """``weights`` by name are loaded before ZeRO takes the module apart; ``micro_batch`` is a rank's rows."""
        self.config, self.ranks, self._accumulation = config, ranks, accumulation
        self.put = Transfer(ranks.device)
        if weights is not None:
            module.load_state_dict(weights)
        named = dict(module.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items()}
        self.trained = [name for name, p in named.items() if p.requires_grad]
        self._frozen = {name: p.detach().clone() for name, p in named.items() if not p.requires_grad}
        self._refuse_tiny_parameters()
        # DeepSpeed makes its fp32 masters from weights that it has rounded to bf16 before.
        masters = {n: named[n].detach().clone() for n in self.trained} if config.precision == "bf16" else {}
        if config.compile:
            compile_layers(module, ranks.device)
        self._engine = _initialize(module, config, accumulation, micro_batch, ranks.world_size)
        self._parameters = dict(self._engine.module.named_parameters())
        self._skipped = False
        self._set_master_weights(masters)

    def _refuse_tiny_parameters(self) -> None:
        """DeepSpeed 0.19.8 cannot set the optimizer state of a parameter with fewer elements than ranks at stage 3."""
        tiny = [name for name in self.trained if self.shapes[name].numel() < self.ranks.world_size]
        if self.config.zero_stage == 3 and tiny:
            raise InputError(
                f"engine.zero_stage 3: parameter {tiny[0]} has fewer elements than there are ranks "
                f"({self.ranks.world_size}), so the run could not resume; use stage 2"
            )

    def forward(self, batch: ECGBatch, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts of one micro-step, for a batch that was ``put`` on the device."""
        loss, parts = self._engine(batch, **arguments)
        return loss, parts

    def backward(self, loss: Tensor) -> None:
        """Add the micro-step's gradient. A non-finite loss poisons it, so that every rank skips the step."""
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, float("nan")))

    def step(self, learning_rate: float) -> bool:
        """Close the micro-step and, at the accumulation boundary, update. False where the step was skipped.

        A step with a non-finite gradient is skipped on all ranks: the norm that decides is reduced over them.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        if self._plain:
            self._skipped = not self._clip_plain()
        self._engine.step()
        if not self._plain:
            self._skipped = bool(self._engine.optimizer.overflow)
        return not self._skipped

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping; infinity where it was skipped."""
        if self._skipped:
            return float("inf")
        return float(self._plain_norm if self._plain else self._engine.get_global_grad_norm())

    @property
    def _plain(self) -> bool:
        """Whether PyTorch's optimizer runs bare, without DeepSpeed's checks: stage 0 in fp32."""
        return isinstance(self._engine.optimizer, torch.optim.AdamW)

    def _clip_plain(self) -> bool:
        """Clip the gradient; False where it is not finite, and then it is dropped, so that the update does nothing."""
        parameters = [p for p in self._parameters.values() if p.grad is not None]
        self._plain_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        finite = bool(self._plain_norm.isfinite())
        if not finite:
            self._engine.module.zero_grad(set_to_none=True)
        elif self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, self._plain_norm)
        return finite

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradient and no dropout."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    # -- state by name -----------------------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """One parameter, whole, fp32. All ranks call it together."""
        from deepspeed.utils import safe_get_full_fp32_param

        if name in self._frozen:
            return self._frozen[name]
        if self.config.zero_stage == 0:
            return self._unsharded[name].detach()
        value: Tensor = safe_get_full_fp32_param(self._parameters[name])
        return value.reshape(self.shapes[name])

    def moment(self, name: str, kind: str) -> Tensor:
        """One AdamW moment (``exp_avg`` or ``exp_avg_sq``), whole, fp32. All ranks call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.config.zero_stage == 0:
            moment: Tensor = self._base_optimizer().state[self._unsharded[name]][kind]
            return moment
        value: Tensor = safe_get_full_optimizer_state(self._parameters[name], kind)
        return value.reshape(self.shapes[name])

    @cached_property
    def _unsharded(self) -> dict[str, Tensor]:
        """Stage 0: what the optimizer updates, by name, for which DeepSpeed has no getter."""
        if self._plain:
            return {name: self._parameters[name] for name in self.trained}
        optimizer = self._engine.optimizer
        master_of = dict(zip(map(id, chain(*optimizer.fp16_groups)), chain(*optimizer.fp32_groups), strict=True))
        return {name: master_of[id(self._parameters[name])] for name in self.trained}

    def optimizer_steps(self) -> int:
        """AdamW's own count of updates, for its bias correction; skipped steps do not count."""
        states = list(self._base_optimizer().state.values())
        return int(states[0]["step"]) if states else 0

    def create_optimizer_state(self, batch: ECGBatch) -> None:
        """Moments of zero and a count of zero, which AdamW would only make at its first update.

        Done by an update with learning rate 0 whose gradient is 0 whatever ``batch`` and the weights give. Without it a
        run whose first steps are skipped has no state to save, and one that goes on there has none to fill.
        """
        blank = batch.with_gain(torch.zeros_like(batch.gain_BL))
        hooks = [self._parameters[name].register_hook(torch.zeros_like) for name in self.trained]
        for _ in range(self._accumulation):
            loss, _ = self.forward(blank)
            self.backward(loss)
            self.step(learning_rate=0.0)
        for hook in hooks:
            hook.remove()
        self._set_optimizer_steps(0)

    def set_optimizer(self, moment: Callable[[str, str], Tensor], steps: int) -> None:
        """Put moments by name into the optimizer's state; the weights must have been given at construction."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for name in self.trained:
            for kind in MOMENTS:
                value = moment(name, kind).to(self.ranks.device)
                if self.config.zero_stage == 0:
                    self.moment(name, kind).copy_(value)
                else:
                    safe_set_full_optimizer_state(self._parameters[name], value, kind)
        self._set_optimizer_steps(steps)

    def _set_optimizer_steps(self, steps: int) -> None:
        for state in self._base_optimizer().state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), steps)

    def _set_master_weights(self, weights: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name, weight in weights.items():
            value = weight.to(self.ranks.device)
            if self.config.zero_stage == 0:
                self._unsharded[name].data.copy_(value)
            else:
                safe_set_full_fp32_param(self._parameters[name], value)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        base = optimizer if self._plain else optimizer.optimizer
        assert isinstance(base, torch.optim.Optimizer)
        return base


class _AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, whose own step imports torch.compile's machinery (2.13), for a graph break in nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def _spare_the_compiler() -> None:
    """Keep torch.compile's machinery from being imported where nothing is compiled: three seconds of each start.

    PyTorch 2.13 imports it to keep it away from its optimizers (see also _AdamW); DeepSpeed 0.19.8 imports an optimizer
    that is compiled, Muon, to see whether it is the one it was given.
    """
    if "torch._dynamo" in sys.modules:
        return
    for name, method in vars(torch.optim.Optimizer).items():
        wrapped = getattr(method, "__wrapped__", None)
        if name in ("add_param_group", "load_state_dict", "zero_grad") and wrapped is not None:
            wrapped.__dynamo_disable = wrapped
    with patch.object(torch, "compile", lambda function=None, **_: function or (lambda plain: plain)):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def _initialize(module: nn.Module, config: EngineConfig, accumulation: int, micro_batch: int, world_size: int) -> Any:
    """deepspeed.initialize with everything said that has a surprising default."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or it warns of its guess
    # DeepSpeed 0.19.8 calls collectives at each step that PyTorch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        _spare_the_compiler()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # skipped steps are ours to tell
        # Without this, the first start on a CPU compiles an op, and a killed build hangs every later start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        # One parameter group: with several, DeepSpeed 0.19.8 links only the first one's moments to the parameters.
        optimizer = _AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=0.0,  # set before each step; at 0, DeepSpeed's own first update of stage 0 in bf16 changes no weight
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        settings = {
            "train_batch_size": micro_batch * accumulation * world_size,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            # Stage 0 in fp32 clips in Engine._clip_plain; everywhere else DeepSpeed does (and its default is 1.0).
            "gradient_clipping": 0.0 if config.zero_stage == 0 and config.precision == "fp32" else config.clip_norm,
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_optimization": {
                "stage": config.zero_stage,
                "overlap_comm": False,
                # Its default is half a billion elements, which a GPU holds however small the model is.
                "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in module.parameters() if p.requires_grad)),
                "stage3_param_persistence_threshold": config.whole_below,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice per micro-step
        }
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine
