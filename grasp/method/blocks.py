"""Work in fp64 on large matrices of other dtypes, of which few rows are converted at a time."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 512
_WITHOUT_FP64 = ("mps",)


def row_blocks(size: int) -> list[slice]:
    """Consecutive ranges of at most ``BLOCK_ROWS`` rows."""
    return [slice(start, min(start + BLOCK_ROWS, size)) for start in range(0, size, BLOCK_ROWS)]


def to_double(tensor: Tensor, device: torch.device, *, copy: bool = False) -> Tensor:
    """``tensor`` in fp64 on a device; with ``copy``, never the same memory."""
    return tensor.to(device).to(torch.float64, copy=copy)  # first to the device: not every device has fp64


def fp64_device(device: torch.device) -> torch.device:
    """Where tensors of a device are worked on in fp64: there, or on the CPU if the device has no fp64.

    A GPU with 1/64 of its fp32 rate in fp64 has 1.3 TFLOP/s, several times as much as a CPU of 16 cores.
    """
    if device.type == "xpu" and torch.xpu.is_available():
        return device if torch.xpu.get_device_properties(device).has_fp64 else torch.device("cpu")
    return torch.device("cpu") if device.type in _WITHOUT_FP64 else device


def quadratic_form(C: Tensor, X: Tensor, damping: float = 0.0) -> Tensor:
    """``Xᵀ (C + damping · 1) X``, (D, D). With C = T + Tᵀ and T lower triangular it is H + Hᵀ, H = Xᵀ T X.

    Args:
        C: symmetric, (M, M); the lower triangle is read, in blocks of rows.
        X: (M, D) fp64, on a device with fp64.
        damping: added to the diagonal.
    """
    total = X.new_zeros(X.shape[1], X.shape[1])
    for rows in row_blocks(len(X)):
        total.addmm_(X[rows].mT, _lower_half(C, rows, damping, X.device) @ X[: rows.stop])
    for rows in row_blocks(len(total)):
        block = total[rows, : rows.stop] + total[: rows.stop, rows].mT
        total[rows, : rows.stop], total[: rows.stop, rows] = block, block.mT
    return total


def _lower_half(C: Tensor, rows: slice, damping: float, device: torch.device) -> Tensor:
    """Rows of the damped T, up to the diagonal."""
    block = to_double(C[rows, : rows.stop], device, copy=True)
    block[:, rows].tril_().diagonal().add_(damping).div_(2)
    return block
