from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp_kernels import singular_value_grad
from tests.definitions import singular_value_grad as naive
from tests.numerics import assert_accurate
from tests.ops.inputs import BACKEND_NAMES, DEVICES, DTYPES, LAYOUTS, normal, require, seeded, tokens
from tests.pairwise import Case, label, pairwise

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("backend", BACKEND_NAMES),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(
    rows: int, N: int, K: int, rank: int, *, dtype: torch.dtype, device: str, layout: str = "contiguous", ndim: int = 2
) -> Inputs:
    """x, grad_y, U and Vh."""
    generator = seeded()
    return (
        tokens(rows, K, ndim, generator, dtype=dtype, device=device, layout=layout),
        tokens(rows, N, ndim, generator, dtype=dtype, device=device, layout=layout),
        normal((N, rank), generator, dtype=dtype, device=device, layout=layout, scale=N**-0.5),
        normal((rank, K), generator, dtype=dtype, device=device, layout=layout, scale=K**-0.5),
    )


def check(backend: str, tensors: Inputs, **options: object) -> None:
    require(backend, "singular_value_grad", tensors[0], tensors[2].shape[1])
    got = singular_value_grad(*tensors, backend=backend, **options)  # type: ignore[arg-type]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    plain = naive(*(tensor.to(wide) for tensor in tensors), **options)  # type: ignore[arg-type]
    exact = naive(*(tensor.double() for tensor in tensors), **options)  # type: ignore[arg-type]
    assert_accurate("singular_value_grad", tensors[0].dtype, got.first, plain[0], exact[0])
    if options.get("second_moment") is None:
        assert got.second is None
    else:
        assert got.second is not None
        assert plain[1] is not None
        assert exact[1] is not None
        assert_accurate("singular_value_grad", tensors[0].dtype, got.second, plain[1], exact[1])


@pytest.mark.parametrize(
    "case",
    pairwise(
        rows=(33, 7, 1, 0),
        N=(63, 128, 16),
        K=(128, 63, 16),
        rank=(5, 32, 8, 1),
        dtype=DTYPES,
        layout=LAYOUTS,
        ndim=(3, 2),
        per_sample=(True, False),
        second_moment=("token", "sample", None),
        masked=(True, False),
    ),
    ids=label,
)
def test_matches_a_loop_over_tokens(backend: str, device: str, case: Case) -> None:
    shape = {axis: case[axis] for axis in ("rows", "N", "K", "rank", "dtype", "layout", "ndim")}
    tensors = inputs(**shape, device=device)
    mask = torch.rand(tensors[0].shape[:-1], generator=seeded(1)).to(device) < 0.6 if case["masked"] else None
    check(backend, tensors, per_sample=case["per_sample"], second_moment=case["second_moment"], mask=mask)


@pytest.mark.parametrize("per_sample", [True, False])
def test_fp64_keeps_its_precision(backend: str, device: str, per_sample: bool) -> None:
    tensors = inputs(33, 63, 16, 5, dtype=torch.float64, device=device, ndim=3)
    check(backend, tensors, per_sample=per_sample, second_moment="sample")


RAGGED = {
    "one sample": [0, 33],
    "an empty sample in the middle": [0, 12, 12, 33],
    "empty samples at both ends": [0, 0, 1, 33, 33],
    "one token each": list(range(34)),
}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("second_moment", ["token", "sample"])
@pytest.mark.parametrize("bounds", RAGGED.values(), ids=RAGGED)
def test_ragged_samples(
    backend: str, device: str, bounds: list[int], second_moment: str, per_sample: bool, index_dtype: torch.dtype
) -> None:
    tensors = inputs(33, 16, 24, 5, dtype=torch.float32, device=device)
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype, device=device)
    check(backend, tensors, cu_seqlens=cu_seqlens, per_sample=per_sample, second_moment=second_moment)


def test_samples_that_straddle_tiles(backend: str, device: str) -> None:
    tensors = inputs(300, 48, 40, 20, dtype=torch.bfloat16, device=device, layout="transposed")
    cu_seqlens = torch.tensor([0, 100, 100, 270, 300], device=device)
    mask = torch.arange(300, device=device) % 5 != 0
    check(backend, tensors, cu_seqlens=cu_seqlens, per_sample=True, second_moment="token", mask=mask)


@pytest.mark.parametrize("second_moment", [None, "token", "sample"])
def test_a_mask_of_all_tokens_gives_zeros(backend: str, device: str, second_moment: str | None) -> None:
    tensors = inputs(7, 16, 24, 5, dtype=torch.float32, device=device)
    check(backend, tensors, second_moment=second_moment, mask=torch.zeros(7, dtype=torch.bool, device=device))


def test_masked_tokens_may_be_infinite_or_nan(backend: str, device: str) -> None:
    x, grad_y, U, Vh = inputs(7, 16, 24, 5, dtype=torch.float32, device=device)
    require(backend, "singular_value_grad", x, 5)
    mask = torch.arange(7, device=device) != 3
    clean = singular_value_grad(x, grad_y, U, Vh, mask=mask, second_moment="token", backend=backend)
    x[3], grad_y[3] = torch.inf, torch.nan
    dirty = singular_value_grad(x, grad_y, U, Vh, mask=mask, second_moment="token", backend=backend)
    assert torch.equal(clean.first, dirty.first)
    assert clean.second is not None
    assert dirty.second is not None
    assert torch.equal(clean.second, dirty.second)


def test_is_the_diagonal_of_the_weights_gradient(backend: str, device: str) -> None:
    generator = seeded()
    weight = normal((24, 16), generator, dtype=torch.float32, device=device).requires_grad_()
    x = normal((2, 9, 16), generator, dtype=torch.float32, device=device)
    require(backend, "singular_value_grad", x, 16)
    y = torch.nn.functional.linear(x, weight)
    y.retain_grad()
    y.sin().sum().backward()
    assert y.grad is not None
    assert weight.grad is not None
    U, _, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    got = singular_value_grad(x, y.grad, U, Vh, backend=backend).first
    exact = torch.diagonal(U.double().mT @ weight.grad.double() @ Vh.double().mT)
    plain = torch.diagonal(U.mT @ weight.grad @ Vh.mT)
    assert_accurate("singular_value_grad", torch.float32, got, plain, exact)


def test_runs_agree_bit_for_bit(backend: str, device: str) -> None:
    tensors = inputs(300, 48, 40, 20, dtype=torch.float32, device=device)
    require(backend, "singular_value_grad", tensors[0], 20)
    first, second = (singular_value_grad(*tensors, second_moment="token", backend=backend) for _ in range(2))
    assert torch.equal(first.first, second.first)
    assert first.second is not None
    assert second.second is not None
    assert torch.equal(first.second, second.second)
