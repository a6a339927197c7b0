from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import UnsupportedModelError
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import entering_with, evaluating, hidden_output, passing_through
from grasp.model.targets import decoder, layer_targets
from tests.tiny_models import DENSE_FAMILIES, FAMILIES, tiny_batches, tiny_model

LLAMA_LINEARS = {
    "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    "mlp": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
}
LINEARS = {
    "llama": LLAMA_LINEARS,
    "mistral": LLAMA_LINEARS,
    "qwen2": LLAMA_LINEARS,
    "qwen3": LLAMA_LINEARS,
    "gemma3": LLAMA_LINEARS,
    "gpt2": {"attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"}},
    "gpt_neox": {
        "attention": {"attention.query_key_value", "attention.dense"},
        "mlp": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    },
    "opt": {
        "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
        "mlp": {"fc1", "fc2"},
    },
    "phi3": {
        "attention": {"self_attn.qkv_proj", "self_attn.o_proj"},
        "mlp": {"mlp.gate_up_proj", "mlp.down_proj"},
    },
}


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_every_linear_of_a_layer_is_a_target_in_its_block(family: str) -> None:
    model = tiny_model(family)
    layers, _, family_row = decoder(model)
    assert len(layers) == 3
    targets, left = layer_targets(model, 1)
    assert left == {}
    for block, names in LINEARS[family].items():
        assert {t.name for t in targets if t.block == block} == {f"{family_row.layers}.1.{name}" for name in names}
    assert all(model.get_submodule(target.name) is target.module and target.layer == 1 for target in targets)


def test_a_model_without_a_final_norm_is_compressed() -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    assert decoder(model).norm is None
    report = compress_(model, tiny_batches(), GraspConfig(layers=(1,), retain_ratio=0.5))
    assert {module.name.split(".")[-1] for module in report.compressed} >= {"q_proj", "out_proj", "fc1", "fc2"}
    assert torch.isfinite(model(tiny_batches()[0]).logits).all()


def test_experts_are_left_and_named_while_attention_is_compressed() -> None:
    targets, left = layer_targets(tiny_model("mixtral"), 0)
    assert {target.block for target in targets} == {"attention"}
    assert any("experts" in name and "mixture-of-experts" in reason for name, reason in left.items())


def test_a_router_beside_the_mlp_is_left() -> None:
    config = Gemma4TextConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size_per_layer_input": 64},
        **{"hidden_size_per_layer_input": 0, "global_head_dim": 16, "layer_types": ["full_attention"] * 2},
        **{"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16},
    )
    targets, left = layer_targets(Gemma4ForCausalLM(config), 0)
    assert left["model.layers.0.router.proj"] == "belongs to a mixture-of-experts block"
    assert {target.name.split(".")[-1] for target in targets if target.block == "mlp"} == {
        *("gate_proj", "up_proj", "down_proj")
    }


def test_shared_weights_are_left() -> None:
    model = tiny_model("llama")
    layers = decoder(model).layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    targets, left = layer_targets(model, 0)
    assert left == {"model.layers.0.mlp.up_proj": "shares its weight with model.layers.1.mlp.up_proj"}
    assert len(targets) == 6


def test_shared_modules_are_left() -> None:
    model = tiny_model("llama")
    layers = decoder(model).layers
    layers[1].mlp = layers[0].mlp
    targets, left = layer_targets(model, 1)
    assert left["model.layers.1.mlp.up_proj"] == "shares its weight with model.layers.0.mlp.up_proj"
    assert {target.block for target in targets} == {"attention"}
    report = compress_(model, tiny_batches(2), GraspConfig(layers=(0, 1), retain_ratio=0.4))
    assert layers[1].mlp is layers[0].mlp
    assert len(report.compressed) == 8


def test_low_rank_linears_and_foreign_subclasses_are_left() -> None:
    class Quantized(nn.Linear):
        pass

    model = tiny_model("llama")
    model.set_submodule("model.layers.0.mlp.up_proj", LowRankLinear(32, 48, 4, bias=False))
    model.set_submodule("model.layers.0.mlp.gate_proj", Quantized(32, 48, bias=False))
    _, left = layer_targets(model, 0)
    assert left == {
        "model.layers.0.mlp.gate_proj": "is a Quantized, not a dense nn.Linear",
        "model.layers.0.mlp.up_proj": "is a LowRankLinear, not a dense nn.Linear",
    }


def test_a_model_without_decoder_layers_is_refused_with_the_remedy() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no decoder layers .*FAMILIES"):
        decoder(nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_entering_a_layer_with_the_output_of_the_prefix_changes_nothing(family: str) -> None:
    model, tokens = tiny_model(family), tiny_batches(1)[0]
    layers = decoder(model).layers
    outputs: list[torch.Tensor] = []
    returned_tuple: list[bool] = []

    def note(_: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        outputs.append(hidden_output(output))
        returned_tuple.append(isinstance(output, tuple))

    handle = layers[1].register_forward_hook(note)
    with torch.no_grad():
        expected = model(tokens).logits
        handle.remove()
        with passing_through(list(layers)[:2], returned_tuple[0]), entering_with(layers[2], outputs[0]):
            assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)


def test_evaluating_restores_modes_and_gradients() -> None:
    model = tiny_model("llama").train()
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].training
    assert not model.model.norm.training
    assert model.model.norm.weight.requires_grad
    assert not model.lm_head.weight.requires_grad
