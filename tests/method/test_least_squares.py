from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.method import blocks
from grasp.method import least_squares as solver
from grasp.method.least_squares import (
    PRIOR_TOKENS,
    PRIORS,
    WEIGHT_PRIOR_TOKENS,
    Moments,
    Products,
    fit_weight,
    least_squares,
    least_squares_bytes,
    least_squares_flops,
    linear_map,
    sampled_rows,
)
from grasp.method.ranks import break_even_rank
from tests.method.resources import matmul_flops, peaks_of


def problem(n: int, k: int, rank: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Moments]:
    """U, Vh, W in fp32, and the sums over inputs before and after they change, as if of so many tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(3 * k, k) * torch.logspace(-2, 1, k)
    seen = x + 0.1 * random(3 * k, k)
    return random(n, rank), random(rank, k), random(n, k), Moments(x.mT @ seen, seen.mT @ seen, tokens)


@pytest.mark.parametrize("rows", [5, 512])
@pytest.mark.parametrize(("n", "k", "rank"), [(12, 9, 4), (9, 12, 1), (8, 8, 7)])
def test_the_ridge_regression_is_solved(n: int, k: int, rank: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    *matrices, moments = problem(n, k, rank, tokens=10**6)
    arguments = [*matrices, *moments[:2]]
    copies = [argument.clone() for argument in arguments]
    got = least_squares(*matrices, moments)
    assert got.dtype == torch.float32
    assert all(map(torch.equal, arguments, copies))
    U, Vh, W, cross, inputs = (argument.double() for argument in arguments)
    gram = Vh @ inputs @ Vh.mT
    ridge = PRIOR_TOKENS / 10**6 * gram.diagonal().mean()
    gradient = got.double() @ gram - W @ cross @ Vh.mT + ridge * (got.double() - U)  # 0 at the minimum
    assert gradient.norm() <= 1e-6 * (W @ cross @ Vh.mT).norm()


def products(U: Tensor, Vh: Tensor, W: Tensor, moments: Moments) -> Products:
    rows = sampled_rows(len(U))
    return Products(Vh @ moments.inputs @ Vh.mT, W[rows] @ moments.cross @ Vh.mT, moments.tokens)


def test_a_linear_that_sees_only_zeros_is_not_fitted() -> None:
    U, Vh, W, moments = problem(8, 9, 3, tokens=4000)
    assert torch.equal(least_squares(U, torch.zeros_like(Vh), W, moments), U)
    nothing = Moments.zeros(9, U.device, U.dtype, 4000)
    assert torch.equal(least_squares(U, Vh, W, nothing, products(U, Vh, W, nothing)), U)


def test_the_usual_prior_is_taken_where_a_part_has_no_inputs() -> None:
    U, Vh, W, moments = problem(8, 9, 3, tokens=4000)
    wanted = least_squares(U, Vh, W, moments)
    for part in (moments, Moments.zeros(9, U.device, U.dtype, 2000)):
        assert torch.equal(least_squares(U, Vh, W, moments, products(U, Vh, W, part)), wanted)


@pytest.mark.parametrize(("off", "noise", "wanted"), [(1, 0, min(PRIORS)), (0.05, 1, None), (0, 10, max(PRIORS))])
@pytest.mark.parametrize("rows", [7, 512])
def test_the_prior_is_the_one_that_errs_least_on_the_other_part(
    off: float, noise: float, wanted: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "SAMPLED_ROWS", rows)
    tokens, generator = 4000, torch.Generator().manual_seed(1)
    away, Vh, W, _ = problem(14, 9, 4, tokens=tokens)
    U = W @ torch.linalg.pinv(Vh) + off * away  # the best one for white x̂, or away from it
    parts = []
    for _ in range(2):  # x makes the outputs; the noise is what x̂ does not tell of them
        seen = torch.randn(tokens, 9, generator=generator)
        x = seen + noise * torch.randn(tokens, 9, generator=generator)
        parts.append((x, seen))
    halves = [Moments(x.mT @ seen, seen.mT @ seen, tokens) for x, seen in parts]
    whole = Moments(halves[0].cross + halves[1].cross, halves[0].inputs + halves[1].inputs, 2 * tokens)

    def fitted(prior: int, moments: Moments) -> Tensor:
        monkeypatch.setattr(solver, "PRIOR_TOKENS", prior)
        return least_squares(U, Vh, W, moments)

    def error(prior: int) -> float:
        matrices = [fitted(prior, half) @ Vh for half in halves]
        differences = [x @ W.mT - seen @ M.mT for M, (x, seen) in zip(matrices, reversed(parts), strict=True)]
        return sum(float(difference[:, :: -(-14 // rows)].square().sum()) for difference in differences)

    best = min(PRIORS, key=error)
    assert wanted is None or best == wanted
    for half in halves:
        got = least_squares(U, Vh, W, whole, products(U, Vh, W, half))
        torch.testing.assert_close(got, fitted(best, whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [7, 9, 12])
def test_a_weight_carries_what_changes_in_its_inputs_as_the_least_squares_of_the_identity_do(n: int) -> None:
    _, _, W, moments = problem(n, 9, 1, tokens=3 * PRIOR_TOKENS)
    wanted = least_squares(W, torch.eye(9), W, moments)
    got = fit_weight(W, moments._replace(tokens=3 * WEIGHT_PRIOR_TOKENS))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(fit_weight(W, moments._replace(cross=moments.inputs)), W)
    nothing = Moments.zeros(9, W.device, W.dtype, 4000)
    assert torch.equal(fit_weight(W, nothing), W)  # a linear that sees only zeros


def test_flops_are_those_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 8)
    *matrices, moments = problem(96, 160, 40, tokens=480)
    solving = (1 + 2 * len(PRIORS)) * (2 * 40**3 // 3 + 2 * 96 * 40**2)  # not counted by PyTorch
    half = moments._replace(cross=moments.cross / 2, inputs=moments.inputs / 2, tokens=240)
    part = products(*matrices, half)
    assert matmul_flops(lambda: least_squares(*matrices, moments, part)) + solving == pytest.approx(
        least_squares_flops((96, 160), 40), rel=0.05
    )


def test_the_peaks_are_the_estimates() -> None:
    cases = [("least_squares", shape, break_even_rank(shape, "factored")) for shape in ((1200, 600), (600, 1200))]
    for (_, shape, rank), measured in zip(cases, peaks_of(cases), strict=True):
        assert measured == pytest.approx(least_squares_bytes(shape, rank), rel=0.1)


def test_the_map_is_the_least_squares_solution() -> None:
    y, z = torch.randn(80, 6, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64)
    y *= 1e3
    T = linear_map(y.mT @ y, z.mT @ y)
    torch.testing.assert_close(T, torch.linalg.lstsq(y, z).solution.mT, rtol=0, atol=2e-3)


def test_the_map_of_nothing_is_the_identity() -> None:
    y = torch.randn(80, 6, dtype=torch.float64)
    torch.testing.assert_close(linear_map(y.mT @ y, y.mT @ y), torch.eye(6, dtype=torch.float64))
