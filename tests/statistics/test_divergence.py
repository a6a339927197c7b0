"""Divergences from the dense model: equal to those of whole models, from fewer passes through layers."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp.model.batch import CalibrationBatch, as_batches
from grasp.model.hooks import hooked
from grasp.model.layer_removal import remove_layers_
from grasp.model.targets import decoder
from grasp.statistics.divergence import Reference, removal_divergences, sum_divergences
from grasp.statistics.sweep import capture_prefix, propagate
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, batches: list[CalibrationBatch]) -> Tensor:
    """Of the tokens that are counted, (T, vocabulary)."""
    rows = [model(ids, attention_mask=mask).logits[:, :-1] for ids, mask, _ in batches]
    return torch.cat([row[batch.is_target].log_softmax(-1) for row, batch in zip(rows, batches, strict=True)])


@pytest.mark.parametrize("removed", [(), (2,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_divergence_is_that_of_a_model_without_the_layers(family: str, removed: tuple[int, ...]) -> None:
    model = tiny_model(family, torch.float64)
    tokens = tiny_batches(2)
    mask = torch.ones_like(tokens[0], dtype=torch.bool)
    mask[0, 5:] = False
    batches = [CalibrationBatch(tokens[0], mask), CalibrationBatch(tokens[1])]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def without(*layers: int) -> float:
        smaller = copy.deepcopy(model)
        remove_layers_(smaller, layers)
        p, q = log_probabilities(model, batches), log_probabilities(smaller, batches)
        return float((p.exp() * (p - q)).sum(-1).mean())

    expected = {layer: without(layer, *removed) - (without(*removed) if removed else 0.0) for layer in (0, 1)}
    found = removal_divergences(Reference.of(model, batches), [1, 0], removed)
    assert found == pytest.approx(expected, rel=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_before_the_first_one_left_out_run_once() -> None:
    model, (tokens,) = tiny_model("llama"), tiny_batches(1)
    passes: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if output.shape[:2] == tokens.shape:  # not the two tokens that show what a layer returns
            passes.update([module])

    layers = list(decoder(model).layers)
    reference = Reference.of(model, as_batches([tokens]))
    with hooked(*(layer.mlp for layer in layers), after=count):
        removal_divergences(reference, [0, 1, 2])
    assert [passes[layer.mlp] for layer in layers] == [
        1,
        2,
        2,
    ]  # before the first one that is left out once, behind it once for each


def test_divergences_are_those_of_each_student_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64)
    prefix = capture_prefix(model, as_batches(tiny_batches(3)), {0})
    outputs = [propagate(prefix, range(depth), prefix.hidden[0]) for depth in (3, 2, 1)]
    students = [*outputs, outputs[1], outputs[2]]
    monkeypatch.setattr("grasp.statistics.divergence.STUDENTS", 2)
    done: list[int] = []
    together = sum_divergences(prefix, students, outputs[0], done.append)
    assert together == [sum_divergences(prefix, [student], outputs[0])[0] for student in students]
    assert together[0] == 0 < together[1] != together[2] > 0
    assert done == [2, 4, 5]
