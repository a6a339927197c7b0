"""A baseline: one linear map replaces a contiguous block of layers.

The map acts on the last output that the layer before the block adds to the hidden states, and is fitted by least
squares on hidden states. This is our own implementation of the idea of ReplaceMe (arXiv 2505.02819).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.hooks import hooked
from grasp.model.layer_removal import remove_layers_
from grasp.model.running import backbone, batch_inputs, casting, evaluating, hidden_input, hidden_output
from grasp.model.targets import Target, decoder, layer_targets
from grasp.statistics.redundancy import cosine_distance

LINEAR_REPLACEMENT = "linear replacement"  # the method's name in the cells of a study
RIDGE = 1e-3  # fraction of the mean diagonal of Σ y yᵀ; pulls the map towards the identity


class Streams(NamedTuple):
    """Hidden states of the dense model on the calibration tokens, (T, H) each."""

    hidden: list[Tensor]  # inputs of all layers, and the output of the last layer
    added: list[Tensor]  # the last summand that each layer adds to them


class LastAdded(NamedTuple):
    """The module whose output a layer adds to the hidden states last: an MLP, or a norm after it."""

    module: str  # path in the model
    linear: Target | None  # the linear with the same output, if any


@torch.no_grad()
def last_added(model: PreTrainedModel, layer: int) -> LastAdded:
    """Find the module by running eight tokens.

    Raises:
        UnsupportedModelError: if the layer's output is not a sum with the output of its last child.
    """
    block = decoder(model).layers[layer]
    outputs: dict[nn.Module, Any] = {}  # by module, in the order of their returns
    probe = batch_inputs(model, CalibrationBatch(torch.arange(8)[None], None))

    def run() -> Tensor:
        outputs.clear()
        with evaluating(model):
            backbone(model)(**probe, use_cache=False)
        return hidden_output(outputs[block])

    with hooked(*block.modules(), after=lambda m, args, kwargs, output: outputs.update({m: output})):
        before = run()
        child = [module for module in outputs if module in set(block.children())][-1]
        added = outputs[child]
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
def capture_streams(model: PreTrainedModel, batches: Sequence[CalibrationBatch], dtype: str | None = None) -> Streams:
    """Capture hidden states in one forward pass of the calibration tokens, which must have no padding.

    Raises:
        UnsupportedModelError: see ``last_added``.
    """
    layers = decoder(model).layers
    tokens, done = sum(batch.input_ids.numel() for batch in batches), 0
    hidden: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}

    def store(streams: dict[int, Tensor], index: int, states: Tensor) -> None:
        rows = states.flatten(0, -2)
        if index not in streams:
            streams[index] = rows.new_empty(tokens, rows.shape[1])
        streams[index][done : done + len(rows)] = rows

    indices = {layer: index for index, layer in enumerate(layers)}
    last = {model.get_submodule(last_added(model, index).module): index for index in indices.values()}

    def note_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        store(hidden, indices[layer], hidden_input(args, kwargs))
        if indices[layer] + 1 == len(layers):
            store(hidden, len(layers), hidden_output(output))

    def note_added(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        store(added, last[module], output)

    with evaluating(model), casting(model, dtype), hooked(*layers, after=note_layer), hooked(*last, after=note_added):
        for batch in batches:
            backbone(model)(**batch_inputs(model, batch), use_cache=False)
            done += batch.input_ids.numel()
    return Streams([hidden[index] for index in range(len(layers) + 1)], [added[index] for index in range(len(layers))])


def linear_map(added: Tensor, wanted: Tensor) -> Tensor:
    """The T that minimises ``Σ ‖T y − z‖² + λ ‖T − 1‖²``, (H, H) fp64, for rows y of ``added`` and z of ``wanted``."""
    y, z = added.double(), wanted.double()
    gram = y.mT @ y
    one = torch.eye(len(gram), dtype=gram.dtype)
    ridge = RIDGE * gram.diagonal().mean() * one
    return torch.linalg.solve(gram + ridge, z.mT @ y + ridge, left=False)


def choose_block(hidden: Sequence[Tensor], count: int) -> int:
    """First of the ``count`` layers that turn the hidden states by the least mean angle; never layer 0."""

    def angle(first: int) -> float:
        cosine = 1 - cosine_distance(hidden[first], hidden[first + count])
        return float(cosine.clamp(-1, 1).acos().mean()) / math.pi

    return min(range(1, len(hidden) - count), key=angle)


@torch.no_grad()
def apply_map_(model: PreTrainedModel, layer: int, T: Tensor) -> None:
    """Apply a map, (H, H) fp64, to the last summand of a layer: merged into its linear, or as a new linear."""
    last = last_added(model, layer)
    if last.linear is None:
        module = model.get_submodule(last.module)
        like = next(module.parameters())
        map_ = nn.Linear(len(T), len(T), bias=False, device=like.device, dtype=like.dtype)
        map_.weight.copy_(T)
        model.set_submodule(last.module, nn.Sequential(module, map_))
        return
    linear = last.linear.module
    weight = dense_weight(linear)  # a view; a transposed one for GPT-2
    weight.copy_(T @ weight.double())
    if linear.bias is not None:
        linear.bias.copy_(T @ linear.bias.double())


@torch.no_grad()
def replace_block_(model: PreTrainedModel, streams: Streams, count: int) -> tuple[int, ...]:
    """Replace the block of ``count`` layers by a map in the layer before it; returns the removed layers.

    That layer returns r + y, where y is its last summand. The map sends y to the block's output minus r.
    """
    first = choose_block(streams.hidden, count)
    added = streams.added[first - 1].double()
    before = streams.hidden[first].double() - added
    apply_map_(model, first - 1, linear_map(added, streams.hidden[first + count].double() - before))
    removed = tuple(range(first, first + count))
    remove_layers_(model, removed)
    return removed
