"""Sharding of models that are too large for one device, with FSDP2 of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from grasp.model.dense import gathered
from grasp.model.offload import shard_module_
from grasp.model.targets import decoder, layer_targets
from grasp.statistics.processes import Processes


def shard_(model: nn.Module, device: torch.device, processes: Processes) -> None:
    """Shard the large weights of the decoder layers over the processes, and move all other weights to ``device``.

    The linears that can be compressed and the sets of experts are sharded. Each gathers its weight when it is called,
    and frees it afterwards. Embeddings, norms, the head and the biases of linears are whole in each process.

    Args:
        model: the whole model, equal in all processes; on the CPU if it does not fit on a device.
        device: the device of this process.
        processes: processes with ``sharded`` set.
    """
    mesh = init_device_mesh(device.type, (processes.size,))
    for module in _units(model):
        shard_module_(module, mesh)
    nn.Module.to(model, device)


def collect_(model: nn.Module, processes: Processes) -> None:
    """Gather the whole weights on the CPU of rank 0 for saving; other ranks get meta tensors. The model cannot run."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                whole = gathered(parameter.detach())
                whole = whole.cpu() if processes.first else whole.to("meta")
                setattr(module, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules to shard individually. A decoder layer calls each exactly once, for any tokens."""
    for index, layer in enumerate(decoder(model).layers):
        yield from (target.module for target in layer_targets(model, index)[0])
        for path, module in layer.named_modules():
            if path.split(".")[-1] == "experts" and next(module.parameters(recurse=False), None) is not None:
                yield module
