from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp_kernels import reference, routes
from tests.numerics import assert_accurate


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
    weight_grad = torch.zeros(20, 24, dtype=reference.accumulation_dtype(dtype))
    for rows in (slice(0, 25), slice(25, 40)):
        assert routes.accumulate_weight_grad_(weight_grad, x[rows], grad_y[rows]) is weight_grad
    options = (None, False, "none", None)
    exact, _ = reference.singular_value_grad(*(t.double() for t in (x, grad_y, U, Vh)), *options)
    plain, _ = reference.singular_value_grad(x, grad_y, U, Vh, *options)
    assert_accurate("singular_value_grad", dtype, routes.contract_weight_grad(weight_grad, U, Vh), plain, exact)


def test_results_of_the_chunked_route_share_no_memory() -> None:
    x, grad_y, U, Vh = torch.randn(4, 5), torch.randn(4, 3), torch.randn(3, 2), torch.randn(2, 5)
    first, second = routes.chunked(x, grad_y, U, Vh, torch.tensor([0, 1, 4]), True, "token", None)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
