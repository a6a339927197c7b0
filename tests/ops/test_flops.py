from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import grasp_kernels
from grasp_kernels import Dense, Factors, registered
from grasp_kernels.flops import register_flop_formulas
from tests.ops.inputs import factors, normal, seeded

generator = seeded()
x, grad_y = normal((2, 3, 24), generator), normal((2, 3, 40), generator)
group, other = (factors(40, 24, rank, generator, s=True, bias=True) for rank in (5, 8))
pivoted = Factors(other.U[8:], None, other.Vh, order=torch.arange(40, dtype=torch.int32))
dense = Dense(normal((16, 24), generator), None)
# For each op the same call of the public function and of its implementation, which runs PyTorch's own products.
CALLS: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "linear": ("lowrank_linear", (x, *group), (x, *group)),
    "pivoted": ("lowrank_linear", (x, *pivoted), (x, *pivoted)),
    "one token": ("lowrank_linear", (x[0, 0], *group), (x[0, :1], *group)),
    "grouped": ("lowrank_linear_grouped", (x, [group, pivoted]), (x, [group, pivoted])),
    "merged": ("lowrank_linear_merged", (x, [group, dense, pivoted]), (x, [group, dense, pivoted])),
    "glu": ("lowrank_glu", (x, group, other), (x, group, other, "silu")),
    "gradient": (
        "singular_value_grad",
        (x, grad_y, group.U, group.Vh),
        (x, grad_y, group.U, group.Vh, None, False, "none", None),
    ),
}


def counted(call: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize(("op", "public", "implementation"), CALLS.values(), ids=CALLS)
def test_as_many_flops_as_in_plain_pytorch(op: str, public: tuple[Any, ...], implementation: tuple[Any, ...]) -> None:
    register_flop_formulas()
    found = counted(getattr(grasp_kernels, op), *public)
    assert found == counted(getattr(registered, op), *implementation, "reference")
    assert found > 0


def test_quantised_factors_count_as_floating_ones() -> None:
    register_flop_formulas()
    values, scales = torch.zeros(5, 12, dtype=torch.uint8), torch.ones(5, 1)
    found = counted(grasp_kernels.lowrank_linear, x.float(), group.U.float(), None, values, Vh_scales=scales)
    assert found == counted(grasp_kernels.lowrank_linear, x, *group)


def test_the_backward_pass_is_counted() -> None:
    register_flop_formulas()

    def step(linear: Callable[[Tensor], Tensor]) -> None:
        linear(x.clone().requires_grad_()).sum().backward()

    U, Vh = (nn.Parameter(factor.clone()) for factor in (group.U, group.Vh))
    plain = counted(step, lambda x: (x.flatten(0, 1) @ Vh.mT) @ U.mT)
    again = 2 * 6 * 5 * 24  # the product with Vh is not kept
    assert counted(step, lambda x: grasp_kernels.lowrank_linear(x, U, None, Vh)) == plain + again
