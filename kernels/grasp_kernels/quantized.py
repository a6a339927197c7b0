"""Quantised matrices: int8, int4 or fp8 values, and scales along the rows.

``weight[r, k] = values[r, k] * scales[r, k // group]``. A row has one scale, or one for each group of 32, 64 or 128
columns; the last group of a row may be shorter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
GROUPS = (32, 64, 128)
_ZERO = 8  # an int4 is stored as value + 8


def stored_columns(dtype: torch.dtype, depth: int) -> int:
    """Columns of the tensor of a quantised matrix with ``depth`` columns: uint8 has two int4 each."""
    return -(-depth // 2) if dtype == torch.uint8 else depth


def group_size(groups: int, depth: int) -> int | None:
    """Columns with one scale, if a row of ``depth`` columns has ``groups`` scales; ``None`` if no size has so many."""
    if groups == 1:
        return depth
    return next((size for size in GROUPS if -(-depth // size) == groups), None)


def columns_per_scale(scales: Tensor | None, depth: int) -> int:
    """Columns with one scale; 0 if a row of ``depth`` columns has one or none."""
    return 0 if scales is None or scales.shape[1] == 1 else group_size(scales.shape[1], depth) or 0


def pack_int4(values: Tensor) -> Tensor:
    """Integers in −8…7, (rows, depth) → (rows, ⌈depth / 2⌉) uint8: the even column is in the low four bits."""
    stored = F.pad(values + _ZERO, (0, values.shape[1] % 2), value=_ZERO).to(torch.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4


def unpack_int4(packed: Tensor, depth: int) -> Tensor:
    """The inverse of ``pack_int4``: (rows, depth) int8."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.flatten(1)[:, :depth].to(torch.int8) - _ZERO


def dequantize(values: Tensor, scales: Tensor, depth: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix, (rows, depth): each entry is the product of value and scale, rounded once.

    Args:
        values: (rows, depth) int8 or float8_e4m3fn, or (rows, ⌈depth / 2⌉) uint8 with two int4 each.
        scales: (rows, groups), floating.
        depth: columns of the matrix.
        dtype: of the result.

    Example:
        >>> import torch
        >>> dequantize(pack_int4(torch.tensor([[1, -8, 7]])), torch.tensor([[0.5]]), 3)
        tensor([[ 0.5000, -4.0000,  3.5000]])
    """
    # Every value is exact in 16 bits, and PyTorch rounds a product of 16-bit numbers once. Scales may not be exact.
    work = torch.promote_types(dtype, scales.dtype)
    wide = (unpack_int4(values, depth) if values.dtype == torch.uint8 else values).to(work)
    size = group_size(scales.shape[1], depth)
    assert size is not None
    groups = scales.shape[1]
    # Inductor of PyTorch 2.13 multiplies wrongly with scales that are repeated and cut.
    whole = F.pad(wide, (0, groups * size - depth)) if depth < groups * size else wide
    product = whole.unflatten(1, (groups, size)) * scales.to(work)[..., None]
    return product.flatten(1)[:, :depth].to(dtype)
