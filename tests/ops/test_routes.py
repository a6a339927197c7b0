from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grasp_kernels import reference, routes
from tests.numerics import assert_accurate

SIZES = st.integers(1, 20_000)
ENOUGH = 1 << 62


@given(tokens=SIZES, m=SIZES, n=SIZES, data=st.data())
def test_the_rule_compares_the_flops_of_the_routes(tokens: int, m: int, n: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(m, n)))
    factored_wins = r * (m + n) <= m * n or tokens * (r * (m + n) - m * n) <= m * n * r
    route = routes.choose_route(tokens, m, n, r, plain_sum=True, spare_bytes=ENOUGH, fused=True)
    assert route == ("fused" if factored_wins else "dense")


@pytest.mark.parametrize(("tokens", "expected"), [(4096, "fused"), (4097, "dense")])
def test_at_full_rank_a_square_weight_changes_route_at_as_many_tokens(tokens: int, expected: str) -> None:
    assert routes.choose_route(tokens, 4096, 4096, 4096, plain_sum=True, spare_bytes=ENOUGH, fused=True) == expected


def test_dense_needs_a_plain_sum_and_memory_for_it() -> None:
    def choose(*, plain_sum: bool, spare_bytes: int) -> str:
        return routes.choose_route(10**6, 64, 32, 32, plain_sum=plain_sum, spare_bytes=spare_bytes, fused=True)

    assert choose(plain_sum=True, spare_bytes=4 * 64 * 32) == "dense"
    assert choose(plain_sum=True, spare_bytes=4 * 64 * 32 - 1) == "fused"
    assert choose(plain_sum=False, spare_bytes=ENOUGH) == "fused"


def test_two_matmuls_replace_a_kernel_that_does_not_run() -> None:
    assert routes.choose_route(10, 64, 64, 4, plain_sum=True, spare_bytes=ENOUGH, fused=False) == "chunked"
    assert routes.choose_route(10**6, 64, 64, 64, plain_sum=True, spare_bytes=ENOUGH, fused=False) == "dense"


def inputs(tokens: int, K: int, N: int, R: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, K), (tokens, N), (N, R), (R, K))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(routes, "BLOCK_RANKS", 4)
    monkeypatch.setattr(routes, "BLOCK_ROWS", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second_moment", ["none", "token", "sample"])
@pytest.mark.parametrize("bounds", [None, [0, 0, 5, 16, 33, 33, 40]], ids=["one sample", "ragged"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_chunks_add_up_to_the_reference(
    dtype: torch.dtype, second_moment: str, bounds: list[int] | None, per_sample: bool
) -> None:
    tensors = inputs(40, 24, 20, 11, dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    if cu_seqlens is None and (per_sample or second_moment == "sample"):
        cu_seqlens = torch.tensor([0, 40])
    options = (cu_seqlens, per_sample, second_moment, torch.arange(40) % 5 != 2)
    exact = reference.singular_value_grad(*(tensor.double() for tensor in tensors), *options)
    plain = reference.singular_value_grad(*tensors, *options)
    for got, plain_part, exact_part in zip(routes.chunked(*tensors, *options), plain, exact, strict=True):
        assert_accurate("singular_value_grad", dtype, got, plain_part, exact_part)


def test_chunks_of_no_tokens_are_zero() -> None:
    first, second = routes.chunked(*inputs(0, 8, 8, 3, torch.float32), torch.tensor([0, 0, 0]), True, "token", None)
    assert first.tolist() == second.tolist() == [[0.0] * 3] * 2


def test_chunks_bound_the_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain_matmul = routes._matmul

    def watched(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal largest
        product = plain_matmul(a, b, dtype)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(routes, "_matmul", watched)
    routes.chunked(*inputs(10_000, 4, 4, 1100, torch.float32), None, False, "token", None)
    assert largest == routes.BLOCK_TOKENS * routes.BLOCK_RANKS


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_accumulated_over_calls_is_the_reference(dtype: torch.dtype) -> None:
    x, grad_y, U, Vh = inputs(40, 24, 20, 11, dtype)
    mask = torch.arange(40) % 5 != 2
    weight_grad = torch.zeros(20, 24, dtype=reference.accumulation_dtype(dtype))
    for rows in (slice(0, 25), slice(25, 40)):
        assert routes.accumulate_weight_grad_(weight_grad, x[rows], grad_y[rows], mask[rows]) is weight_grad
    options = (None, False, "none", mask)
    exact, _ = reference.singular_value_grad(*(t.double() for t in (x, grad_y, U, Vh)), *options)
    plain, _ = reference.singular_value_grad(x, grad_y, U, Vh, *options)
    assert_accurate("singular_value_grad", dtype, routes.contract_weight_grad(weight_grad, U, Vh), plain, exact)


def test_results_of_the_chunked_route_share_no_memory() -> None:
    x, grad_y, U, Vh = torch.randn(4, 5), torch.randn(4, 3), torch.randn(3, 2), torch.randn(2, 5)
    first, second = routes.chunked(x, grad_y, U, Vh, torch.tensor([0, 1, 4]), True, "token", None)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
