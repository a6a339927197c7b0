"""Models too large for one device: their weights are spread over the processes, by PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grasp.model.dense import gathered
from grasp.model.targets import decoder, layer_targets
from grasp.statistics.processes import Processes


def shard_(model: nn.Module, device: torch.device, processes: Processes) -> None:
    """Spread the large weights of the decoder layers over the processes, evenly, and move the rest to ``device``.

    Each linear that can be replaced, and each set of experts, gathers its weight when it is called and lets it go
    again. Embeddings, norms and head stay whole in each process, and so do low-rank linears that replace others.

    Args:
        model: whole and alike in all processes, on the CPU where it does not fit on a device.
        device: where this process computes.
        processes: with ``sharded`` set.
    """
    mesh = init_device_mesh(device.type, (processes.size,))
    for module in _units(model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    nn.Module.to(model, device)


def collect_(model: nn.Module, processes: Processes) -> None:
    """Put whole weights, on the CPU, into the first process, and none into the others: to be saved, not to be run."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                whole = gathered(parameter.detach())
                whole = whole.cpu() if processes.first else whole.to("meta")
                setattr(module, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are sharded each for itself; a decoder layer calls each once, whatever the tokens are."""
    for index, layer in enumerate(decoder(model).layers):
        yield from (target.module for target in layer_targets(model, index)[0])
        for path, module in layer.named_modules():
            if path.split(".")[-1] == "experts" and next(module.parameters(recurse=False), None) is not None:
                yield module
