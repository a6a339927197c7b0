"""Weights that are elsewhere until a module runs: on the CPU or on disk (accelerate), or sharded (FSDP2 of PyTorch)."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    align_module_device,
    has_offloaded_params,
    offload_weight,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from grasp.errors import UnsupportedModelError


def fetched(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, detached; an offloaded one is fetched to the device where the module runs.

    Raises:
        UnsupportedModelError: if it is on the meta device and accelerate did not offload it.
    """
    with align_module_device(module):
        tensor = module.get_parameter(name).detach()
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"the {name} of a {type(module).__name__} is on the meta device, and accelerate has no data for it; "
            "load the model with from_pretrained, or dispatch it with accelerate"
        )
    return tensor


def execution_device(module: nn.Module) -> torch.device:
    """The device where a module with a ``weight`` runs, also if the weight is offloaded."""
    if has_offloaded_params(module):
        return torch.device(_hook(module).execution_device)
    return module.get_parameter("weight").device


def is_fetched_per_call(module: nn.Module) -> bool:
    """Whether the parameters of a module are on its device only while it runs: they are offloaded or sharded."""
    return isinstance(module, FSDPModule) or has_offloaded_params(module)


def fetched_bytes(model: nn.Module) -> int:
    """The most bytes that the parameters of a module take while it runs, and their copy on the way; 0 if in memory."""
    modules = (module for module in model.modules() if is_fetched_per_call(module))
    return 2 * max(
        (sum(p.numel() * p.itemsize for p in module.parameters(recurse=False)) for module in modules), default=0
    )


def shard_module_(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of one module, but not its bias, with FSDP2. It gathers them in each call."""
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=None if bias is None else {bias})


def place_like(module: nn.Module, dense: nn.Module) -> None:
    """Store the parameters of a module in the way of another: in memory, sharded, or offloaded to the CPU or to disk.

    Parameters are offloaded to the folder of the other module, whose files stay, or to a temporary folder if it has
    none.

    Args:
        module: with its own parameters on the device where ``dense`` runs; they may not be set afterwards. If ``dense``
            is sharded, all processes call this with the same values.
        dense: not released yet.
    """
    weight = dense.get_parameter("weight")
    if isinstance(weight, DTensor):
        shard_module_(module, weight.device_mesh)
    elif has_offloaded_params(dense):
        hook = _hook(dense)
        stored = _stored_beside(hook.weights_map, module)  # None: the new hook keeps them in CPU memory
        add_hook_to_module(
            module, AlignDevicesHook(hook.execution_device, offload=True, weights_map=stored, skip_keys=hook.skip_keys)
        )


def release_(linear: nn.Module) -> None:
    """Free the weight of a linear that was replaced; a meta tensor of its shape and dtype takes its place.

    The memory is freed although others refer to the parameter. Files of offloaded weights stay.
    """
    weight = linear.get_parameter("weight")
    meta = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    if isinstance(weight, DTensor):
        weight.to_local().untyped_storage().resize_(0)
    elif has_offloaded_params(linear):
        weights, key = _hook(linear).weights_map, "weight"
        if isinstance(weights, PrefixedDataset):
            weights, key = weights.dataset, f"{weights.prefix}{key}"
        (weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights).pop(key, None)
    else:
        weight.data = weight.new_empty(0)
    linear.register_parameter("weight", nn.Parameter(meta, requires_grad=weight.requires_grad))


def _stored_beside(weights: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor] | None:
    """The parameters of a module, written to the folder of offloaded weights; ``None`` if these are in CPU memory.

    If one of the names is taken there, they get a folder of their own in it: a model may be dispatched from it again.
    """
    if not isinstance(weights, PrefixedDataset) or not isinstance(loader := weights.dataset, OffloadedWeightsLoader):
        return None
    if f"{weights.prefix}weight" in loader.state_dict:
        return None
    parameters = {f"{weights.prefix}{name}": value.detach() for name, value in module.named_parameters(recurse=False)}
    folder = loader.save_folder  # None: the weights are read from the checkpoint
    if folder is not None and any(Path(folder, f"{name}.dat").exists() for name in parameters):
        outer, loader = loader, OffloadedWeightsLoader(index={})
        loader.outer = outer  # whose end removes its folder with all that is in it
    if loader.save_folder is None:
        loader.save_folder = tempfile.mkdtemp(prefix="grasp-offload-", dir=folder)
        weakref.finalize(loader, shutil.rmtree, loader.save_folder, ignore_errors=True)
    for name, parameter in parameters.items():
        offload_weight(parameter, name, loader.save_folder, index=loader.index)
    return PrefixedDataset(loader, weights.prefix)


def _hook(module: nn.Module) -> Any:
    return module._hf_hook


class _Stored(NamedTuple):
    """A reference to an offloaded weight, or to a view of it, that can be fetched again."""

    hook: Any  # accelerate's AlignDevicesHook
    name: str
    dtype: torch.dtype
    view: tuple[Any, ...]  # size, stride, offset

    def fetch(self) -> Tensor:
        value: Tensor = self.hook.weights_map[self.name]
        return value.to(self.hook.execution_device, self.dtype).as_strided(*self.view)


@contextmanager
def fetching_again(model: nn.Module) -> Iterator[None]:
    """Keep fetched weights out of autograd graphs: the backward pass fetches each one again.

    Otherwise the graph of a forward pass holds all offloaded weights on a device that has no room for them.
    """
    offloaded = [module for module in model.modules() if has_offloaded_params(module)]
    if not offloaded:
        yield
        return
    present: dict[int, tuple[Any, str, int]] = {}  # address of a fetched weight → its hook, name and bytes

    def watch(module: nn.Module, stack: ExitStack) -> None:
        hook = _hook(module)
        pre_forward, post_forward = hook.pre_forward, hook.post_forward

        def fetch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = pre_forward(module, *args, **kwargs)
            for name, parameter in module.named_parameters(recurse=False):
                present[parameter.data_ptr()] = (hook, name, parameter.nbytes)
            return result

        def release(module: nn.Module, output: Any) -> Any:
            for parameter in module.parameters(recurse=False):
                present.pop(parameter.data_ptr(), None)
            return post_forward(module, output)

        hook.pre_forward, hook.post_forward = fetch, release
        stack.callback(delattr, hook, "pre_forward")
        stack.callback(delattr, hook, "post_forward")

    def pack(tensor: Tensor) -> Tensor | _Stored:
        hook, name, nbytes = present.get(tensor.untyped_storage().data_ptr(), (None, "", -1))
        if nbytes != tensor.untyped_storage().nbytes():
            return tensor
        return _Stored(hook, name, tensor.dtype, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(packed: Tensor | _Stored) -> Tensor:
        return packed.fetch() if isinstance(packed, _Stored) else packed

    with ExitStack() as stack:
        for module in offloaded:
            watch(module, stack)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield
