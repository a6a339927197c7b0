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

from grasp.method.least_squares import linear_map
from grasp.model.batch import CalibrationBatch
from grasp.model.hooks import hooked
from grasp.model.last_added import last_added, merge_map_
from grasp.model.layer_removal import remove_layers_
from grasp.model.running import casting, evaluating, hidden_input, hidden_output, run_backbone
from grasp.model.targets import decoder
from grasp.statistics.redundancy import cosine_distance

LINEAR_REPLACEMENT = "linear replacement"  # the method's name in the cells of a study


class Streams(NamedTuple):
    """Hidden states of the dense model on the calibration tokens, (T, H) each."""

    hidden: list[Tensor]  # inputs of all layers, and the output of the last layer
    added: list[Tensor]  # the last summand that each layer adds to them


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
            run_backbone(model, batch)
            done += batch.input_ids.numel()
    return Streams([hidden[index] for index in range(len(layers) + 1)], [added[index] for index in range(len(layers))])


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
    if last.linear is not None:
        merge_map_(model, last.linear, T)
        return
    module = model.get_submodule(last.module)
    like = next(module.parameters())
    map_ = nn.Linear(len(T), len(T), bias=False, device=like.device, dtype=like.dtype)
    map_.weight.copy_(T)
    model.set_submodule(last.module, nn.Sequential(module, map_))


@torch.no_grad()
def replace_block_(model: PreTrainedModel, streams: Streams, count: int) -> tuple[int, ...]:
    """Replace the block of ``count`` layers by a map in the layer before it; returns the removed layers.

    That layer returns r + y, where y is its last summand. The map sends y to the block's output minus r.
    """
    first = choose_block(streams.hidden, count)
    y = streams.added[first - 1].double()
    z = streams.hidden[first + count].double() - streams.hidden[first].double() + y
    apply_map_(model, first - 1, linear_map(y.mT @ y, z.mT @ y))
    removed = tuple(range(first, first + count))
    remove_layers_(model, removed)
    return removed
