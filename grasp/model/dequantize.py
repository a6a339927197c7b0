"""Turns low-rank and quantised modules back into the dense floating modules of an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from grasp.errors import CheckpointError
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QUANTIZED, QuantizedEmbedding, QuantizedModule
from grasp.model.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize_(model: PreTrainedModel) -> None:
    """Replace every low-rank and quantised module by the module that the architecture has there, in the same dtype.

    Raises:
        CheckpointError: if weights are offloaded or split, or the configuration does not describe the model.
    """
    originals = dict(skeleton(model.config, type(model)).named_modules())
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, (LowRankLinear, *QUANTIZED)):
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
    group_linears_(model, enabled=False)  # the MLPs get their own classes again
    ties = getattr(model, "all_tied_weights_keys", {})
    for key in [key for key in ties if key.endswith("_scales")]:
        del ties[key]
    model.tie_weights()


def _place(parameter: nn.Parameter) -> str | None:
    """Where a parameter is that cannot be read here."""
    return "offloaded" if parameter.is_meta else "split over processes" if isinstance(parameter, DTensor) else None


@torch.no_grad()
def _with_weight_of(layer: LowRankLinear | QuantizedModule, dense: nn.Module) -> nn.Module:
    """``dense``, a module without data, with the weight of ``layer``."""
    like = next(p for p in layer.parameters() if p.is_floating_point() and p.dtype != torch.float8_e4m3fn)
    dense = dense.to(like.dtype).to_empty(device=like.device).train(layer.training)
    weight = layer.dense_weight()
    dense.get_parameter("weight").copy_(weight.mT if isinstance(dense, Conv1D) else weight)
    if (bias := getattr(layer, "bias", None)) is not None:
        dense.get_parameter("bias").copy_(bias)
    for buffer in dense.buffers():  # of Gemma's embeddings
        buffer.fill_(float(dense.scalar_embed_scale))  # type: ignore[arg-type]
    return dense
