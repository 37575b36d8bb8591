"""What a module keeps beside its parameters, and how it sees itself while it updates that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
