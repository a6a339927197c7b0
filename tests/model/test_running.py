from __future__ import annotations

import torch

from grasp.model.running import casting
from grasp.model.targets import decoder
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
