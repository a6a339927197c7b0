"""The tolerance rule: the norm-wise error against float64 is at most twice that of plain PyTorch plus a floor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# (kind of op, dtype of its inputs) → relative error that is always accepted.
FLOORS: dict[tuple[str, torch.dtype], float] = {
    ("linear", torch.float64): 1e-14,
    ("linear", torch.float32): 2e-6,
    ("linear", torch.float16): 1e-3,
    ("linear", torch.bfloat16): 6e-3,
    ("singular_value_grad", torch.float64): 1e-14,
    ("singular_value_grad", torch.float32): 5e-6,
    ("singular_value_grad", torch.float16): 2e-5,
    ("singular_value_grad", torch.bfloat16): 2e-5,
}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """``|got - exact| / |exact|`` in the 2-norm over all elements; infinite where ``got`` is not finite.

    Args:
        got: any dtype.
        exact: float64, the shape of ``got``. If all of it is zero, any deviation is an infinite error.
    """
    deviation = torch.linalg.vector_norm(got.double() - exact).item()
    if not math.isfinite(deviation):
        return math.inf
    if deviation == 0:
        return 0.0
    norm = torch.linalg.vector_norm(exact).item()
    return deviation / norm if norm > 0 else math.inf


def inaccuracy(kind: str, dtype: torch.dtype, got: Tensor, plain: Tensor, exact: Tensor) -> str | None:
    """How a result breaks the rule, or ``None`` if it does not. Its shape and dtype must be those of plain PyTorch.

    Args:
        kind: ``"linear"`` for outputs of linears and their gradients, or ``"singular_value_grad"``.
        dtype: dtype of the inputs.
        got: the result under test.
        plain: the result of plain PyTorch from the same inputs in the same dtype; in fp32 for
            ``"singular_value_grad"``.
        exact: the result from the same inputs in float64.
    """
    if got.shape != exact.shape or got.dtype != plain.dtype:
        return f"got {got.dtype} {tuple(got.shape)}, expected {plain.dtype} {tuple(exact.shape)}"
    error, allowed = relative_error(got, exact), 2 * relative_error(plain, exact) + FLOORS[kind, dtype]
    return (
        None if error <= allowed else f"relative error {error:.2e} of {kind} in {dtype}, at most {allowed:.2e} allowed"
    )
