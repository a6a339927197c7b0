from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grasp_kernels import (
    Dense,
    Factors,
    gradients,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    singular_value_grad,
)
from tests.ops.inputs import factors, normal, seeded

K, N = 6, 5


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors if tensor is not None]


def linear_case(s: bool, bias: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    generator = seeded()
    x = normal((2, 3, K), generator)
    group = factors(N, K, 2, generator, s=s, bias=bias)

    def run(*flat: Tensor) -> Tensor:
        rest = iter(flat)
        x, *group = (next(rest) if present else None for present in (True, True, s, True, bias))
        return lowrank_linear(x, *group, backend="reference")  # type: ignore[arg-type]

    return run, leaves(x, *group)


def grouped_case() -> tuple[Callable[..., Any], list[Tensor]]:
    generator = seeded()
    x = normal((3, K), generator)
    first = factors(N, K, 2, generator, s=True, bias=False)
    second = factors(4, K, 3, generator, s=False, bias=True)

    def run(x: Tensor, U: Tensor, s: Tensor, Vh: Tensor, U2: Tensor, Vh2: Tensor, bias2: Tensor) -> tuple[Tensor, ...]:
        return lowrank_linear_grouped(x, [Factors(U, s, Vh), Factors(U2, None, Vh2, bias2)], backend="reference")

    return run, leaves(x, *first, *second)


def merged_case() -> tuple[Callable[..., Any], list[Tensor]]:
    _, inputs = grouped_case()

    def run(x: Tensor, U: Tensor, s: Tensor, Vh: Tensor, U2: Tensor, Vh2: Tensor, bias2: Tensor) -> Tensor:
        return lowrank_linear_merged(x, [Factors(U, s, Vh), Factors(U2, None, Vh2, bias2)], backend="reference")

    return run, inputs


def mixed_case() -> tuple[Callable[..., Any], list[Tensor]]:
    generator = seeded()
    x, weight, bias = normal((3, K), generator), normal((N, K), generator), normal((N,), generator)
    factored = factors(4, K, 3, generator, s=False, bias=False)

    def run(x: Tensor, weight: Tensor, bias: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
        members = [Dense(weight, bias), Factors(U, None, Vh), Dense(weight)]
        return lowrank_linear_merged(x, members, backend="reference")

    return run, leaves(x, weight, bias, *factored)


def glu_case(activation: str) -> tuple[Callable[..., Any], list[Tensor]]:
    generator = seeded()
    x = normal((3, K), generator)
    gate = factors(N, K, 2, generator, s=True, bias=True)
    up = factors(N, K, 3, generator, s=False, bias=False)

    def run(x: Tensor, U: Tensor, s: Tensor, Vh: Tensor, bias: Tensor, U2: Tensor, Vh2: Tensor) -> Tensor:
        gate, up = Factors(U, s, Vh, bias), Factors(U2, None, Vh2)
        return lowrank_glu(x, gate, up, activation=activation, backend="reference")

    return run, leaves(x, *gate, *up)


def svg_case(per_sample: bool, second_moment: str | None, masked: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    generator = seeded()
    tensors = [normal(shape, generator) for shape in ((4, K), (4, N), (N, 2), (2, K))]
    mask = torch.tensor([True, True, False, True]) if masked else None
    cu_seqlens = torch.tensor([0, 1, 1, 4])

    def run(*tensors: Tensor) -> Any:
        first, second = singular_value_grad(
            *tensors,
            cu_seqlens=cu_seqlens,
            per_sample=per_sample,
            second_moment=second_moment,
            mask=mask,
            backend="reference",
        )
        return first if second is None else (first, second)

    return run, leaves(*tensors)


CASES = {
    "linear": lambda: linear_case(s=False, bias=False),
    "linear with s and bias": lambda: linear_case(s=True, bias=True),
    "grouped": grouped_case,
    "merged": merged_case,
    "merged, partly dense": mixed_case,
    "silu glu": lambda: glu_case("silu"),
    "gelu glu": lambda: glu_case("gelu"),
    "gelu_tanh glu": lambda: glu_case("gelu_tanh"),
    "relu glu": lambda: glu_case("relu"),
    "summed gradient": lambda: svg_case(False, None, masked=False),
    "gradient with token moment": lambda: svg_case(False, "token", masked=True),
    "gradient with sample moment": lambda: svg_case(False, "sample", masked=True),
    "gradient per sample": lambda: svg_case(True, None, masked=True),
    "gradient per sample with token moment": lambda: svg_case(True, "token", masked=True),
    "gradient per sample with sample moment": lambda: svg_case(True, "sample", masked=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_first_derivatives(case: Callable[[], tuple[Callable[..., Any], list[Tensor]]]) -> None:
    run, inputs = case()
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_second_derivatives(case: Callable[[], tuple[Callable[..., Any], list[Tensor]]]) -> None:
    run, inputs = case()
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("keep", ["only", "all but"])
def test_only_tensors_that_require_a_gradient_get_one(
    case: Callable[[], tuple[Callable[..., Any], list[Tensor]]], keep: str
) -> None:
    run, inputs = case()
    outputs = run(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    expected = torch.autograd.grad([y.sin().sum() for y in outputs], inputs)
    for i in range(len(inputs)):
        wanted = [(j == i) == (keep == "only") for j in range(len(inputs))]
        some = [tensor.detach().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
        outputs = run(*some)
        torch.autograd.backward([y.sin().sum() for y in ((outputs,) if isinstance(outputs, Tensor) else outputs)])
        for tensor, want, exact in zip(some, wanted, expected, strict=True):
            assert (tensor.grad is not None) == want
            if want:
                torch.testing.assert_close(tensor.grad, exact, rtol=0, atol=1e-12)


def test_gradients_that_are_not_needed_cost_no_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = linear_case(s=True, bias=True)
    x, U, s, Vh, bias = (tensor.detach() for tensor in inputs)
    called: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    y = run(x, U, s, Vh, bias.requires_grad_())
    with Count():
        y.sum().backward()
    assert not {name for name in called if "mm" in name}
    assert any("sum" in name for name in called)


def test_outputs_of_a_group_may_be_unused() -> None:
    run, inputs = grouped_case()
    grads = torch.autograd.grad(run(*inputs)[0].sum(), inputs, allow_unused=True)
    alone = lowrank_linear(*inputs[:4]).sum()
    for got, expected in zip(grads[:4], torch.autograd.grad(alone, inputs[:4]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert all(grad is None or not grad.any() for grad in grads[4:])


@pytest.mark.parametrize("run", [lowrank_linear_grouped, lowrank_linear_merged])
def test_a_group_is_trained_under_activation_checkpointing(run: Callable[..., Any]) -> None:
    _, inputs = linear_case(s=False, bias=False)
    group = [Factors(inputs[1], None, inputs[2])] * 2

    def loss(x: Tensor) -> Tensor:
        y = run(x, group)
        return sum(part.sin().sum() for part in ([y] if isinstance(y, Tensor) else y))

    expected = torch.autograd.grad(loss(inputs[0]), inputs)
    got = torch.autograd.grad(checkpoint(loss, inputs[0], use_reentrant=False), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_tensor_shared_by_two_groups_gets_the_sum() -> None:
    run, inputs = linear_case(s=False, bias=False)
    (single,) = torch.autograd.grad(run(*inputs).sum(), inputs[1])
    group = Factors(inputs[1], None, inputs[2])
    (double,) = torch.autograd.grad([y.sum() for y in lowrank_linear_grouped(inputs[0], [group, group])], inputs[1])
    torch.testing.assert_close(double, 2 * single, rtol=0, atol=1e-12)


def test_members_are_rebuilt_from_the_columns() -> None:
    U, s, Vh, bias, U2, Vh2 = (torch.tensor(float(i)) for i in range(6))
    order = torch.arange(2)
    columns = [[U, U2], [s], [Vh, Vh2], [bias], [order], [], []]
    present = [True, True, True, True, *[False] * 3, True, False, True, False, True, False, False]
    assert gradients.to_members(columns, present, dense=False) == [
        Factors(U, s, Vh, bias),
        Factors(U2, None, Vh2, None, order),
    ]


@pytest.mark.parametrize("moment", [None, "token", "sample"])
def test_gradients_do_not_see_masked_tokens(moment: str | None) -> None:
    run, tensors = svg_case(False, moment, masked=True)

    def gradients() -> tuple[Tensor, ...]:
        results = run(*tensors)
        together = [results] if moment is None else results
        return torch.autograd.grad(sum(result.sum() for result in together), tensors)

    expected = gradients()
    masked = (expected[0] == 0).all(1)
    assert masked.any()
    with torch.no_grad():
        tensors[0][masked], tensors[1][masked] = torch.nan, torch.inf
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
