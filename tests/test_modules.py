from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from grasp.errors import NonFiniteError
from grasp.modules import LowRankLinear, decompose, dense_weight


def conv1d(out_features: int, in_features: int) -> Conv1D:
    module = Conv1D(out_features, in_features)
    nn.init.normal_(module.bias)
    return module


DENSE = {
    "linear": lambda: nn.Linear(24, 16),
    "no bias": lambda: nn.Linear(24, 16, bias=False),
    "conv1d": lambda: conv1d(16, 24),
}


@pytest.mark.parametrize("kind", DENSE)
def test_full_rank_is_the_dense_linear(kind: str) -> None:
    dense = DENSE[kind]().double()
    low_rank = LowRankLinear.from_dense(dense, torch.arange(16))
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    torch.testing.assert_close(low_rank(x), dense(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(low_rank.dense_weight(), dense_weight(dense), rtol=0, atol=1e-12)


def test_kept_groups_are_those_asked_for() -> None:
    dense = nn.Linear(24, 16).double()
    U, S, Vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    kept = [0, 3, 15]
    low_rank = LowRankLinear.from_dense(dense, torch.tensor(kept))
    expected = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in kept)
    torch.testing.assert_close(low_rank.dense_weight(), expected, rtol=0, atol=1e-12)


def test_factors_share_the_singular_values_evenly() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(4))
    S = torch.linalg.svdvals(low_rank.dense_weight())[:4]
    torch.testing.assert_close(low_rank.U.norm(dim=0), S.sqrt())
    torch.testing.assert_close(low_rank.Vh.norm(dim=1), S.sqrt())


@pytest.mark.parametrize("indices", [[], [0, 0], [16], [-1]])
def test_impossible_indices_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"distinct, at least one, each in 0\.\.15"):
        LowRankLinear.from_dense(nn.Linear(24, 16), torch.tensor(indices, dtype=torch.int64))


@pytest.mark.parametrize("rank", [0, 17])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 16 .* got {rank}"):
        LowRankLinear(24, 16, rank)


def test_non_finite_weights_are_refused_by_name() -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = float("nan")
    weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layer\.q has 2 non-finite entries of 12"):
        decompose(weight, "layer.q")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_fp32(dtype: torch.dtype) -> None:
    dense = nn.Linear(24, 16).to(dtype)
    assert decompose(dense.weight).S.dtype == torch.float32
    low_rank = LowRankLinear.from_dense(dense, torch.arange(16))
    assert low_rank.U.dtype == low_rank.Vh.dtype == dtype
    assert low_rank.bias is not None
    assert torch.equal(low_rank.bias, dense.bias)
    error = (low_rank.dense_weight() - dense.weight.float()).norm() / dense.weight.float().norm()
    assert error < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def test_autocast_computes_in_its_dtype() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(8))
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank(x)
        reference = nn.functional.linear(nn.functional.linear(x, low_rank.Vh), low_rank.U, low_rank.bias)
    assert y.dtype == reference.dtype == torch.bfloat16
    assert torch.equal(y, reference)


def test_moves_copies_and_reloads() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(8))
    x = torch.randn(5, 24)
    twin = LowRankLinear(24, 16, 8)
    assert not torch.equal(twin(x), low_rank(x))
    twin.load_state_dict(low_rank.state_dict())
    assert torch.equal(twin(x), low_rank(x))
    assert torch.equal(copy.deepcopy(low_rank)(x), low_rank(x))
    assert set(low_rank.state_dict()) == {"U", "Vh", "bias"}
    assert copy.deepcopy(low_rank).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_random_factors_have_the_variance_of_a_fresh_linear() -> None:
    torch.manual_seed(0)
    weight = LowRankLinear(256, 256, 64).dense_weight()
    assert weight.std().item() == pytest.approx(nn.Linear(256, 256).weight.std().item(), rel=0.1)


def test_trains() -> None:
    low_rank = LowRankLinear.from_dense(nn.Linear(24, 16), torch.arange(8))
    low_rank(torch.randn(5, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in low_rank.parameters())


def test_repr_says_what_is_left() -> None:
    assert repr(LowRankLinear(32, 32, 4, bias=False)) == (
        "LowRankLinear(in_features=32, out_features=32, rank=4, bias=False, parameters=25.0% of dense)"
    )
