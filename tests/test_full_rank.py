"""Factors of full rank in every linear change nothing, in any family: what connects modules and models is exact."""

from __future__ import annotations

import copy

import pytest
import torch

from grasp.model.dense import dense_weight
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import decoder, layer_targets
from tests.tiny_models import DENSE_FAMILIES, tiny_batches, tiny_model


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("family", DENSE_FAMILIES)
@torch.no_grad()
def test_full_rank_factors_in_every_linear_reproduce_the_logits(family: str, grouped: bool) -> None:
    dense = tiny_model(family, torch.float64)
    model = copy.deepcopy(dense)
    replaced = 0
    for layer in range(len(decoder(model).layers)):
        for target in layer_targets(model, layer)[0]:
            groups = torch.arange(min(dense_weight(target.module).shape))
            model.set_submodule(target.name, LowRankLinear.from_dense(target.module, groups))
            replaced += 1
    group_linears_(model, grouped)
    assert replaced >= 4 * len(decoder(model).layers)
    tokens = tiny_batches(1)[0]
    expected = dense(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
