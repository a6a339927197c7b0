"""Tiny models with low-rank layers, and comparisons of models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.model.grouping import group_linears_
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from tests.tiny_models import tiny_batches, tiny_model


class Attention(nn.Module):
    """Three linears of one input, with their outputs side by side."""

    def __init__(self, q: LowRankLinear, k: LowRankLinear, v: LowRankLinear) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    @property
    def layers(self) -> list[LowRankLinear]:
        return [self.q_proj, self.k_proj, self.v_proj]


def lowrank_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    layers: Collection[int] = (1, 2),
    pivoted: Collection[int] = (),
    **overrides: Any,
) -> PreTrainedModel:
    """A model with some low-rank layers, some of them pivoted; the modules have different ranks."""
    model = tiny_model(family, **overrides)
    if dtype != torch.float32:  # like a loaded checkpoint of that dtype: rotary frequencies stay in fp32
        model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype)
    for layer in layers:
        for number, target in enumerate(layer_targets(model, layer)[0]):
            low_rank = LowRankLinear.from_dense(model.get_submodule(target.name), torch.arange(3 + layer + number))
            model.set_submodule(target.name, low_rank)
            assert layer not in pivoted or low_rank.pivot_() is None
    return model


def compressed_model(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A ``lowrank_model`` that is marked and grouped as ``compress_`` does it."""
    model = lowrank_model(family, dtype, **options)
    mark_compressed(model)
    group_linears_(model)
    return model


def pivoted_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A Qwen2, whose q, k and v have biases, with low-rank layers 1 and 2; those of layer 1 are pivoted."""
    return compressed_model("qwen2", dtype, pivoted=(1,))


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tiny_batches(1)[0]).logits


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == {n: (t.dtype, t.shape) for n, t in wanted.items()}
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
