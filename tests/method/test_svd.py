from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.errors import NonFiniteError
from grasp.method.svd import DAMPING, cholesky_factor, decompose_in

N, K, T = 12, 9, 200


def tokens(width: int, count: int = T, seed: int = 0) -> Tensor:
    """Correlated tokens of very different scales, (count, width) fp64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 1, width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ mixing


def second_moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)


def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def cut(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> Tensor:
    U, S, Vh = svd
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_a_root_is_the_cholesky_factor_of_the_damped_covariance() -> None:
    covariance = second_moment(tokens(K))
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    factor = cholesky_factor(covariance)
    torch.testing.assert_close(factor @ factor.mT, damped)
    assert torch.equal(factor, factor.tril())


def test_a_covariance_that_rounding_made_indefinite_counts_its_negative_eigenvalues_as_0() -> None:
    vectors, _ = torch.linalg.qr(tokens(K, K))
    values = torch.linspace(0, 8, K, dtype=torch.float64)
    values[0] = -0.1  # far below the damping
    covariance = vectors * values @ vectors.mT
    floor = DAMPING * covariance.diagonal().mean()
    factor = cholesky_factor(covariance)
    torch.testing.assert_close(factor @ factor.mT, vectors * (values.clamp_min(0) + floor) @ vectors.mT)
    assert torch.equal(factor, factor.tril())
    W = weight()
    torch.testing.assert_close(cut(decompose_in(W, factor, None), K), W)


@pytest.mark.parametrize("shape", [(N, K), (K, N), (1, K), (K, 1)])
def test_groups_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one = torch.eye(shape[1], dtype=torch.float64)
    U, S, Vh = decompose_in(W, one, None)
    torch.testing.assert_close(S, torch.linalg.svdvals(W))
    for factor in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(factor, torch.eye(len(S), dtype=torch.float64))


def test_groups_of_a_matrix_without_full_rank_are_finite_and_give_it_back() -> None:
    W = weight()
    W[:, 3] = W[:, 4]
    W[5] = 0
    for matrix in (W, W.mT, torch.zeros(3, 4, dtype=torch.float64)):
        one = torch.eye(matrix.shape[1], dtype=torch.float64)
        svd = decompose_in(matrix, one, None)
        assert all(torch.isfinite(factor).all() for factor in svd)
        torch.testing.assert_close(cut(svd, len(svd.S)), matrix, rtol=0, atol=1e-7)


def test_all_groups_give_the_weight_back_in_every_basis() -> None:
    W, A, B = weight(), cholesky_factor(second_moment(tokens(K))), cholesky_factor(second_moment(tokens(N, seed=1)))
    for inputs, outputs in [(None, None), (A, None), (None, B), (A, B)]:
        torch.testing.assert_close(cut(decompose_in(W, inputs, outputs), K), W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_whitened_cut_changes_the_outputs_least(rank: int) -> None:
    W, x = weight(), tokens(K)
    got = cut(decompose_in(W, cholesky_factor(second_moment(x), damping=1e-12), None), rank)
    outputs = x @ W.mT
    _, _, directions = torch.linalg.svd(outputs, full_matrices=False)  # Eckart-Young, on the outputs themselves
    best = outputs @ directions[:rank].mT @ directions[:rank]
    assert (x @ got.mT - outputs).norm() == pytest.approx((best - outputs).norm().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_kfac_cut_is_optimal_and_its_dropped_values_say_what_it_costs(rank: int) -> None:
    W, A, B = weight(), cholesky_factor(second_moment(tokens(K))), cholesky_factor(second_moment(tokens(N, seed=1)))
    svd = decompose_in(W, A, B)

    def cost(approximation: Tensor) -> float:
        return (B.mT @ (W - approximation) @ A).norm().item()

    best = cost(cut(svd, rank))
    assert best == pytest.approx(svd.S[rank:].norm().item(), rel=1e-9)
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            left, right = svd.U[:, :rank] * svd.S[:rank], svd.Vh[:rank]
            left = left + scale * left.std() * torch.randn(left.shape, generator=generator, dtype=left.dtype)
            right = right + scale * right.std() * torch.randn(right.shape, generator=generator, dtype=right.dtype)
            assert cost(left @ right) > best
    assert best <= cost(cut(decompose_in(W, A, None), rank))
    assert best <= cost(cut(decompose_in(W, None, None), rank))


def test_fewer_tokens_than_features_and_dead_features_are_damped_not_amplified() -> None:
    x = tokens(K, count=3)
    x[:, 0] = 0
    W = weight().float()
    svd = decompose_in(W, cholesky_factor(second_moment(x).float()), None)
    assert all(torch.isfinite(factor).all() for factor in svd)
    torch.testing.assert_close(cut(svd, K), W, rtol=0, atol=1e-3)
    error = x.float() @ (cut(svd, 3) - W).mT  # three tokens: three groups reproduce their outputs
    assert error.norm() <= 0.02 * (x.float() @ W.mT).norm()


def test_fp32_covariances_of_a_wide_range_agree_with_fp64() -> None:
    W, A = weight(), second_moment(tokens(K))
    exact, single = (
        cut(decompose_in(W.to(dtype), cholesky_factor(A.to(dtype)), None), 4)
        for dtype in (torch.float64, torch.float32)
    )
    assert single.dtype == torch.float32
    x = tokens(K, seed=9)
    assert (x @ (single.double() - exact).mT).norm() <= 1e-3 * (x @ (W - exact).mT).norm()


def test_a_covariance_of_nothing_and_one_that_is_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="covariance is 0"):
        cholesky_factor(torch.zeros(3, 3))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        cholesky_factor(torch.full((3, 3), float("nan")))
