from __future__ import annotations

import pytest
import torch

from grasp_kernels import Factors, reference
from tests.definitions import ACTIVATIONS

# Small enough to check by hand: U = [[1], [2]], s = [3], Vh = [[1, -1]], so weight = [[3, -3], [6, -6]].
U, s, Vh, bias = (torch.tensor(values) for values in ([[1.0], [2.0]], [3.0], [[1.0, -1.0]], [10.0, 20.0]))
x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [5.0, 5.0]])


def test_lowrank_linear_by_hand() -> None:
    assert reference.lowrank_linear(x, U, s, Vh, bias).tolist() == [[13, 26], [13, 26], [10, 20]]
    assert reference.lowrank_linear(x, U, None, Vh, None).tolist() == [[1, 2], [1, 2], [0, 0]]


def test_pivoted_factors_by_hand() -> None:
    # h = x[0], and the other output is 2 h: y[1] = h, y[0] = 2 h.
    order = torch.tensor([1, 0], dtype=torch.int32)
    pivoted = Factors(torch.tensor([[2.0]]), None, torch.tensor([[1.0, 0.0]]), bias, order)
    assert pivoted.out_features == 2
    assert reference.lowrank_linear(x, *pivoted).tolist() == [[12, 21], [14, 22], [20, 25]]
    assert reference.lowrank_linear(x, *pivoted._replace(bias=None)).tolist() == [[2, 1], [4, 2], [10, 5]]


def test_grouped_by_hand() -> None:
    outputs = reference.lowrank_linear_grouped(x, [Factors(U, s, Vh, bias), Factors(U[:1], None, Vh)])
    assert [y.tolist() for y in outputs] == [[[13, 26], [13, 26], [10, 20]], [[1], [1], [0]]]


def test_glu_by_hand() -> None:
    y = reference.lowrank_glu(x - 2, Factors(U, s, Vh), Factors(U, None, Vh, bias), "relu")
    assert y.tolist() == [[3 * 11, 6 * 22], [3 * 11, 6 * 22], [0, 0]]


def test_singular_value_grad_by_hand() -> None:
    grad_y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    # Uᵀd = 1, 3, 3 and Vh x = 1, 1, 0: the tokens' gradients are 1, 3, 0.
    bounds = torch.tensor([0, 2, 2, 3])

    def run(*options: object) -> list[object]:
        return [part.tolist() for part in reference.singular_value_grad(x, grad_y, U, Vh, bounds, *options)]

    assert run(False, "none", None) == [[4], []]
    assert run(False, "token", None) == [[4], [1 + 9]]
    assert run(False, "sample", None) == [[4], [4**2]]
    assert run(True, "none", None) == [[[4], [0], [0]], []]
    assert run(True, "token", None) == [[[4], [0], [0]], [[10], [0], [0]]]
    assert run(True, "sample", None) == [[[4], [0], [0]], [[16], [0], [0]]]
    assert run(True, "token", torch.tensor([True, False, True])) == [[[1], [0], [0]], [[1], [0], [0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_singular_values_scale_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).to(dtype)
    Vh = torch.randn(8, 32, generator=generator).to(dtype)
    s = torch.rand(8, generator=generator) + 0.5
    h = torch.nn.functional.linear(x, Vh)
    assert torch.equal(reference.project(x, s, Vh), (h.double() * s.double()).float().to(dtype))
    assert not torch.equal(reference.project(x, s, Vh), h * s.to(dtype))


def test_low_precision_gradients_add_up_in_fp32() -> None:
    T = 4096  # bf16 cannot add them one by one up to 4096: 256 + 1 = 256
    ones = torch.ones(T, 1, dtype=torch.bfloat16)
    first, second = reference.singular_value_grad(ones, ones, ones[:1], ones[:1], None, False, "token", None)
    assert (first.dtype, first.item(), second.item()) == (torch.float32, T, T)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_backward(name: str, differentiable: bool) -> None:
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    y = ACTIVATIONS[name](x)
    torch.testing.assert_close(reference.ACTIVATIONS[name].forward(x), y, rtol=0, atol=1e-14)
    weights = torch.linspace(1, 2, 101, dtype=torch.float64)
    (grad,) = torch.autograd.grad(y, x, weights)
    inner = slice(0, 50), slice(51, 101)  # relu has no derivative at 0
    for part in inner:
        with torch.set_grad_enabled(differentiable):
            got = reference.ACTIVATIONS[name].backward(weights, x.detach())[part]
        torch.testing.assert_close(got, grad[part], rtol=0, atol=1e-14)


def test_empty_segments_sum_to_zero() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sums = reference.sum_segments(values, torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32))
    assert sums.tolist() == [[0, 0], [4, 6], [0, 0], [5, 6], [0, 0]]


def test_fp64_stays_fp64() -> None:
    assert reference.accumulation_dtype(torch.float64) == torch.float64
    assert {reference.accumulation_dtype(dtype) for dtype in (torch.float16, torch.bfloat16)} == {torch.float32}
