from __future__ import annotations

from typing import Any

import pytest
import torch

from grasp.architecture import layer_targets
from grasp.calibration import CalibrationBatch
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import CalibrationError
from grasp.loss import sum_nll
from grasp.modules import LowRankLinear
from grasp.planning import hold_out
from grasp.report import CompressionReport
from tests.tiny_models import tiny_batches, tiny_model

BEST: dict[str, Any] = {"basis": "kfac", "metric": "magnitude", "allocation": "global", "schedule": "single-sweep"}


def removed(report: CompressionReport) -> int:
    return report.before.parameters - report.after.parameters


@pytest.mark.parametrize("scope", ["redundant", "model"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_global_budget_removes_what_the_uniform_one_removes(family: str, scope: str) -> None:
    batches = tiny_batches(2)
    uniform = compress_(tiny_model(family), batches, GraspConfig(layers=(0, 2), retain_ratio=0.4))
    model = tiny_model(family)
    report = compress_(model, batches, GraspConfig(layers=(0, 2), retain_ratio=0.4, scope=scope, **BEST))
    largest_step = max(sum(target.module.weight.shape) for target in layer_targets(tiny_model(family), 0)[0])
    assert removed(uniform) <= removed(report) < removed(uniform) + largest_step
    layers = {module.layer for module in report.compressed}
    assert layers <= ({0, 2} if scope == "redundant" else {0, 1, 2})
    assert all(module.reason == "stays dense: the budget does more elsewhere" for module in report.left)
    with torch.no_grad():
        assert torch.isfinite(model(batches[0]).logits).all()


def test_a_matrix_on_which_the_loss_depends_most_stays_dense() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for target in layer_targets(model, 1)[0]:
            target.module.weight.mul_(20 if target.name.endswith("down_proj") else 0.05)
    report = compress_(model, tiny_batches(4), GraspConfig(layers=(1,), retain_ratio=0.6, **BEST))
    assert "model.layers.1.mlp.down_proj" in {module.name for module in report.left}


def test_auto_takes_the_scope_with_the_lower_loss_on_what_was_held_out() -> None:
    batches, losses = tiny_batches(8), {}
    for scope in ("redundant", "model"):
        model = tiny_model("llama")
        compress_(model, batches[:-1], GraspConfig(layers=(0, 2), retain_ratio=0.4, scope=scope, **BEST))
        losses[scope] = sum_nll(model, [CalibrationBatch(batches[-1])]) / batches[-1][:, 1:].numel()
    report = compress_(tiny_model("llama"), batches, GraspConfig(layers=(0, 2), retain_ratio=0.4, scope="auto", **BEST))
    assert report.held_out_loss == pytest.approx(losses, rel=1e-4)
    assert report.scope == min(losses, key=losses.__getitem__)


def test_the_whole_model_uniformly() -> None:
    model = tiny_model("llama")
    report = compress_(model, tiny_batches(1), GraspConfig(compression_ratio=0.3, scope="model"))
    assert report.compression_ratio == pytest.approx(0.3, abs=0.01)
    assert {module.layer for module in report.compressed} == {0, 1, 2}
    shares = {module.parameters_after / module.parameters_before for module in report.compressed}
    assert max(shares) - min(shares) < 0.12  # whole ranks of small matrices


def test_refit_changes_left_factors_alone() -> None:
    plain, refitted = tiny_model("llama"), tiny_model("llama")
    for model, refit in ((plain, False), (refitted, True)):
        compress_(model, tiny_batches(4), GraspConfig(layers=(0, 2), retain_ratio=0.4, refit=refit, **BEST))
    for name, module in plain.named_modules():
        if isinstance(module, LowRankLinear):
            other = refitted.get_submodule(name)
            assert torch.equal(module.Vh, other.Vh)
            assert not torch.equal(module.U, other.U)


@pytest.mark.parametrize("basis", ["whitened", "kfac"])
@pytest.mark.parametrize("schedule", ["sequential", "per-layer", "single-sweep"])
def test_every_schedule_works_in_every_basis(basis: str, schedule: str) -> None:
    config = GraspConfig(layers=(0, 2), retain_ratio=0.4, basis=basis, metric="fisher", schedule=schedule)
    report = compress_(tiny_model("llama"), tiny_batches(2), config)
    assert len(report.compressed) == 14


def test_an_eighth_is_held_out_and_at_least_one_batch() -> None:
    batches = [CalibrationBatch(t) for t in tiny_batches(17)]
    assert [len(part) for part in hold_out(batches)] == [15, 2]
    assert [len(part) for part in hold_out(batches[:2])] == [1, 1]
    with pytest.raises(CalibrationError, match="give at least 2"):
        hold_out(batches[:1])
