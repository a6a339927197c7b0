from __future__ import annotations

import pytest
import torch
from torch import nn

from grasp.checkpoint.run_state import NoState
from grasp.compression.selection import as_stored, read_selection, replacement, rounding_score, write_groups
from grasp.config import GraspConfig
from grasp.method.knapsack import DENSE
from grasp.method.rounding import Rounded
from grasp.method.storage import Storage
from grasp.method.svd import decompose, decompose_in
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QuantizedLinear
from grasp.model.targets import Target
from grasp.statistics.covariance import Covariance
from grasp.statistics.scores import Scored

TARGET = Target("model.layers.0.mlp.up_proj", 0, "mlp", nn.Linear(8, 6))
IMPORTANCE = torch.tensor([9.0, 1.0, 7.0, 2.0, 8.0, 0.5])


def written(state: NoState, rank: int) -> str:
    weight = TARGET.module.weight.detach()
    return write_groups(
        *(state, "only-up_proj", TARGET, weight),
        score=lambda weight, rank: Scored(decompose(weight), IMPORTANCE),
        rank=rank,
        config=GraspConfig(),
    )


def test_a_file_has_the_most_important_groups_and_the_importance_of_all() -> None:
    with NoState() as state:
        selection = read_selection(state, written(state, 4))
        assert selection.indices.tolist() == [0, 2, 3, 4]
        assert torch.equal(selection.importance, IMPORTANCE)
        assert torch.equal(selection.spectrum, decompose(TARGET.module.weight.detach()).S[: len(selection.spectrum)])


def test_a_lower_rank_keeps_the_best_of_the_groups() -> None:
    with NoState() as state:
        selection = read_selection(state, written(state, 4))
        module, report = replacement(state, TARGET, selection, 2)
    assert module is not None
    assert module.rank == report.rank == 2
    assert report.indices == (0, 4)
    wanted = LowRankLinear.from_dense(TARGET.module, torch.tensor([0, 4]))
    torch.testing.assert_close(module.dense_weight(), wanted.dense_weight())
    assert report.importance_kept == pytest.approx(17 / 27.5)
    assert report.parameters_before == sum(p.numel() for p in TARGET.module.parameters())
    for form in ("factored", "pivoted"):
        report = as_stored(report, module)
        assert report.form == form
        assert report.parameters_after == sum(p.numel() for p in module.parameters())
        assert report.bytes_after == sum(tensor.nbytes for tensor in module.state_dict().values())
        module.pivot_()


def test_a_linear_without_a_score_or_that_stays_dense_has_a_report_with_the_reason() -> None:
    with NoState() as state:
        name = write_groups(state, "only-x", TARGET, torch.empty(0), None, 3, GraspConfig())
        selection = read_selection(state, name)
        assert replacement(state, TARGET, selection, DENSE)[1].reason == "its output does not reach the loss"
        module, report = replacement(state, TARGET, read_selection(state, written(state, 3)), DENSE)
        assert module is None
        assert report.reason.startswith("stays dense")


def test_a_low_rank_linear_that_is_quantised_as_a_dense_one_has_a_report_that_says_so() -> None:
    with NoState() as state:
        report = replacement(state, TARGET, read_selection(state, written(state, 3)), 2)[1]
    report = as_stored(report, QuantizedLinear(TARGET.module, Storage(4)))
    assert (report.name, report.rank) == (TARGET.name, 0)
    assert report.reason.startswith("is dense again")


def test_the_score_of_rounding_is_that_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grads = (torch.randn(50, size, generator=generator) for size in (8, 6))
    covariance = Covariance(x.mT @ x, grads.mT @ grads, 50)
    weight = torch.randn(6, 8, generator=generator)
    rounded = rounding_score(weight, covariance, Storage(4, 32), "a")
    svd = decompose_in(weight, *covariance[:2], name="a", tokens=50)
    assert 0 < rounded < 0.05 * svd.S.square().sum()
    kept = svd.U[:, :3] * svd.S[:3] @ svd.Vh[:3]
    for groups, matrix in ((0, torch.zeros(6, 8)), (3, kept)):
        monkeypatch.setattr(
            "grasp.compression.selection.round_to_outputs",
            lambda *_, matrix=matrix: Rounded(matrix, torch.ones(6, 1)),
        )
        score = rounding_score(weight, covariance, Storage(4, 32), "a")
        torch.testing.assert_close(score, svd.S[groups:].square().sum()[None], rtol=1e-4, atol=0, check_dtype=False)


def test_nothing_is_left_of_a_run_without_a_folder() -> None:
    with NoState() as state:
        written(state, 2)
        folder = state.folder
        assert list(folder.iterdir())
    assert not folder.exists()
