from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.basis import DAMPING, decompose_in, roots
from grasp.errors import NonFiniteError

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


def test_roots_square_to_the_damped_covariance_and_its_inverse() -> None:
    covariance = second_moment(tokens(K))
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    root, inverse = roots(covariance)
    torch.testing.assert_close(root @ root, damped)
    torch.testing.assert_close(inverse @ damped @ inverse, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-8)


def test_all_groups_give_the_weight_back_in_every_basis() -> None:
    W, A, B = weight(), roots(second_moment(tokens(K))), roots(second_moment(tokens(N, seed=1)))
    for inputs, outputs in [(None, None), (A, None), (None, B), (A, B)]:
        torch.testing.assert_close(cut(decompose_in(W, inputs, outputs), K), W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_whitened_cut_changes_the_outputs_least(rank: int) -> None:
    W, x = weight(), tokens(K)
    got = cut(decompose_in(W, roots(second_moment(x), damping=1e-12), None), rank)
    outputs = x @ W.mT
    _, _, directions = torch.linalg.svd(outputs, full_matrices=False)  # Eckart-Young, on the outputs themselves
    best = outputs @ directions[:rank].mT @ directions[:rank]
    assert (x @ got.mT - outputs).norm() == pytest.approx((best - outputs).norm().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_kfac_cut_is_optimal_and_its_dropped_values_say_what_it_costs(rank: int) -> None:
    W, A, B = weight(), roots(second_moment(tokens(K))), roots(second_moment(tokens(N, seed=1)))
    svd = decompose_in(W, A, B)

    def cost(approximation: Tensor) -> float:
        return (B.root @ (W - approximation) @ A.root).norm().item()

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
    svd = decompose_in(W, roots(second_moment(x).float()), None)
    assert all(torch.isfinite(factor).all() for factor in svd)
    torch.testing.assert_close(cut(svd, K), W, rtol=0, atol=1e-3)
    error = x.float() @ (cut(svd, 3) - W).mT  # three tokens: three groups reproduce their outputs
    assert error.norm() <= 0.02 * (x.float() @ W.mT).norm()


def test_fp32_covariances_of_a_wide_range_agree_with_fp64() -> None:
    W, A = weight(), second_moment(tokens(K))
    exact, single = (cut(decompose_in(W.to(d), roots(A.to(d)), None), 4) for d in (torch.float64, torch.float32))
    assert single.dtype == torch.float32
    x = tokens(K, seed=9)
    assert (x @ (single.double() - exact).mT).norm() <= 1e-3 * (x @ (W - exact).mT).norm()


def test_a_covariance_of_nothing_and_one_that_is_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="covariance is 0"):
        roots(torch.zeros(3, 3))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        roots(torch.full((3, 3), float("nan")))
