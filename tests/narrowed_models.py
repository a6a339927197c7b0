"""Models of which an MLP has lost channels."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import narrow_mlp_
from tests.tiny_models import tiny_model

MLP = "model.layers.1.mlp"
CHANNELS = torch.arange(0, 32, 2)


def narrowed_model(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A model with half of the channels in the MLP of layer 1; its gate has low rank there, the others are dense."""
    model = tiny_model(family, **overrides)
    mlp = model.get_submodule(MLP)
    narrow_mlp_(mlp, CHANNELS, mlp.down_proj.weight[:, CHANNELS])
    model.set_submodule(f"{MLP}.gate_proj", LowRankLinear.from_dense(mlp.gate_proj, torch.arange(3)))
    mark_compressed(model)
    return model
