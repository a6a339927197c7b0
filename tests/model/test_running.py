from __future__ import annotations

import torch

from grasp.model.batch import CalibrationBatch
from grasp.model.running import casting, passing_through, tuple_length
from grasp.model.targets import decoder
from tests.model.test_layer_removal import SIZES, random_model, tokens
from tests.tiny_models import tiny_model


def test_some_layers_are_cast_and_restored_bit_for_bit() -> None:
    model = tiny_model("gemma3")  # ties its head to its embeddings
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, *others = decoder(model).layers
    with casting(model, "bfloat16", without=[first]):
        assert {p.dtype for p in first.parameters()} == {torch.float32}
        assert {p.dtype for layer in others for p in layer.parameters()} == {torch.bfloat16}
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_return_more_than_hidden_states_are_passed_through() -> None:
    sizes = {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1, 3],
    }
    model, batch = random_model("Bamba", **SIZES, **sizes), CalibrationBatch(tokens())
    length = tuple_length(model, batch)
    assert length == 2
    hidden = model.get_input_embeddings()(batch.input_ids)
    with torch.no_grad(), passing_through(decoder(model).layers, length):
        got = model(batch.input_ids, use_cache=False).logits
    torch.testing.assert_close(got, model.lm_head(model.model.final_layernorm(hidden)))
    assert tuple_length(tiny_model("llama"), batch) == 0
