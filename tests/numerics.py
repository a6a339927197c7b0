"""The tolerance rule of ``grasp_kernels.numerics``, as an assertion."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_kernels.numerics import FLOORS, inaccuracy, relative_error

__all__ = ["FLOORS", "assert_accurate", "inaccuracy", "relative_error"]


def assert_accurate(kind: str, dtype: torch.dtype, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Fail with what ``inaccuracy`` finds."""
    complaint = inaccuracy(kind, dtype, got, plain, exact)
    assert complaint is None, complaint
