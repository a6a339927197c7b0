"""The loss without some layers: equal to that of a model without them, from fewer passes through layers."""

from __future__ import annotations

import copy

import pytest
import torch

from grasp.model.batch import CalibrationBatch, as_batches
from grasp.model.layer_removal import remove_layers_
from grasp.model.targets import decoder
from grasp.statistics.layer_losses import losses_without
from grasp.statistics.loss import sum_nll
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model

CHOICES = [(), (2,), (0,), (1, 2), (1,), (2, 0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_loss_is_that_of_a_model_without_the_layers(family: str) -> None:
    model = tiny_model(family, torch.float64)
    batches = as_batches(tiny_batches(2))
    expected = []
    for choice in CHOICES:
        smaller = copy.deepcopy(model)
        remove_layers_(smaller, choice)
        expected.append(sum_nll(smaller, batches) / sum(batch.num_targets for batch in batches))
    assert losses_without(model, CHOICES, batches) == pytest.approx(expected, rel=1e-12)


def test_padding_is_not_counted() -> None:
    model, tokens = tiny_model("llama", torch.float64), tiny_batches(1)[0]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 5:] = False
    (padded,) = losses_without(model, [(1,)], [CalibrationBatch(tokens, mask)])
    alone = [CalibrationBatch(tokens[:1, :5]), CalibrationBatch(tokens[1:])]
    (expected,) = losses_without(model, [(1,)], alone)
    assert padded == pytest.approx(expected, rel=1e-12)


def test_a_loss_that_is_not_finite_is_returned() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        decoder(model).layers[1].mlp.down_proj.weight.fill_(torch.inf)
    dense, without = losses_without(model, [(), (1,)], as_batches(tiny_batches(1)))
    assert not torch.tensor(dense).isfinite()
    assert torch.tensor(without).isfinite()
