from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from grasp.model.hf_quantizer import low_rank_in, mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.skeleton import skeleton
from tests.tiny_models import tiny_model


def test_the_skeleton_of_a_compressed_model_is_dense_and_has_no_data() -> None:
    model = tiny_model("llama")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.model.layers[1].mlp.up_proj = LowRankLinear.like(model.model.layers[1].mlp.up_proj, 4)
    mark_compressed(model)
    for build in (type(model), AutoModelForCausalLM.from_config):
        empty = skeleton(model.config, build)
        assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
        assert all(parameter.is_meta for parameter in empty.parameters())
    assert low_rank_in(model.config).ranks == {"model.layers.1.mlp.up_proj": 4}


def test_a_low_rank_linear_can_be_made_like_a_dense_one() -> None:
    dense = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16).eval()
    layer = LowRankLinear.like(dense, 2)
    assert (layer.in_features, layer.out_features, layer.rank, layer.bias) == (6, 4, 2, None)
    assert layer.U.dtype == torch.bfloat16
    assert not layer.training
    assert LowRankLinear.like(dense, 2, device="meta").U.is_meta
