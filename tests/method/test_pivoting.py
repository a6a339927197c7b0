from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp.errors import NonFiniteError
from grasp.method.pivoting import (
    LARGEST_COEFFICIENT,
    LARGEST_GROWTH,
    Pivoted,
    _eliminate,
    other_rows,
    pivot,
    pivot_bytes,
    rounding_growth,
)
from tests.method.resources import peaks_of


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def treacherous(rank: int) -> Tensor:
    """(rank + 1, rank): elimination exchanges no rows, and C of the last row is -2^(rank - 1) … -2, -1."""
    return torch.tril(-torch.ones(rank + 1, rank, dtype=torch.float64), -1) + torch.eye(rank + 1, rank)


def rebuilt(factors: Pivoted) -> Tensor:
    size = len(factors.pivots) + len(factors.C)
    weight = factors.Vp.new_full((size, factors.Vp.shape[1]), torch.nan)
    weight[factors.pivots], weight[other_rows(factors.pivots, size)] = factors.Vp, factors.C @ factors.Vp
    return weight


@st.composite
def factors_of_any_rank(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """U and Vh in fp64, with groups of very different size; some rows of U may be equal, and rows and columns 0."""
    n, k, seed = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 999))
    rank, decades = draw(st.integers(1, n)), draw(st.integers(0, 12))
    U = random(n, rank, seed=seed) * torch.logspace(0, -decades, rank, dtype=torch.float64)
    row = st.integers(0, n - 1)
    U[draw(st.lists(row, max_size=4))] = U[draw(row)].clone()
    U[draw(st.lists(row, max_size=2))] = 0
    U[:, draw(st.lists(st.integers(0, rank - 1), max_size=1))] = 0
    return U, random(rank, k, seed=seed + 1)


