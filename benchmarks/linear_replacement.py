"""A baseline: a contiguous block of layers gives way to one linear map, merged into the linear before it.

Own implementation of the idea of ReplaceMe (arXiv 2505.02819): the map is fitted by least squares on hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.architecture import (
    Target,
    backbone,
    batch_inputs,
    casting,
    decoder,
    evaluating,
    hidden_input,
    hidden_output,
    layer_targets,
)
from grasp.calibration import CalibrationBatch
from grasp.errors import UnsupportedModelError
from grasp.modules import dense_weight
from grasp.redundancy import cosine_distance
from grasp.removal import remove_layers_

RIDGE = 1e-3  # of the mean diagonal of Σ y yᵀ: how strongly the map is held at the identity


class Streams(NamedTuple):
    """What the layers of the dense model make of the calibration tokens, (T, H) each."""

    hidden: list[Tensor]  # what enters each layer, and what leaves the last
    added: list[Tensor]  # what each layer's last MLP linear returns


def last_linear(model: PreTrainedModel, layer: int) -> Target:
    """The linear whose output an MLP adds to the hidden states.

    Raises:
        UnsupportedModelError: if something else, such as a norm, comes between it and the hidden states.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    found = [t for t in layer_targets(model, layer)[0] if t.block == "mlp" and dense_weight(t.module).shape[0] == width]
    if not found:
        raise UnsupportedModelError(f"layer {layer} has no dense MLP linear that returns hidden states")
    return found[-1]


@torch.no_grad()
def capture_streams(model: PreTrainedModel, batches: Sequence[CalibrationBatch], dtype: str | None = None) -> Streams:
    """One forward pass of the calibration tokens, which have no padding."""
    layers = decoder(model).layers
    hidden: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    added: list[list[Tensor]] = [[] for _ in layers]

    def note_layer(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden[index].append(hidden_input(args, kwargs).flatten(0, -2).clone())
            if index + 1 == len(layers):
                hidden[-1].append(hidden_output(output).flatten(0, -2).clone())

        return hook

    def note_linear(index: int) -> Any:
        return lambda _, args, output: added[index].append(output.flatten(0, -2).clone())

    handles = [layer.register_forward_hook(note_layer(i), with_kwargs=True) for i, layer in enumerate(layers)]
    linears = [last_linear(model, i).module for i in range(len(layers))]
    handles += [linear.register_forward_hook(note_linear(i)) for i, linear in enumerate(linears)]
    try:
        with evaluating(model), casting(model, dtype):
            for batch in batches:
                backbone(model)(**batch_inputs(model, batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Streams([torch.cat(parts) for parts in hidden], [torch.cat(parts) for parts in added])


def linear_map(added: Tensor, wanted: Tensor) -> Tensor:
    """The T that minimises ``Σ ‖T y − z‖² + λ ‖T − 1‖²``, (H, H) fp64, for rows y of ``added`` and z of ``wanted``."""
    y, z = added.double(), wanted.double()
    gram = y.mT @ y
    one = torch.eye(len(gram), dtype=gram.dtype)
    ridge = RIDGE * gram.diagonal().mean() * one
    return torch.linalg.solve(gram + ridge, z.mT @ y + ridge, left=False)


def choose_block(hidden: Sequence[Tensor], count: int) -> int:
    """The first of ``count`` consecutive layers that turn the hidden states least, by mean angle; never layer 0."""

    def angle(first: int) -> float:
        cosine = 1 - cosine_distance(hidden[first], hidden[first + count])
        return float(cosine.clamp(-1, 1).acos().mean()) / math.pi

    return min(range(1, len(hidden) - count), key=angle)


@torch.no_grad()
def replace_block_(model: PreTrainedModel, streams: Streams, count: int) -> tuple[int, ...]:
    """Remove the block of ``count`` layers and let the MLP before it make up for them; the layers that are gone.

    With r the hidden states that this MLP adds its output y to, the map sends y to the block's output less r.
    """
    first = choose_block(streams.hidden, count)
    linear = last_linear(model, first - 1)
    added = streams.added[first - 1].double()
    before = streams.hidden[first].double() - added
    T = linear_map(added, streams.hidden[first + count].double() - before)
    weight = dense_weight(linear.module)  # a view, also of GPT-2's, which are stored the other way round
    weight.copy_(T @ weight.double())
    if linear.module.bias is not None:
        linear.module.bias.copy_(T @ linear.module.bias.double())
    gone = tuple(range(first, first + count))
    remove_layers_(model, gone)
    return gone


@torch.no_grad()
def require_added(model: PreTrainedModel, batch: CalibrationBatch) -> None:
    """Raise unless a layer's output is what its last MLP linear returns, plus something: with a norm between, no map
    of that linear's output is a map of the layer's.
    """
    linear, outputs = last_linear(model, 0).module, list[Tensor]()
    shift = torch.zeros(dense_weight(linear).shape[0])
    keep = decoder(model).layers[0].register_forward_hook(lambda *call: outputs.append(hidden_output(call[2])))
    move = linear.register_forward_hook(lambda _, args, output: output + shift.to(output.dtype))
    probe = CalibrationBatch(batch.input_ids[:1, :8], None)
    try:
        with evaluating(model):
            backbone(model)(**batch_inputs(model, probe), use_cache=False)
            shift[0] = float(outputs[0].abs().max())
            backbone(model)(**batch_inputs(model, probe), use_cache=False)
    finally:
        keep.remove()
        move.remove()
    if not torch.allclose(outputs[1] - outputs[0], shift.expand_as(outputs[0]), atol=1e-3 * float(shift[0])):
        raise UnsupportedModelError(
            f"something comes between the MLPs of {type(model).__name__} and its hidden states, so that no linear map "
            "can be merged into them; leave this method out"
        )
