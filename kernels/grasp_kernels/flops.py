"""The FLOPs of the ops, for PyTorch's ``FlopCounterMode``, which counts an op that it does not know as 0."""

from __future__ import annotations

import functools
from math import prod
from typing import Any

from ._ops import ops
from .gradients import FIELDS, to_members
from .reference import Factors

Shape = Any  # in the place of a tensor


@functools.cache
def register_flop_formulas() -> None:
    """Let every ``FlopCounterMode`` that is made from now on count the ops: two FLOPs for each product of two numbers.

    Importing a model class of ``grasp`` does it. Quantised factors count as floating ones, and elementwise work as
    nothing. The backward pass is made of PyTorch's own ops, which are counted anyway.

    Example:
        >>> import torch
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> from grasp_kernels import lowrank_linear
        >>> from grasp_kernels.flops import register_flop_formulas
        >>> register_flop_formulas()
        >>> with FlopCounterMode(display=False) as counter:
        ...     y = lowrank_linear(torch.ones(2, 64), torch.ones(32, 8), None, torch.ones(8, 64))
        >>> counter.get_total_flops()  # 2 * 2 * 8 * (64 + 32)
        3072
    """
    from torch.utils.flop_counter import register_flop_formula  # imports Triton, which takes 0.4 s

    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(ops, name))(formula)


def _lowrank_linear(x: Shape, U: Shape, s: Shape, Vh: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * Vh[0] * (x[-1] + U[0])  # a pivoted U has no rows for the pivots


def _members(x: Shape, *args: Any, **_: Any) -> int:
    return sum(_member(x, member) for member in to_members(args[:FIELDS], args[FIELDS]))


def _member(x: Shape, member: Any) -> int:
    return _lowrank_linear(x, *member) if isinstance(member, Factors) else 2 * prod(x) * int(member.weight[0])


def _lowrank_glu(x: Shape, *args: Any, **_: Any) -> int:
    return _lowrank_linear(x, *Factors(*args[:FIELDS])) + _lowrank_linear(x, *Factors(*args[FIELDS : 2 * FIELDS]))


def _singular_value_grad(x: Shape, grad_y: Shape, U: Shape, Vh: Shape, *_: Any, **__: Any) -> int:
    return _lowrank_linear(x, U, None, Vh)


_FORMULAS = {
    "lowrank_linear": _lowrank_linear,
    "lowrank_linear_grouped": _members,
    "lowrank_linear_merged": _members,
    "lowrank_glu": _lowrank_glu,
    "singular_value_grad": _singular_value_grad,
}
