"""The accuracy of low-rank linears of every form and storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grasp_kernels import Factors
from tests.definitions import dense_linear, linear
from tests.numerics import assert_accurate
from tests.ops.inputs import double


def check_linear(y: Tensor, x: Tensor, group: Factors) -> None:
    """Compare an output with float64 by the tolerance rule."""
    plain, exact = (group.dequantized(x.shape[-1], dtype) for dtype in (x.dtype, torch.float64))
    assert_accurate("linear", x.dtype, y, linear(x, plain), dense_linear(x.double(), double(exact)))


def check_linears(ys: Sequence[Tensor], x: Tensor, groups: Sequence[Factors]) -> None:
    """Compare the outputs of a group."""
    for y, group in zip(ys, groups, strict=True):
        check_linear(y, x, group)
