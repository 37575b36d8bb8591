"""The ZeRO wrapper: the only place that knows DeepSpeed.

Stages 0 to 3 are configuration. Optimizers are PyTorch's, and no op is compiled just in time, so that no node needs a
compiler. State goes in and out by name, parameters and the optimizer's slots in float32, whatever the stage and the
number of ranks.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.training import optimizers
from ecgscale.training.compiling import compile_layers
from ecgscale.training.engine_config import EngineConfig
from ecgscale.training.module_state import Untrained, own_after_step, standing_in, unwritten
from ecgscale.training.ranks import Ranks
from ecgscale.training.transfer import Transfer

__all__ = ["BUCKET", "Engine", "EngineConfig"]

BUCKET = 500_000_000
"""Most elements of the gradients that are reduced together."""


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
        """``weights`` and buffers by name are loaded before ZeRO takes the module apart; those that are not given stay.

        ``micro_batch`` is a rank's rows.
        """
        self.config, self.ranks, self._accumulation = config, ranks, accumulation
        self.put = Transfer(ranks.device)
        if weights is not None:
            module.load_state_dict(module.state_dict() | weights)
        named = dict(module.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items()}
        self.trained = [name for name, p in named.items() if p.requires_grad]
        # What is rounded to bf16 for the model: DeepSpeed makes its masters from it, and of frozen ones it has none.
        masters = {n: p.detach().clone() for n, p in named.items()} if config.precision == "bf16" else {}
        if config.compile:
            compile_layers(module, ranks.device)
        self._after_step = own_after_step(module)
        self._engine = _initialize(module, config, accumulation, micro_batch, ranks.world_size)
        self._parameters = dict(self._engine.module.named_parameters())
        frozen = {name: value.to(ranks.device) for name, value in masters.items() if name not in self.trained}
        self.untrained = Untrained(self._engine.module, frozen, self._gathered)
        self._skipped = False
        self._layout = optimizers.layout_of(config.optimizer, config.arguments, ranks.device)
        # DeepSpeed 0.19.8 has let the optimizer do an update for itself in bf16 at stage 0: it begins anew.
        self._base_optimizer.state.clear()
        self._base_optimizer.param_groups[0].update(self._layout.group)
        for name in self.trained if masters else []:
            self._set(name, masters[name])

    def forward(self, batch: ECGBatch, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts of one micro-step, for a batch that was ``put`` on the device."""
        loss, parts = self._engine(batch, **arguments)
        return loss, parts

    def backward(self, loss: Tensor) -> None:
        """Add the micro-step's gradient. A non-finite loss poisons it, so that every rank skips the step."""
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, float("nan")))

    def step(self, learning_rate: float, step: int = 0) -> bool:
        """Close the micro-step and, at the accumulation boundary, update. False where the step was skipped.

        A step with a non-finite gradient is skipped on all ranks: the norm that decides is reduced over them. After an
        update the module's own ``after_step`` is called with ``step``, the number that its forward pass was given.
        """
        # By hand: a schedule of DeepSpeed's would count its own steps, and a resumed run would have to restore it.
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        if self._plain:
            self._plain_norm, finite = optimizers.clip_gradient(self._parameters.values(), self.config.clip_norm)
            self._skipped = not finite
        self._engine.step()
        if not self._plain:
            self._skipped = bool(self._engine.optimizer.overflow)
        self.untrained.agree_on_buffers()
        # Behind the update, since a moving average of the weights of before would lag one step.
        if self._after_step is not None and not self._skipped:
            with torch.no_grad(), self._whole():
                self._after_step(step)
            self.untrained.agree_on_buffers()
        return not self._skipped

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """The module with its parameters whole and in fp32. What is written into frozen ones is kept.

        In fp32 below stage 3 they are its own; else copies stand in for them, gathered by all ranks together.
        """
        module, seen = self._engine.module, self._parameters
        copied = self.config.precision == "bf16" or self.config.zero_stage == 3
        if copied:
            seen = {n: nn.Parameter(self.weight(n), requires_grad=p.requires_grad) for n, p in seen.items()}
        with standing_in(module, seen if copied else {}), unwritten({n: seen[n] for n in self.trained}, module):
            yield
        if copied:
            self.untrained.take({name: p.detach() for name, p in seen.items() if name in self.untrained})

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping; infinity where it was skipped."""
        if self._skipped:
            return float("inf")
        return float(self._plain_norm if self._plain else self._engine.get_global_grad_norm())

    @property
    def _plain(self) -> bool:
        """Whether PyTorch's optimizer runs bare, without DeepSpeed's checks: stage 0 in fp32."""
        return self.config.zero_stage == 0 and self.config.precision == "fp32"

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradient and no dropout."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def weight(self, name: str) -> Tensor:
        """One parameter as it is now, whole, fp32. All ranks call it together."""
        return self.untrained.weight(name) if name in self.untrained else self._get(name).detach()

    def _gathered(self, names: Collection[str], written: bool) -> AbstractContextManager[None]:
        """At stage 3, parameters are whole meanwhile; what is ``written`` into them, by all ranks alike, stays."""
        import deepspeed

        parameters = [self._parameters[name] for name in names]
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if written else None, enabled=self.config.zero_stage == 3 and bool(parameters)
        )
        return gathered

    def module_state(self) -> dict[str, Tensor]:
        """Parameters, whole and fp32, and persistent buffers, on the CPU. All ranks call it together."""
        weights = {name: self.weight(name).cpu() for name in self.shapes}
        return weights | {name: self.untrained.buffer(name).cpu() for name in self.untrained.buffers}

    def optimizer_state(self) -> optimizers.OptimizerState:
        """What the optimizer has kept so far; its slots' tensors are read one by one."""
        return optimizers.state_of(self._base_optimizer, self._layout)

    def slot(self, name: str, slot: str) -> Tensor:
        """What the optimizer keeps of a parameter under one of its slots, such as exp_avg: whole, fp32.

        All ranks call it together.
        """
        self._link_slots()
        return self._get(name, slot)

    def set_optimizer(self, slot: Callable[[str, str], Tensor], state: optimizers.OptimizerState) -> None:
        """Give the optimizer what another engine's ``slot`` and ``optimizer_state`` gave."""
        self._layout.check(self.config.optimizer, state)
        self._base_optimizer.param_groups[0].update(state.group)
        if state.slots or state.scalars:
            for tensor in self._updated_tensors:
                self._base_optimizer.state[tensor] = self._layout.entry(tensor, state)
        self._link_slots()
        for name in self.trained:
            for kind in state.slots:
                self._set(name, slot(name, kind), kind)

    def _link_slots(self) -> None:
        """DeepSpeed's getters of stages 1 and 2 know the slots that were there at the first update."""
        if self.config.zero_stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _get(self, name: str, slot: str | None = None) -> Tensor:
        """The fp32 values that the optimizer updates, or what it keeps of them, whole."""
        parameter = self._parameters[name]
        if self.config.zero_stage == 0:
            updated = self._unsharded[name]
            kept = updated if slot is None else self._base_optimizer.state[updated].get(slot)
            return torch.zeros_like(updated) if kept is None else kept  # one that never had a gradient has none
        if self.config.zero_stage == 3:
            value: Tensor = parameter._z3_optimizer.get_full_hp_param(parameter, slot)
        else:
            value = parameter.get_full_hp_param(slot)
        return value.reshape(self.shapes[name])

    def _set(self, name: str, value: Tensor, slot: str | None = None) -> None:
        parameter, value = self._parameters[name], value.to(self.ranks.device)
        if self.config.zero_stage == 0:
            self._get(name, slot).data.copy_(value)
        elif self.config.zero_stage == 3:
            parameter._z3_optimizer.set_local_hp_param(self._share(name, value), parameter, slot)
        else:
            parameter.set_full_hp_param(value, slot)

    def _share(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a parameter at stage 3. DeepSpeed 0.19.8 cannot cut one that does not come out even."""
        size = self._parameters[name].ds_tensor.numel()
        even = nn.functional.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
        return even[self.ranks.rank * size :][:size]

    @cached_property
    def _unsharded(self) -> dict[str, Tensor]:
        """Stage 0: what the optimizer updates, by name, for which DeepSpeed has no getter."""
        if self._plain:
            return {name: self._parameters[name] for name in self.trained}
        optimizer = self._engine.optimizer
        master_of = dict(zip(map(id, chain(*optimizer.fp16_groups)), chain(*optimizer.fp32_groups), strict=True))
        return {name: master_of[id(self._parameters[name])] for name in self.trained}

    @property
    def _updated_tensors(self) -> list[Tensor]:
        """What this rank's optimizer updates: parameters, masters of them, or its share of all, flattened."""
        stage, optimizer = self.config.zero_stage, self._engine.optimizer
        if stage == 0:
            return list(self._unsharded.values())
        shares: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return shares

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        base = optimizer if self._plain else optimizer.optimizer
        assert isinstance(base, torch.optim.Optimizer)
        return base


def _spare_the_compiler() -> None:
    """DeepSpeed 0.19.8 imports an optimizer that is compiled, Muon, to see whether it is the one it was given."""
    if "torch._dynamo" in sys.modules:
        return
    optimizers.spare_the_compiler()
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
        # At learning rate 0: DeepSpeed's own first update of stage 0 in bf16 changes no weight.
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = optimizers.build_optimizer(config.optimizer, config.arguments, trained)
        settings = {
            "train_batch_size": micro_batch * accumulation * world_size,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            # Stage 0 in fp32 clips in Engine.step; everywhere else DeepSpeed does (and its default is 1.0).
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
