"""Turns low-rank, quantised and narrowed modules back into the dense floating modules of an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Conv1D

from grasp.errors import CheckpointError
from grasp.model.dense import dense_weight
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import mark_narrowed, narrowed_mlps, narrowed_shapes
from grasp.model.quantized_linear import QUANTIZED, QuantizedEmbedding
from grasp.model.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize_(model: PreTrainedModel) -> None:
    """Replace every low-rank, quantised and narrowed module by that of the architecture, in the same dtype.

    Channels that a narrowed MLP lacks come last, and are 0.

    Raises:
        CheckpointError: if weights are offloaded or split, or the configuration does not describe the model.
    """
    originals = dict(skeleton(model.config, type(model)).named_modules())
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    narrowed = narrowed_shapes(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, (LowRankLinear, *QUANTIZED)) and name not in narrowed:
            continue
        if place := next(filter(None, map(_place, layer.parameters())), None):
            raise CheckpointError(f"{name} is {place}; load the model on one device to dequantize it")
        is_embedding = isinstance(layer, QuantizedEmbedding)
        if not isinstance(dense := originals.get(name), nn.Embedding if is_embedding else (nn.Linear, Conv1D)):
            raise CheckpointError(
                f"{name} is not {'an embedding' if is_embedding else 'a linear layer'} in the model that model.config "
                "describes; make model.config fit the model, num_hidden_layers in particular"
            )
        dense = _with_weight_of(layer, dense)
        wanted = layer.U.requires_grad if isinstance(layer, LowRankLinear) else trainable
        model.set_submodule(name, dense.requires_grad_(wanted))
    for _, mlp in narrowed_mlps(model):
        mark_narrowed(mlp, False)
    group_linears_(model, enabled=False)  # the MLPs get their own classes again
    ties = getattr(model, "all_tied_weights_keys", {})
    for key in [key for key in ties if key.endswith("_scales")]:
        del ties[key]
    model.tie_weights()


def _place(parameter: nn.Parameter) -> str | None:
    """Where a parameter is that cannot be read here."""
    return "offloaded" if parameter.is_meta else "split over processes" if isinstance(parameter, DTensor) else None


@torch.no_grad()
def _with_weight_of(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """``dense``, a module without data, with the weight of ``layer``, which may have fewer rows and columns."""
    like = next(p for p in layer.parameters() if p.is_floating_point() and p.dtype != torch.float8_e4m3fn)
    dense = dense.to(like.dtype).to_empty(device=like.device).train(layer.training)
    weight = dense_weight(layer) if isinstance(layer, (nn.Linear, Conv1D)) else layer.dense_weight()  # type: ignore[operator]
    _fill_(dense.get_parameter("weight"), weight.mT if isinstance(dense, Conv1D) else weight)
    if (bias := getattr(layer, "bias", None)) is not None:
        _fill_(dense.get_parameter("bias"), bias)
    for buffer in dense.buffers():  # of Gemma's embeddings
        buffer.fill_(float(dense.scalar_embed_scale))  # type: ignore[arg-type]
    return dense


def _fill_(whole: Tensor, part: Tensor) -> None:
    """Set the first entries along each dimension, and the others to 0."""
    whole.zero_()
    whole[tuple(map(slice, part.shape))] = part
