from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, GraniteConfig, GraniteForCausalLM

from grasp.errors import UnsupportedModelError
from grasp.model.last_added import last_added
from tests.model.test_layer_removal import PER_LAYER, random_model
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rounding_to_bf16_is_not_taken_for_another_sum(layer: int) -> None:
    last = last_added(tiny_model("gemma3", torch.bfloat16), layer)
    assert last.module == f"model.layers.{layer}.post_feedforward_layernorm"


def test_layers_whose_experts_return_scores_too_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GptOssConfig(
        vocab_size=97, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **sizes
    )
    with pytest.raises(UnsupportedModelError, match="does not return a tensor, so no linear map"):
        last_added(GptOssForCausalLM(config), 0)


def test_layers_that_scale_what_they_add_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GraniteConfig(vocab_size=97, num_key_value_heads=2, residual_multiplier=0.5, **sizes)
    model = GraniteForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="leave this method out"):
        last_added(model, 0)


def test_hidden_states_of_more_dimensions_are_refused() -> None:
    model = random_model("Gemma3nText", **PER_LAYER)
    with pytest.raises(UnsupportedModelError, match="have 4 dimensions, expected 3, so no linear map"):
        last_added(model, 0)
