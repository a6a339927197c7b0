"""The last summand of a decoder layer's output, and linear maps of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.method.blocks import fp64_device, to_double
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import DenseLinear, dense_shape, dense_weight
from grasp.model.hooks import hooked
from grasp.model.offload import fetched, place_like, release_
from grasp.model.running import evaluating, hidden_output, run_backbone
from grasp.model.targets import Target, decoder, layer_targets


class LastAdded(NamedTuple):
    """The module whose output a layer adds to the hidden states last: an MLP, or a norm after it."""

    module: str  # path in the model
    linear: Target | None  # the linear with the same output, if any


@torch.no_grad()
def last_added(model: PreTrainedModel, layer: int) -> LastAdded:
    """Find the module by running eight tokens.

    Raises:
        UnsupportedModelError: if the layer's output is not a sum with the output of its last child, a tensor.
    """
    block = decoder(model).layers[layer]
    outputs: dict[nn.Module, Any] = {}  # by module, in the order of their returns
    probe = CalibrationBatch(torch.arange(8)[None])

    def run() -> Tensor:
        outputs.clear()
        with evaluating(model):
            run_backbone(model, probe)
        return hidden_output(outputs[block])

    with hooked(*block.modules(), after=lambda m, args, kwargs, output: outputs.update({m: output})):
        before = run()
        if before.dim() != 3:
            raise UnsupportedModelError(
                f"the hidden states of {type(model).__name__} have {before.dim()} dimensions, expected 3, so no linear "
                "map of them can replace layers; leave this method out"
            )
        child = [module for module in outputs if module in set(block.children())][-1]
        added = outputs[child]
        if not isinstance(added, Tensor):  # a mixture of experts may return the scores of its router too
            raise UnsupportedModelError(
                f"the last module of the layers of {type(model).__name__} does not return a tensor, so no linear map "
                "of it can replace layers; leave this method out"
            )
        same = [
            target
            for target in layer_targets(model, layer)[0]
            if target.module in outputs and torch.equal(outputs[target.module], added)
        ]
        shift = torch.zeros_like(before[0, 0])
        shift[0] = before.abs().max()
        with hooked(child, after=lambda _, args, kwargs, output: output + shift):
            moved = run() - before
    name = f"{decoder(model).path}.{layer}.{next(name for name, m in block.named_children() if m is child)}"
    rounding = max(1e-3, 4 * torch.finfo(moved.dtype).eps)  # error of sums that are up to twice the shift
    if not torch.allclose(moved, shift.expand_as(moved), atol=rounding * float(shift[0])):
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} do not add the output of {name} to their hidden states, so no "
            "linear map of it can replace layers; leave this method out"
        )
    return LastAdded(name, same[-1] if same else None)


@torch.no_grad()
def merge_map_(model: PreTrainedModel, target: Target, T: Tensor) -> None:
    """Let a linear of N outputs return ``T y`` where it returns y; T is (N, N) fp64.

    A new linear takes its place, stored in the same way. The weight of the old one is freed.
    """
    linear, bias = target.module, None
    weight = dense_weight(linear)
    device = fp64_device(weight.device)
    T = to_double(T, device)
    merged = (T @ to_double(weight, device)).to(weight.dtype).to(weight.device)
    if linear.bias is not None:
        bias = fetched(linear, "bias")
        bias = (T @ to_double(bias, device)).to(bias.dtype).to(bias.device)
    module = _linear(linear, merged, bias)
    place_like(module, linear)
    model.set_submodule(target.name, module)
    release_(linear)


def _linear(like: DenseLinear, weight: Tensor, bias: Tensor | None) -> DenseLinear:
    """A linear of the same class with another weight, (N, K)."""
    n, k = dense_shape(like)
    with torch.device("meta"):
        module = Conv1D(n, k) if isinstance(like, Conv1D) else nn.Linear(k, n, bias=bias is not None)
    trains = like.weight.requires_grad
    values = weight.mT.contiguous() if isinstance(like, Conv1D) else weight
    module.weight = nn.Parameter(values, requires_grad=trains)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=like.bias.requires_grad)
    return module.train(like.training)
