"""Linears of vLLM without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from grasp.method.storage import Storage
from grasp.serving.vllm import GraspLinearMethod, GraspVllmConfig

HIDDEN, HEAD = 24, 8
WIDTHS = {"q": 4 * HEAD, "k": 2 * HEAD, "v": 2 * HEAD}  # four heads of queries, two of keys and values
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def linear(kind: type[LinearBase], rank: int = 0, processes: int = 1, kv_replicas: int = 1) -> LinearBase:
    """A linear of vLLM in process ``rank``, without the parts for which vLLM must have started its processes."""
    layer = object.__new__(kind)
    nn.Module.__init__(layer)
    layer.tp_rank, layer.tp_size, layer.num_kv_head_replicas = rank, processes, kv_replicas
    layer.skip_bias_add, layer.bias = False, None
    return layer


def method_for(
    layer: LinearBase,
    path: str,
    ranks: dict[str, int],
    inputs: int,
    outputs: list[int],
    pivoted: Sequence[str] = (),
    quantized: dict[str, Storage] | None = None,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, int]] | None = None,
) -> Any:
    """The method that the plugin gives to a linear with ``inputs`` local columns, with weights made."""
    config = GraspVllmConfig(ranks, pivoted, quantized, shapes)
    config.packed_modules_mapping = PACKED
    method = config.get_quant_method(layer, path)
    assert isinstance(method, GraspLinearMethod)
    columns = inputs * layer.tp_size if isinstance(layer, RowParallelLinear) else inputs
    method.create_weights(layer, inputs, outputs, columns, sum(outputs), dtype)
    return method


def load(layer: LinearBase, name: str, tensor: Tensor, shard: object = None) -> None:
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
