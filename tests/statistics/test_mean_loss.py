"""The mean loss, at once and from one layer after the other."""

from __future__ import annotations

import copy

import pytest
import torch

from grasp.model.batch import as_batches
from grasp.model.layer_removal import remove_layers_
from grasp.model.targets import decoder
from grasp.statistics.loss import mean_loss
from grasp.statistics.sweep import capture_prefix, propagate, sum_nll_after
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model


@pytest.mark.parametrize("removed", [(), (2,), (0,), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_the_loss_is_that_of_a_model_without_the_others(family: str, removed: tuple[int, ...]) -> None:
    model, batches = tiny_model(family, torch.float64), as_batches(tiny_batches(2))
    prefix = capture_prefix(model, batches, {0})
    hidden = prefix.hidden[0]
    for layer in range(len(decoder(model).layers)):
        hidden = hidden if layer in removed else propagate(prefix, range(layer, layer + 1), hidden)
    remove_layers_(smaller := copy.deepcopy(model), removed)
    targets = sum(batch.num_targets for batch in batches)
    assert sum_nll_after(prefix, hidden) / targets == pytest.approx(mean_loss(smaller, batches), rel=1e-12)


def test_a_loss_that_is_not_finite_is_returned() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        decoder(model).layers[1].mlp.down_proj.weight.fill_(torch.inf)
    assert not torch.tensor(mean_loss(model, as_batches(tiny_batches(1)))).isfinite()
