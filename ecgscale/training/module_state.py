"""What a module keeps that no optimizer trains, and how it sees itself while it updates that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ecgscale.errors import InputError
from ecgscale.objectives.objective import Objective


class Untrained:
    """Frozen parameters and persistent buffers of a module, by name."""

    def __init__(
        self,
        module: nn.Module,
        masters: Mapping[str, Tensor],
        gathered: Callable[[Collection[str], bool], AbstractContextManager[None]],
    ) -> None:
        """``masters`` are fp32 values of all frozen parameters where the model has rounded ones, or none.

        ``gathered(names, written)`` makes parameters whole meanwhile, and keeps what is written where that is said.
        """
        self._module, self._masters, self._gathered = module, dict(masters), gathered
        self._frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.buffers = persistent_buffers(module)

    def __contains__(self, name: str) -> bool:
        return name in self._frozen

    def buffer(self, name: str) -> Tensor:
        """As it is now on this rank; another tensor may have taken its place."""
        return self._module.get_buffer(name)

    def agree_on_buffers(self) -> None:
        """What ranks keep in buffers becomes the first rank's, as in DistributedDataParallel: one can be saved."""
        take_those_of_the_first_rank([self.buffer(name) for name in self.buffers])

    def weight(self, name: str) -> Tensor:
        """A copy of a frozen parameter, whole and fp32: its master, but where a forward pass has written into it."""
        with self._gathered([name], False):
            own = self._frozen[name].detach().clone()
        if name not in self._masters:
            return own
        master = self._masters[name]
        return torch.where(master.to(own.dtype) == own, master, own.float())

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Give all frozen parameters other values, the same on all ranks."""
        with self._gathered(values, True):
            for name, parameter in self._frozen.items():
                parameter.data.copy_(values[name])
        self._masters = {name: values[name] for name in self._masters}


def persistent_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that a module's state holds; what is derived is registered with ``persistent=False``."""
    buffers = dict(module.named_buffers())
    return [name for name in module.state_dict() if name in buffers]


def take_those_of_the_first_rank(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors of any types by the first rank's, in one broadcast. All ranks call it together."""
    if not tensors or dist.get_world_size() == 1:
        return
    sent = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
    dist.broadcast(sent, src=0)
    for tensor, own in zip(tensors, torch.split(sent, [tensor.nbytes for tensor in tensors]), strict=True):
        tensor.detach().copy_(own.clone().view(tensor.dtype).reshape(tensor.shape))


@contextmanager
def standing_in(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """A module with other parameters, by the names of its own; also where several of its modules share one."""
    own = dict(module.named_parameters())
    stand_in_of = {id(own[name]): parameter for name, parameter in parameters.items()}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in stand_in_of:
                replaced.append((part, name, parameter))
                part.register_parameter(name, stand_in_of[id(parameter)])
    try:
        yield
    finally:
        for part, name, parameter in replaced:
            part.register_parameter(name, parameter)


@contextmanager
def unwritten(trained: Mapping[str, nn.Parameter], owner: nn.Module) -> Iterator[None]:
    """Raises InputError where ``after_step`` of a module writes meanwhile into what the optimizer trains."""
    before = {name: parameter._version for name, parameter in trained.items()}
    yield
    if written := [name for name, parameter in trained.items() if parameter._version != before[name]]:
        raise InputError(
            f"{type(owner).__name__}.after_step writes into {written[0]}, which the optimizer trains; copy it"
        )


def own_after_step(module: nn.Module) -> Callable[[int], None] | None:
    """What a module does after each update; None for one that does nothing, for which nothing is gathered."""
    own: Callable[[int], None] | None = getattr(module, "after_step", None)
    return None if getattr(own, "__func__", None) is Objective.after_step else own
