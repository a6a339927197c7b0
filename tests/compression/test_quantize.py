from __future__ import annotations

import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM

from grasp.compression.quantize import bytes_saved, quantize_
from grasp.errors import NonFiniteError
from grasp.method.storage import FP8, Storage
from grasp.model.batch import as_batches
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedLowRankLinear
from grasp.model.size import model_size
from tests.tiny_models import tiny_batches, tiny_model


def compressed(family: str = "llama") -> torch.nn.Module:
    """A model whose first layer has low-rank linears, one of them pivoted."""
    model = tiny_model(family)
    for name, module in list(model.named_modules()):
        if ".0." in name and isinstance(module, torch.nn.Linear):
            low = LowRankLinear.from_dense(module, torch.arange(4))
            if "up_proj" in name:
                low.pivot_()
            model.set_submodule(name, low)
    group_linears_(model)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch).logits for batch in tiny_batches(4, seed=5)]).double()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
def test_logits_change_less_with_calibration_than_without(storage: Storage, family: str) -> None:
    changes = {}
    for name, batches in (("nearest", []), ("loss-aware", as_batches(tiny_batches(8, 4)))):
        model = compressed(family) if family == "llama" else tiny_model(family)
        before = logits(model)
        quantize_(model, storage, batches)
        kinds = {type(module) for module in model.modules()}
        assert not kinds & {LowRankLinear, torch.nn.Linear, torch.nn.Embedding}
        assert kinds >= {QuantizedLinear, QuantizedEmbedding, *([QuantizedLowRankLinear] * (family == "llama"))}
        changes[name] = float((logits(model) - before).norm() / before.norm())
    assert changes["nearest"] < (0.03 if storage.bits == 8 else 0.3)
    # Most of the change with 8 bits is that of the embedding, which is the same.
    assert changes["loss-aware"] < changes["nearest"] * (1.1 if storage.bits == 8 else 0.8)


def test_linears_that_see_some_tokens_only_are_quantised() -> None:
    model = tiny_model("llama")
    mlp, forward = model.model.layers[1].mlp, model.model.layers[1].mlp.forward

    def routed(x: torch.Tensor) -> torch.Tensor:
        chosen = x[..., 0] > 0
        return torch.zeros_like(x).masked_scatter(chosen[..., None], forward(x[chosen]))

    mlp.forward = routed
    before = logits(model)
    quantize_(model, Storage(4, 32), as_batches(tiny_batches(8, 4)))
    assert (logits(model) - before).norm() < 0.4 * before.norm()


@pytest.mark.parametrize(("storage", "embedding"), [(Storage(4, 32), Storage(4, 32)), (FP8, Storage(8))], ids=str)
def test_a_separate_embedding_has_the_four_bits_of_the_linears(storage: Storage, embedding: Storage) -> None:
    model = tiny_model("llama")
    saved, _ = bytes_saved(model, storage, storage)
    before = model_size(model).bytes
    quantize_(model, storage)
    assert model.model.embed_tokens.storage == embedding
    assert model.lm_head.storage == Storage(8)
    assert before - model_size(model).bytes == saved


@pytest.mark.parametrize("storage", [Storage(8), Storage(4, 32)], ids=str)
def test_the_bytes_saved_of_a_low_rank_model_are_those_of_all_its_factors(storage: Storage) -> None:
    model = compressed()
    saved, _ = bytes_saved(model, storage, storage)
    before = model_size(model).bytes
    quantize_(model, storage)
    assert before - model_size(model).bytes == saved


def test_a_tied_output_layer_shares_its_values_with_the_embedding() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    quantize_(model, Storage(4, 32))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scales is model.model.embed_tokens.weight_scales
    assert model.lm_head.storage == Storage(8)


@pytest.mark.parametrize(("bits", "kind"), [(8, QuantizedLowRankLinear), (4, QuantizedLinear)])
def test_factors_as_large_as_the_dense_weight_become_dense_in_four_bits(bits: int, kind: type) -> None:
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(name)
    low = LowRankLinear.from_dense(linear, torch.arange(min(linear.weight.shape) - 1))
    assert low.pivot_() is None
    model.set_submodule(name, low)
    before = logits(model)
    quantize_(model, Storage(bits))
    assert type(model.get_submodule(name)) is kind
    assert (logits(model) - before).norm() < 0.3 * before.norm()


def test_a_weight_that_is_nan_is_named() -> None:
    model = compressed()
    model.model.layers[0].mlp.up_proj.Vh.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj cannot be quantised: its weights have NaN"):
        quantize_(model, Storage(8))
    dense = tiny_model("llama")
    dense.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"q_proj cannot be quantised"):
        quantize_(dense, Storage(8))
    assert not hasattr(dense.config, "_is_quantized")


def test_linears_whose_weight_a_layer_reads_are_called_instead() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = JambaConfig(
        **sizes, num_hidden_layers=2, num_key_value_heads=1, num_experts=1, attn_layer_offset=1, attn_layer_period=2
    )
    model = JambaForCausalLM(config).eval()  # dt_proj is the linear
    expected = logits(model)
    quantize_(model, Storage(8), as_batches(tiny_batches(2)))
    assert isinstance(model.model.layers[0].mamba.dt_proj, QuantizedLinear)
    assert torch.linalg.vector_norm(logits(model) - expected) < 0.05 * torch.linalg.vector_norm(expected)
