from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

x, U, s, Vh, bias = torch.zeros(3, 8), torch.zeros(6, 2), torch.ones(2), torch.zeros(2, 8), torch.zeros(6)
grad_y, group = torch.zeros(3, 6), (U, s, Vh, bias, None, None, None)
order = torch.arange(8, dtype=torch.int32)  # of a U with 6 rows and rank 2
# Calls of registered ops that a public function would never make: (op, its arguments but the backend, message).
CALLS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "a short s": ("lowrank_linear", (x, U, s[:1], Vh, bias, None, None, None), r"s must be \(2,\), got \(1,\)"),
    "a short bias": ("lowrank_linear", (x, U, s, Vh, bias[:1], None, None, None), r"bias must be \(6,\), got \(1,\)"),
    "a half-precision U": (
        "lowrank_linear",
        (x, U.half(), s, Vh, bias, None, None, None),
        r"U .*torch\.float32, got torch\.float16",
    ),
    "a short Vh": ("lowrank_linear", (x, U, s, Vh[:, :7], bias, None, None, None), r"Vh \(2, 7\)"),
    "a group's short s": (
        "lowrank_linear_grouped",
        (x, [U, U], [s, s[:1]], [Vh, Vh], *[[]] * 4, [*[True] * 3, *[False] * 4] * 2),
        r"s must be \(2,\), got \(1,\)",
    ),
    "no present": ("lowrank_linear_grouped", (x, *[[]] * 8), "present must tell"),
    "a present of 3": ("lowrank_linear_grouped", (x, [U], [s], [Vh], *[[]] * 4, [True] * 3), "present must tell"),
    "a group without U": (
        "lowrank_linear_grouped",
        (x, [], [s], [Vh], [bias], *[[]] * 3, [False, *[True] * 3, *[False] * 3]),
        "present must tell",
    ),
    "a list too long": (
        "lowrank_linear_grouped",
        (x, [U, U], [s], [Vh], [bias], [order], [], [], [*[True] * 5, False, False]),
        "lists of 2, 1, 1, 1, 1, 0, 0",
    ),
    "a list too short": (
        "lowrank_linear_grouped",
        (x, [U], [], [Vh], [bias], [order], [], [], [*[True] * 5, False, False]),
        "lists of 1, 0, 1, 1, 1, 0, 0",
    ),
    "an s without a Vh": (
        "lowrank_linear_merged",
        (x, [U], [s], *[[]] * 5, [True, True, *[False] * 5]),
        "U and Vh, a dense one U",
    ),
    "a group of dense and low-rank linears": (
        "lowrank_linear_grouped",
        (x, [U, Vh], [], [Vh], *[[]] * 4, [True, False, True, *[False] * 4, True, *[False] * 6]),
        "U and Vh. The lists",
    ),
    "a short weight": (
        "lowrank_linear_merged",
        (x, [Vh[:, :7]], *[[]] * 6, [True, *[False] * 6]),
        r"weight \(N, K\).*\(2, 7\)",
    ),
    "a weight's short bias": (
        "lowrank_linear_merged",
        (x, [Vh], [], [], [bias], *[[]] * 3, [True, False, False, True, *[False] * 3]),
        r"bias must be \(2,\), got \(6,\)",
    ),
    "a group's short order": (
        "lowrank_linear_grouped",
        (x, [U, U], [], [Vh, Vh], [], [order, order[:6]], [], [], [True, False, True, False, True, False, False] * 2),
        r"order must be \(8,\)",
    ),
    "an order of int64": ("lowrank_linear", (x, U, None, Vh, None, order.long(), None, None), "order must be int32"),
    "an order and an s": ("lowrank_linear", (x, U, s, Vh, None, order, None, None), "pivoted factors have no s"),
    "an up of another width": ("lowrank_glu", (x, *group, U[:5], s, Vh, *[None] * 4, "silu"), "one width, got 6 and 5"),
    "an unknown activation": ("lowrank_glu", (x, *group, *group, "tanh"), "unknown activation 'tanh'"),
    "an unknown moment": ("singular_value_grad", (x, grad_y, U, Vh, None, False, "third", None), "'third'"),
    "a short mask": ("singular_value_grad", (x, grad_y, U, Vh, None, False, "none", x[:2, 0] > 0), r"mask .*\(2,\)"),
    "a short grad_y": ("singular_value_grad", (x, grad_y[:2], U, Vh, None, False, "none", None), r"grad_y .*\(2, 6\)"),
}
EVERY_CALL = pytest.mark.parametrize(("op", "arguments", "message"), CALLS.values(), ids=CALLS)


def convert(convert_tensor: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, convert_tensor, arguments)


@EVERY_CALL
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_registered_ops_check_their_arguments(op: str, arguments: Any, message: str, backend: str) -> None:
    run = getattr(torch.ops.grasp, op)
    with pytest.raises(ValueError, match=message):
        run(*arguments, backend)
    with pytest.raises(ValueError, match=message):
        run(*convert(lambda tensor: tensor.to("meta"), arguments), backend)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        run(*convert(mode.from_tensor, arguments), backend)


def test_a_wrong_call_is_refused_when_it_is_traced() -> None:
    def wrong(x: Tensor) -> Tensor:
        return torch.ops.grasp.lowrank_linear(x, U, s[:1], Vh, bias, None, None, None, "auto")

    torch.compiler.reset()
    with pytest.raises(Exception, match=r"s must be \(2,\), got \(1,\)"):
        torch.compile(wrong, fullgraph=True, backend="aot_eager")(x)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wrong(x)

    with pytest.raises(Exception, match=r"s must be \(2,\), got \(1,\)"):
        torch.export.export(Module(), (x,))


def test_unknown_backends_are_refused_without_data() -> None:
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        torch.ops.grasp.lowrank_linear(*convert(lambda tensor: tensor.to("meta"), (x, *group)), "tpu")


@pytest.mark.parametrize(("per_sample", "second_moment"), [(True, "token"), (False, "sample"), (True, "sample")])
def test_without_bounds_each_index_of_the_leading_dimensions_is_a_sample(per_sample: bool, second_moment: str) -> None:
    factors = torch.randn(6, 2), torch.randn(2, 8)
    tensors = [torch.randn(4, 3, 8, requires_grad=True), torch.randn(4, 3, 6), *factors]

    def run(cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        options = (cu_seqlens, per_sample, second_moment, None, "auto")
        first, second = torch.ops.grasp.singular_value_grad(*tensors, *options)
        return first, second, torch.autograd.grad((first.sin() + second).sum(), tensors[0])[0]

    for got, expected in zip(run(None), run(torch.tensor([0, 3, 6, 9, 12])), strict=True):
        torch.testing.assert_close(got, expected)
