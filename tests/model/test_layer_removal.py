from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.compression.budget import find_prices
from grasp.compression.eligible import eligible_targets
from grasp.config import GraspConfig
from grasp.errors import UnsupportedModelError
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.layer_removal import can_remove, remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import passing_through
from grasp.model.targets import decoder
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_batches, tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "bos_token_id": 1,
    "eos_token_id": [2, 3, 4, 5],  # as many as there are layers
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
PER_LAYER: dict[str, Any] = {  # each layer has embeddings of its own
    **SIZES,
    "head_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "activation_sparsity_pattern": [0.0] * 4,
}
HYBRID: dict[str, Any] = {  # must have an attention layer
    **SIZES,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
SCALED_BY_INDEX: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "scale_attn_by_inverse_layer_idx": True,
}


def random_model(name: str, **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens() -> Tensor:
    return tiny_batches(1, batch_size=2, length=11)[0]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(tokens()).logits


@torch.no_grad()
def skipping(model: PreTrainedModel, layers: list[int]) -> Tensor:
    """The logits of the model if these layers return their input."""
    with passing_through([decoder(model).layers[i] for i in layers], length=0):
        return logits(model)


@torch.no_grad()
def greedy(model: PreTrainedModel, new_tokens: int = 14) -> Tensor:
    """Greedy decoding by definition: a forward pass over all previous tokens for every token."""
    sequence = tokens()
    for _ in range(new_tokens):
        sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return sequence


def generated(model: PreTrainedModel, new_tokens: int = 14) -> Tensor:
    return model.generate(
        tokens(), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )


def assert_whole(model: PreTrainedModel, folder: Path) -> None:
    """It decodes the same tokens with and without a KV cache, and plain transformers saves and loads it."""
    model.generation_config.eos_token_id = None
    assert torch.equal(generated(model), greedy(model))
    model.save_pretrained(folder)
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert reloaded.config.num_hidden_layers == len(decoder(model).layers)
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    # On some processors matrix products of equal weights at other addresses round differently, in Mixtral for example.
    torch.testing.assert_close(logits(reloaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[1], [2, 0]])
def test_the_result_is_a_complete_model_that_skips_those_layers(family: str, layers: list[int], tmp_path: Path) -> None:
    model = tiny_model(family)
    expected = skipping(model, layers)
    assert not torch.allclose(expected, logits(model), atol=1e-2)
    remove_layers_(model, layers)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert_whole(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("SmolLM3", {**SIZES, "no_rope_layers": [1, 0, 1, 0]}),
        ("Gemma2", {**SIZES, "head_dim": 8, "sliding_window": 4}),
        ("Qwen2Moe", {**EXPERTS, "mlp_only_layers": [2], "shared_expert_intermediate_size": 16}),
        ("GPTNeo", {"vocab_size": 97, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 4}),
        ("Bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
        ("Falcon", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}),
        ("Phi", SIZES),
    ],
)
def test_configuration_lists_follow_the_layers(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    extra = {"attention_types": [[["global", "local"], 2]]} if name == "GPTNeo" else {}
    model = random_model(name, **values, **extra)
    end_tokens = model.config.eos_token_id
    remove_layers_(model, [1])
    assert model.config.eos_token_id == end_tokens
    assert_whole(model, tmp_path)


def test_sliding_layers_stay_sliding() -> None:
    model = tiny_model("gemma3")
    remove_layers_(model, [0])
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.is_sliding for layer in decoder(model).layers] == [True, False]


@pytest.mark.parametrize(
    ("name", "values", "layer"),
    [("GPT2", SCALED_BY_INDEX, 0), ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}, 1)],
    ids=["scores scaled by the index", "experts in every other layer"],
)
def test_layers_that_depend_on_their_position_are_refused(name: str, values: dict[str, Any], layer: int) -> None:
    model = random_model(name, **values)
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(UnsupportedModelError, match=r"layer \d of \w+ cannot become layer \d: its \S+ is"):
        remove_layers_(model, [layer])
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("name", "values", "layer", "message"),
    [
        (
            "Gemma3nText",
            PER_LAYER,
            1,
            r"model\.embed_tokens_per_layer\.weight of Gemma3nForCausalLM has a part for each",
        ),
        (
            "OlmoHybrid",
            HYBRID,
            3,
            "the configuration of OlmoHybridForCausalLM cannot express this removal: .*attention",
        ),
    ],
    ids=["embeddings for each layer", "a rule for its layers"],
)
def test_what_the_configuration_cannot_express_is_refused_and_no_candidate(
    name: str, values: dict[str, Any], layer: int, message: str
) -> None:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    model = random_model(name, **values)
    before = logits(model)
    assert not can_remove(model, [layer])
    with pytest.raises(UnsupportedModelError, match=message):
        remove_layers_(model, [layer])
    assert torch.equal(logits(model), before)


def test_layers_that_depend_on_their_position_can_be_removed_from_the_end(tmp_path: Path) -> None:
    model = random_model("GPT2", **SCALED_BY_INDEX)
    remove_layers_(model, [2])
    assert_whole(model, tmp_path)


def test_a_compressed_model_stays_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.up_proj"
        model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(2 + layer)))
    mark_compressed(model)
    expected = skipping(model, [1])
    remove_layers_(model, [1])
    assert model.config.quantization_config.ranks == {"model.layers.1.mlp.up_proj": 4}
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert_whole(model, tmp_path)


def test_nothing_to_remove_changes_nothing() -> None:
    model = tiny_model("llama")
    before, config = logits(model), model.config.to_dict()
    remove_layers_(model, [])
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], r"layers 0\.\.2; cannot remove \[3\]"),
        ([0, -1], r"layers 0\.\.2; cannot remove \[-1\]"),
        ([1, 1], r"once; got \[1, 1\]"),
        ([0, 1, 2], "all 3 decoder layers"),
    ],
)
def test_impossible_layers_are_refused_and_change_nothing(layers: list[int], message: str) -> None:
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        remove_layers_(model, layers)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("name", "values", "most"),
    [
        ("Qwen3Moe", {**EXPERTS, "num_hidden_layers": 4}, "removing 3 of 4 layers"),
        ("MiniMax", {**SIZES, "num_local_experts": 8}, "rank 1 in every eligible matrix"),
    ],
    ids=["layers like each other", "layers that know their number"],
)
def test_layers_that_cannot_be_removed_reach_no_target(name: str, values: dict[str, Any], most: str) -> None:
    model = random_model(name, **values)
    config, targets = GraspConfig.best(target_bytes=1000), eligible_targets(model)[0]
    with pytest.raises(ValueError, match=f"target_bytes=1000 cannot be reached: {most} gives"):
        find_prices(config, model, targets, may_remove=True)
