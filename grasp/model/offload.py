"""Weights that accelerate keeps on the CPU or on disk, and fetches when a module runs (``device_map="auto"``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from grasp.errors import UnsupportedModelError


def fetched(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, detached; one that is offloaded is fetched to where the module runs.

    Raises:
        UnsupportedModelError: if it has no data, and no hook of accelerate knows where they are.
    """
    with align_module_device(module):
        tensor = module.get_parameter(name).detach()
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"the {name} of a {type(module).__name__} is on the meta device, and nothing says where its data are; "
            "load the model with from_pretrained, or dispatch it with accelerate"
        )
    return tensor


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with a ``weight`` runs, wherever that is kept."""
    if has_offloaded_params(module):
        return torch.device(_hook(module).execution_device)
    return module.get_parameter("weight").device


def _hook(module: nn.Module) -> Any:
    return module._hf_hook


class _Stored(NamedTuple):
    """How to get a fetched weight, or a view of it, again."""

    hook: Any  # accelerate's AlignDevicesHook
    name: str
    dtype: torch.dtype
    view: tuple[Any, ...]  # size, stride, offset

    def fetch(self) -> Tensor:
        value: Tensor = self.hook.weights_map[self.name]
        return value.to(self.hook.execution_device, self.dtype).as_strided(*self.view)


@contextmanager
def fetching_again(model: nn.Module) -> Iterator[None]:
    """Let no graph hold weights that were fetched: the backward pass fetches them again, one by one.

    Without this a forward pass with gradients would keep all weights that accelerate offloads, on the device on which
    there is no room for them.
    """
    offloaded = [module for module in model.modules() if has_offloaded_params(module)]
    if not offloaded:
        yield
        return
    present: dict[int, tuple[Any, str, int]] = {}  # address → what is fetched there, and its bytes

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
        found = present.get(tensor.untyped_storage().data_ptr())
        if found is None or found[2] != tensor.untyped_storage().nbytes():
            return tensor
        return _Stored(*found[:2], tensor.dtype, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(packed: Tensor | _Stored) -> Tensor:
        return packed.fetch() if isinstance(packed, _Stored) else packed

    with ExitStack() as stack:
        for module in offloaded:
            stack.enter_context(watch(module))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield
