"""The checks of the public ops' arguments, done once; every message says what was got and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_kernels.reference import Factors

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_factors(x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None = None) -> None:
    """Check that the factors apply to ``x``. A valid call passes one test of 1 µs; the others find what is wrong.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree.
    """
    if not _agree(x, U, s, Vh, bias):
        factors = Factors(U, s, Vh, bias)
        _check_shapes(x, factors)
        _check_dtypes(x, factors)
        _check_devices(x, factors)


def check_singular_value_grad(
    x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> None:
    """Check the arguments of ``singular_value_grad`` but not the values of ``cu_seqlens``.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree.
    """
    check_factors(x, U, None, Vh)
    if grad_y.shape != (*x.shape[:-1], U.shape[0]):
        raise ValueError(f"grad_y must be {(*x.shape[:-1], U.shape[0])}, got {_shape(grad_y)}")
    if grad_y.dtype != x.dtype or grad_y.device != x.device:
        raise ValueError(f"grad_y must be {x.dtype} on {x.device}, got {grad_y.dtype} on {grad_y.device}")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device):
        raise ValueError(
            f"mask must be bool {_shape(x)[:-1]} on {x.device}, got {mask.dtype} {_shape(mask)} on {mask.device}"
        )
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be (B + 1,) int32 or int64 with B >= 1, got {_shape(cu_seqlens)} {cu_seqlens.dtype}"
            )
        if cu_seqlens.device != x.device:
            raise ValueError(f"cu_seqlens must be on the device of x, {x.device}, got {cu_seqlens.device}")


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Check the values of ``cu_seqlens``; not while a CUDA graph is captured, because that would synchronize.

    Raises:
        ValueError: if they do not rise from 0 to ``tokens``.
    """
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {bounds}")


def _agree(x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None) -> bool:
    left, right, dtype, device = U.shape, Vh.shape, x.dtype, x.device
    return (
        dtype in DTYPES
        and x.dim() > 0
        and len(left) == 2
        and right == (left[1], x.shape[-1])
        and 0 not in left
        and 0 not in right
        and U.dtype == dtype == Vh.dtype
        and U.device == device == Vh.device
        and (s is None or (s.shape == left[1:] and s.dtype in (torch.float32, dtype) and s.device == device))
        and (bias is None or (bias.shape == left[:1] and bias.dtype == dtype and bias.device == device))
    )


def _check_shapes(x: Tensor, factors: Factors) -> None:
    U, s, Vh, bias = factors
    if x.dim() < 1 or U.dim() != 2 or Vh.dim() != 2 or U.shape[1] != Vh.shape[0] or x.shape[-1] != Vh.shape[1]:
        raise ValueError(f"expected x (..., K), U (N, R), Vh (R, K); got x {_shape(x)}, U {_shape(U)}, Vh {_shape(Vh)}")
    if 0 in U.shape or 0 in Vh.shape:
        raise ValueError(f"rank, N and K must be at least 1; got U {_shape(U)} and Vh {_shape(Vh)}")
    if s is not None and s.shape != (U.shape[1],):
        raise ValueError(f"s must be ({U.shape[1]},), got {_shape(s)}")
    if bias is not None and bias.shape != (U.shape[0],):
        raise ValueError(f"bias must be ({U.shape[0]},), got {_shape(bias)}")


def _check_dtypes(x: Tensor, factors: Factors) -> None:
    U, s, Vh, bias = factors
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    for name, tensor in (("U", U), ("Vh", Vh), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}; cast one of them")
    if s is not None and s.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"s must be float32 or the dtype of x, {x.dtype}, got {s.dtype}")


def _check_devices(x: Tensor, factors: Factors) -> None:
    for name, tensor in zip(Factors._fields, factors, strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
