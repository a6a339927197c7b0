from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.method import blocks
from grasp.method.least_squares import (
    PRIOR_TOKENS,
    WEIGHT_PRIOR_TOKENS,
    fit_weight,
    least_squares,
    least_squares_bytes,
    least_squares_flops,
)
from grasp.method.ranks import break_even_rank
from tests.method.resources import matmul_flops, peaks_of


def problem(n: int, k: int, rank: int) -> tuple[Tensor, ...]:
    """U, Vh, W, the cross covariance, and the covariance of the inputs, in fp32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(3 * k, k) * torch.logspace(-2, 1, k)
    seen = x + 0.1 * random(3 * k, k)
    return random(n, rank), random(rank, k), random(n, k), x.mT @ seen, seen.mT @ seen


@pytest.mark.parametrize("rows", [5, 512])
@pytest.mark.parametrize(("n", "k", "rank"), [(12, 9, 4), (9, 12, 1), (8, 8, 7)])
def test_the_ridge_regression_is_solved(n: int, k: int, rank: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    arguments = problem(n, k, rank)
    copies = [argument.clone() for argument in arguments]
    got = least_squares(*arguments, tokens=10**6)
    assert got.dtype == torch.float32
    assert all(map(torch.equal, arguments, copies))
    U, Vh, W, cross, inputs = (argument.double() for argument in arguments)
    gram = Vh @ inputs @ Vh.mT
    ridge = PRIOR_TOKENS / 10**6 * gram.diagonal().mean()
    gradient = got.double() @ gram - W @ cross @ Vh.mT + ridge * (got.double() - U)  # 0 at the minimum
    assert gradient.norm() <= 1e-6 * (W @ cross @ Vh.mT).norm()


def test_a_linear_that_sees_only_zeros_is_not_fitted() -> None:
    U, Vh, W, cross, inputs = problem(8, 9, 3)
    assert torch.equal(least_squares(U, torch.zeros_like(Vh), W, cross, inputs, 4000), U)
    assert torch.equal(least_squares(U, Vh, W, 0 * cross, 0 * inputs, 4000), U)


@pytest.mark.parametrize("n", [7, 9, 12])
def test_a_weight_carries_what_changes_in_its_inputs_as_the_least_squares_of_the_identity_do(n: int) -> None:
    _, _, W, cross, inputs = problem(n, 9, 1)
    wanted = least_squares(W, torch.eye(9), W, cross, inputs, tokens=3 * PRIOR_TOKENS)
    got = fit_weight(W, cross, inputs, 3 * WEIGHT_PRIOR_TOKENS)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(fit_weight(W, inputs, inputs, 4000), W)
    assert torch.equal(fit_weight(W, torch.zeros(9, 9), torch.zeros(9, 9), 4000), W)  # a linear that sees only zeros


def test_flops_are_those_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 8)
    arguments = problem(96, 160, 40)
    solving = 2 * 40**3 // 3 + 2 * 96 * 40**2  # not counted by PyTorch
    assert matmul_flops(lambda: least_squares(*arguments, tokens=480)) + solving == pytest.approx(
        least_squares_flops((96, 160), 40), rel=0.05
    )


def test_the_peaks_are_the_estimates() -> None:
    cases = [("least_squares", shape, break_even_rank(shape, "factored")) for shape in ((1200, 600), (600, 1200))]
    for (_, shape, rank), measured in zip(cases, peaks_of(cases), strict=True):
        assert measured == pytest.approx(least_squares_bytes(shape, rank), rel=0.1)
