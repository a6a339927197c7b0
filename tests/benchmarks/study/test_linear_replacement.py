from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.study.linear_replacement import (
    apply_map_,
    capture_streams,
    choose_block,
    replace_block_,
)
from grasp.model.batch import CalibrationBatch
from grasp.model.last_added import last_added
from grasp.model.targets import decoder
from tests.tiny_models import tiny_batches, tiny_model


def batches(count: int) -> list[CalibrationBatch]:
    return [CalibrationBatch(tokens) for tokens in tiny_batches(count)]


def residual_stream(first: Tensor, turns: list[float]) -> list[Tensor]:
    hidden = [first]
    for turn in turns:
        hidden.append(hidden[-1] + turn * torch.randn_like(first))
    return hidden


def test_the_block_that_turns_the_hidden_states_least_is_chosen_and_never_the_first_layer() -> None:
    torch.manual_seed(0)
    hidden = residual_stream(torch.randn(50, 16), [0.0, 2.0, 0.1, 0.1, 2.0])
    assert choose_block(hidden, 2) == 2
    assert choose_block(residual_stream(torch.randn(50, 16), [0.0, 0.1, 0.5]), 1) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_block_that_is_linear_in_what_the_layer_before_it_adds_is_replaced_without_loss(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp.method.least_squares.MAP_RIDGE", 1e-12)
    model = tiny_model(family, torch.float64)
    tokens = batches(2)
    streams = capture_streams(model, tokens)
    T = torch.randn(32, 32, dtype=torch.float64)
    streams.hidden[3] = streams.hidden[1] + streams.added[0] @ T.mT
    assert replace_block_(model, streams, 2) == (1, 2)
    assert len(decoder(model).layers) == 1
    logits = torch.cat([model(batch.input_ids).logits.flatten(0, 1) for batch in tokens])
    torch.testing.assert_close(logits, model.lm_head(model.model.norm(streams.hidden[3])), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "merged", "module"),
    [
        ("llama", True, "mlp"),
        ("gpt2", True, "mlp"),
        ("opt", True, "fc2"),
        ("gemma3", False, "post_feedforward_layernorm"),
    ],
)
def test_a_map_multiplies_what_a_layer_adds_last(family: str, merged: bool, module: str) -> None:
    model = tiny_model(family, torch.float64)
    last = last_added(model, 1)
    assert last.module == f"{decoder(model).path}.1.{module}"
    assert (last.linear is not None) == merged
    outputs: list[Tensor] = []
    tokens = batches(1)[0].input_ids
    for _ in range(2):
        handle = model.get_submodule(last.module).register_forward_hook(lambda _, args, output: outputs.append(output))
        model(tokens)
        handle.remove()
        if len(outputs) == 1:
            T = torch.randn(outputs[0].shape[-1], outputs[0].shape[-1], dtype=torch.float64)
            apply_map_(model, 1, T)
    torch.testing.assert_close(outputs[1], outputs[0] @ T.mT)
