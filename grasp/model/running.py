"""Run parts of a model: skip layers, start at a layer, run in another dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.model.batch import CalibrationBatch
from grasp.model.hooks import forwarding, hooked
from grasp.model.offload import execution_device
from grasp.model.targets import decoder

if TYPE_CHECKING:
    from grasp.model.batch import Tokens


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer, (B, L, H)."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output: Any) -> Tensor:
    """The hidden states that a decoder layer returned, (B, L, H): the output, or its first item if it is a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def passing_through(layers: Sequence[nn.Module], length: int) -> Iterator[None]:
    """Make decoder layers return their input until the block ends; the model still computes masks and positions.

    Args:
        layers: of the decoder.
        length: of the tuple that they return, 0 for a tensor; what follows the hidden states is ``None``.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        return (hidden, *[None] * (length - 1)) if length else hidden

    with forwarding(layers, forward):
        yield


@contextmanager
def entering_with(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Pass ``hidden`` to a decoder layer in place of its hidden states until the block ends."""

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        value = hidden.to(hidden_input(args, kwargs).device)
        if args:
            return (value, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value}

    with hooked(layer, before=substitute):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode and freeze all parameters until the block ends; a module inserted meanwhile keeps its own state."""
    training = {module: module.training for module in model.modules()}
    frozen = [
        (module, name, parameter, parameter.requires_grad)
        for module in training
        for name, parameter in module.named_parameters(recurse=False)
    ]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for module, name, parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
            module.get_parameter(name).requires_grad_(requires_grad)  # offloading may have replaced it


@contextmanager
def casting(model: nn.Module, dtype: str | None, *, without: Collection[nn.Module] = ()) -> Iterator[None]:
    """Cast a model to another dtype until the block ends, then restore its weights bit for bit.

    An offloaded weight is cast each time that it is fetched.

    Args:
        model: changed in place.
        dtype: such as ``"bfloat16"``; ``None`` does not cast.
        without: modules that are not cast, with all modules in them. They may not run.

    Raises:
        UnsupportedModelError: if weights are sharded.
    """
    if dtype is None:
        yield
        return
    target = getattr(torch, dtype)
    left = {module for parent in without for module in parent.modules()}
    cast = [
        (module, name, parameter)
        for module in model.modules()
        if module not in left
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and parameter.dtype != target
    ]
    if any(isinstance(parameter, DTensor) for _, _, parameter in cast):
        raise UnsupportedModelError(
            f"sweep_dtype={dtype!r} needs whole weights, but some are sharded; leave sweep_dtype out and load the "
            f"model with from_pretrained(..., dtype={dtype!r})"
        )
    saved = {parameter: parameter.data for _, _, parameter in cast}
    try:
        for parameter, data in saved.items():
            parameter.data = data.to(target)
        yield
    finally:
        for module, name, parameter in cast:
            data = parameter.data = saved[parameter]
            if data.is_meta:  # offloaded: its parameter was replaced when it was fetched
                module.get_parameter(name).data = data


def batch_inputs(model: nn.Module, batch: Tokens) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass over a batch, on the device of the model's first parameter."""
    device = first_device(model)
    inputs = {"input_ids": batch.input_ids.to(device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask.to(device, torch.int64)
    return inputs


def run_backbone(model: PreTrainedModel, batch: Tokens) -> None:
    """Run a model without its head on a batch, for what hooks on its modules do."""
    model.base_model(**batch_inputs(model, batch), use_cache=False)


def first_device(model: nn.Module) -> torch.device:
    """The device where token ids go: of the first parameter in memory, or where the first offloaded module runs."""
    for module in model.modules():
        if has_offloaded_params(module):
            return execution_device(module)
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


@torch.no_grad()
def tuple_length(model: PreTrainedModel, batch: CalibrationBatch) -> int:
    """The length of the tuple that decoder layers return, 0 for a tensor; the first one runs two tokens to see it."""
    outputs: list[Any] = []
    first, *others = decoder(model).layers

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs.append(output)

    probe = CalibrationBatch(batch.input_ids[:1, :2], None)
    with hooked(first, after=note), forwarding(others, lambda *_, **__: outputs[0]), evaluating(model):
        run_backbone(model, probe)
    return len(outputs[0]) if isinstance(outputs[0], tuple) else 0
