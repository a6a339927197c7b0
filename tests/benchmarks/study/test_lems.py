from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.study.lems import allocated, choices, depth_weights, lems_, shrunk
from grasp.method.knapsack import DENSE, Choices
from grasp.model.batch import CalibrationBatch
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.size import model_size
from grasp.model.targets import layer_targets
from grasp.progress import no_progress
from tests.tiny_models import tiny_batches, tiny_model


def test_a_covariance_is_moved_to_its_mean_eigenvalue() -> None:
    total = torch.tensor([[8.0, 2.0], [2.0, 4.0]])
    torch.testing.assert_close(shrunk(total, 2, 0.5), torch.tensor([[3.5, 0.5], [0.5, 2.5]]))


def test_predicted_losses_go_through_the_measured_one() -> None:
    S = torch.linspace(4, 0.1, 128)
    found = choices((128, 128), S, 0.5)
    assert found.ranks == (24, 32, 40, 48, 56, DENSE)  # the break-even rank is 64
    dropped = S.square().flip(0).cumsum(0).flip(0)  # at rank 0, 1, ...
    expected = [0.5 * float(dropped[rank] / dropped[6]) for rank in found.ranks[:-1]]
    assert found.losses == pytest.approx([*expected, 0.0], rel=1e-5)
    assert found.costs == (*(256 * rank for rank in found.ranks[:-1]), 128 * 128)


def test_weights_fall_from_one_and_the_gain_to_one() -> None:
    assert depth_weights(4, 0.0, 6.0) == pytest.approx([7, 5, 3, 1])
    steep = depth_weights(4, 2.0, 6.0)
    assert (steep[0], steep[-1]) == pytest.approx((7, 1))
    assert steep[1] < 5


def test_early_layers_keep_more_with_a_gain() -> None:
    model = tiny_model("llama")
    targets = [layer_targets(model, layer)[0][0] for layer in (0, 2)]
    curves = {target: Choices((8, 16, DENSE), (8.0, 16.0, 32.0), (3.0, 1.0, 0.0)) for target in targets}
    assert allocated(curves, [5, 2, 1], 24) == dict(zip(targets, (16, 8), strict=True))


def test_the_budget_is_kept_and_what_was_measured_is_read_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    batches, file = [CalibrationBatch(tokens) for tokens in tiny_batches(2)], tmp_path / "lems.json"
    before = model_size(model).parameters
    ranks = lems_(model, batches, 0.2 * before, file, dtype=None, progress=no_progress)
    assert {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)} == set(ranks)
    assert model_size(model).parameters <= 0.8 * before
    measured = json.loads(file.read_text(encoding="utf-8"))
    assert len(measured) == 21
    assert all(value > 0 for value in measured.values())
    file.write_text(json.dumps(dict.fromkeys(measured, 1.0)), encoding="utf-8")
    lems_(tiny_model("llama"), batches, 0.2 * before, file, dtype=None, progress=no_progress)
    assert set(json.loads(file.read_text(encoding="utf-8")).values()) == {1.0}
