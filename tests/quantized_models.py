"""Tiny models with quantised modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp.compression.quantize import quantize_
from grasp.method.storage import STORAGES, Storage
from grasp.model.quantized_linear import QuantizedModule, quantized_like
from tests.lowrank_models import lowrank_model


def random_like(module: nn.Module, storage: Storage) -> QuantizedModule:
    """A quantised module in place of another one, with random values."""
    layer = quantized_like(module, storage)
    assert layer is not None
    generator = torch.Generator().manual_seed(0)
    for name in layer.counts:
        layer.get_parameter(name).random_(generator=generator)
        layer.get_parameter(f"{name}_scales").fill_(2.0**-10)
    return layer.eval()


def quantized_model(
    family: str = "llama",
    storage: str = "int8",
    dtype: torch.dtype = torch.float32,
    *,
    low_rank: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """A model rounded to nearest, embeddings and output layer too; layer 1 is low-rank, and layer 2 pivoted."""
    model = lowrank_model(family, dtype, layers=(1, 2) if low_rank else (), pivoted=(2,), **overrides)
    quantize_(model, STORAGES[storage])
    return model