@settings(deadline=None, max_examples=40)
@given(factors_of_any_rank())
def test_pivoted_factors_give_the_weight_back_with_small_coefficients(given_factors: tuple[Tensor, Tensor]) -> None:
    U, Vh = given_factors
    (n, rank), k = U.shape, Vh.shape[1]
    factors = pivot(U, Vh)
    pivots = factors.pivots.tolist()
    assert pivots == sorted(set(pivots))
    assert len(pivots) == rank
    assert pivots[0] >= 0
    assert pivots[-1] < n
    assert (factors.C.shape, factors.Vp.shape) == ((n - rank, rank), (rank, k))
    assert not (factors.C.abs() > LARGEST_COEFFICIENT).any()
    largest = float((U.abs() @ Vh.abs()).max())
    torch.testing.assert_close(rebuilt(factors), U @ Vh, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("rank", [2, 9, 40])
def test_rows_are_exchanged_where_elimination_gives_large_coefficients(rank: int) -> None:
    U = treacherous(rank)
    order, C = _eliminate(U)
    assert order.tolist() == list(range(rank + 1))
    assert C.abs().max() == 2.0 ** (rank - 1)
    factors = pivot(U, torch.eye(rank, dtype=torch.float64))
    assert factors.C.abs().max() <= LARGEST_COEFFICIENT
    torch.testing.assert_close(rebuilt(factors), U, rtol=0, atol=1e-12)


def test_three_rows_by_hand() -> None:
    U, Vh = torch.tensor([[1.0, 0.0], [4.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pivots, C, Vp, growth = pivot(U, Vh)
    assert pivots.tolist() == [1, 2]  # elimination takes 4 of the first column, then 3 of the second
    torch.testing.assert_close(C, torch.tensor([[1 / 4, -1 / 6]]))  # (1, 0) = (4, 2) / 4 - (0, 3) / 6
    torch.testing.assert_close(Vp, torch.tensor([[10.0, 16.0], [9.0, 12.0]]))
    kept, grown, rest = 356 + 225, 356 / 16 + 225 / 36, 1 + 4
    assert growth == pytest.approx(math.sqrt((kept + 2 * grown) / (kept + rest)))


def test_a_weight_of_full_row_rank_is_its_own_pivots() -> None:
    U, Vh = random(5, 5), random(5, 7)
    pivots, C, Vp, growth = pivot(U, Vh)
    assert pivots.tolist() == [0, 1, 2, 3, 4]
    assert C.shape == (0, 5)
    torch.testing.assert_close(Vp, U @ Vh)
    assert growth == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_coefficients_and_growth_do_not_depend_on_the_scale_of_groups_or_of_the_weight(scale: float) -> None:
    U, Vh, scales = random(9, 4), random(4, 6), torch.tensor([1e-3, 7.0, 1e4, 0.2], dtype=torch.float64)
    plain = pivot(U, Vh)
    scaled = pivot((scale * U * scales).float(), (Vh / scales[:, None]).float())
    assert torch.equal(scaled.pivots, plain.pivots)
    torch.testing.assert_close(scaled.C, plain.C.float(), rtol=1e-5, atol=1e-5)
    assert scaled.growth == pytest.approx(plain.growth, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_result_is_at_least_fp32_and_exact_for_the_given_factors(dtype: torch.dtype) -> None:
    U, Vh = random(33, 8, dtype=torch.float64).to(dtype), random(8, 17, seed=1).to(dtype)
    factors = pivot(U, Vh)
    assert factors.C.dtype == factors.Vp.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-5 if dtype != torch.float64 else 1e-13
    torch.testing.assert_close(rebuilt(factors).double(), U.double() @ Vh.double(), rtol=0, atol=tolerance)


def test_growth_is_how_much_rounding_changes_the_weight() -> None:
    U, Vh = random(60, 12), random(12, 40)
    factors = pivot(U, Vh)
    weight, errors = rebuilt(factors), []
    for seed in range(20):
        C, Vp = (m + 1e-6 * m * random(*m.shape, seed=seed + i) for i, m in enumerate((factors.C, factors.Vp)))
        errors.append((rebuilt(factors._replace(C=C, Vp=Vp)) - weight).norm() / weight.norm() / 1e-6)
    assert rounding_growth(factors.C, factors.Vp) == pytest.approx(float(sum(errors) / 20), rel=0.03)


def test_growth_of_zeros_is_1() -> None:
    assert pivot(torch.zeros(4, 2), torch.ones(2, 3)).growth == 1
    assert pivot(torch.ones(4, 2), torch.zeros(2, 3)).growth == 1


def test_a_weight_whose_rows_cancel_is_not_pivoted() -> None:
    """Two large, almost equal rows, and many small ones that are their difference."""
    many = 2 * int(LARGEST_GROWTH**2)
    U = torch.tensor([[1.0, 0.0], [0.0, 1.0], *[[0.5, -0.5]] * many])
    Vh = torch.ones(2, 3) + 1e-3 * random(2, 3, dtype=torch.float32)
    assert pivot(U, Vh).growth > LARGEST_GROWTH
    assert pivot(U[: 2 + many // 8], Vh).growth < LARGEST_GROWTH


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_factors_that_are_not_finite_are_refused(bad: float, which: int) -> None:
    factors = [torch.ones(4, 2), torch.ones(2, 3)]
    factors[which][1, 1] = bad
    with pytest.raises(NonFiniteError, match="expected finite factors"):
        pivot(*factors)


@pytest.mark.parametrize(("left", "right"), [((4, 2), (3, 5)), ((2, 3), (3, 5)), ((4, 0), (0, 5))])
def test_ranks_that_do_not_fit_are_refused(left: tuple[int, int], right: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"1 ≤ R ≤ N, got \(\d, \d\) and \(\d, 5\)"):
        pivot(torch.ones(left), torch.ones(right))


def test_the_arguments_are_not_changed() -> None:
    U, Vh = treacherous(6), random(6, 4)
    copies = U.clone(), Vh.clone()
    pivot(U, Vh)
    assert torch.equal(U, copies[0])
    assert torch.equal(Vh, copies[1])


def test_the_peaks_are_the_estimates() -> None:
    cases = [("pivot", shape, rank) for shape in ((1200, 600), (600, 1200)) for rank in (300, 590)]
    for (_, shape, rank), measured in zip(cases, peaks_of(cases), strict=True):
        assert measured == pytest.approx(pivot_bytes(shape, rank), rel=0.1)
