"""Weights that accelerate stores on the CPU or on disk and fetches when a module runs (``device_map="auto"``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

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

    def watch(module: nn.Module) -> ExitStack:
        hook, undo = _hook(module), ExitStack()
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
        undo.callback(delattr, hook, "pre_forward")
        undo.callback(delattr, hook, "post_forward")
        return undo

    def pack(tensor: Tensor) -> Tensor | _Stored:
        hook, name, nbytes = present.get(tensor.untyped_storage().data_ptr(), (None, "", -1))
        if nbytes != tensor.untyped_storage().nbytes():
            return tensor
        return _Stored(hook, name, tensor.dtype, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(packed: Tensor | _Stored) -> Tensor:
        return packed.fetch() if isinstance(packed, _Stored) else packed

    with ExitStack() as stack:
        for module in offloaded:
            stack.enter_context(watch(module))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield
