from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# Rank, and the block of tokens and ranks on a GPU. Two blocks in fp32 are at most 32 MB; fewer than 128 tokens or
# tiles of 128 x 256 would leave processors idle.
GPU_BLOCKS = {81: (51_712, 81), 512: (8192, 512), 4096: (1024, 4096), 12_345: (256, 12_345), 10**6: (128, 2**15)}


@pytest.mark.parametrize(("rank", "block"), GPU_BLOCKS.items())
def test_a_block_of_a_gpu_fits_its_cache(rank: int, block: tuple[int, int]) -> None:
    assert routes.block_shape("cuda", rank) == block
    assert routes.block_shape("cpu", rank) == (routes.BLOCK_TOKENS, routes.BLOCK_RANKS)


class Allocations(TorchDispatchMode):
    """The elements of the largest tensor that an op returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and "view" not in func.name() and "slice" not in func.name():
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("bounds", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("second_moment", ["token", "sample"])
def test_no_value_is_read_on_the_host(
    bounds: torch.dtype | None, second_moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: ``tolist``, ``item`` and whatever else would wait for a GPU raises."""
    block = routes.block_shape("cuda", 512)
    monkeypatch.setattr(routes, "block_shape", lambda *_: block)
    with FakeTensorMode(), Allocations() as allocations:
        x, grad_y = torch.empty(20_000, 64, dtype=torch.bfloat16), torch.empty(20_000, 48, dtype=torch.bfloat16)
        U, Vh = torch.empty(48, 512, dtype=torch.bfloat16), torch.empty(512, 64, dtype=torch.bfloat16)
        mask = torch.empty(20_000, dtype=torch.bool)
        cu_seqlens = None if bounds is None else torch.empty(8, dtype=bounds)
        allocations.largest = 0
        first, second = routes.chunked(x, grad_y, U, Vh, cu_seqlens, bounds is not None, second_moment, mask)
    assert allocations.largest == routes.BLOCK_ELEMENTS
    samples = () if bounds is None else (7,)
    assert first.shape == second.shape == (*samples, 512)
    assert first.dtype == torch.float32


def test_the_rows_of_a_sample_are_summed_apart_from_its_neighbours() -> None:
    x, grad_y, U, Vh = inputs(40, 24, 20, 11, torch.float32)
    alone, _ = routes.chunked(x[7:], grad_y[7:], U, Vh, torch.tensor([0, 33]), True, "none", None)
    x[:7] = torch.nan
    both, _ = routes.chunked(x, grad_y, U, Vh, torch.tensor([0, 7, 40]), True, "none", None)
    torch.testing.assert_close(both[1], alone[0])


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
