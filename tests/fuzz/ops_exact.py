"""The result of a valid call in fp64, and how far a result may lie from it: rounding, term by term."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tests.definitions import ACTIVATIONS

# Relative to the sum of the terms' sizes, in eps: roundings of long sums cancel each other; 60 000 calls had 4 at most.
_SUMS = 12


class Exact(NamedTuple):
    """A result in fp64, the largest deviation of each of its elements, and the dtype that it should have."""

    value: Tensor
    bound: Tensor
    dtype: torch.dtype


class Wide(NamedTuple):
    """An argument in fp64, its absolute values, and the dtype that the op sees."""

    value: Tensor
    size: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Wide:
        """The tensor without any layout of its own."""
        value = tensor.double().contiguous()
        return cls(value, value.abs(), tensor.dtype)

    def rows(self) -> Wide:
        """All leading dimensions as one."""
        width = self.value.shape[-1]
        return Wide(self.value.view(-1, width), self.size.view(-1, width), self.dtype)


def linear(x: Wide, U: Wide, s: Wide | None, Vh: Wide, bias: Wide | None) -> Exact:
    """``lowrank_linear``; h and the output may be rounded to the dtype of ``x``, sums are in fp32 or fp64."""
    leading, N, rows, info = x.value.shape[:-1], len(U.value), x.rows(), torch.finfo(x.dtype)
    h, sizes = rows.value @ Vh.value.mT, rows.size @ Vh.size.mT
    if s is not None:
        h, sizes = h * s.value, sizes * s.size
    value, size = h @ U.value.mT, sizes @ U.size.mT
    if bias is not None:
        value, size = value + bias.value, size + bias.size
    sums = _SUMS * torch.finfo(_sum_dtype(x.dtype)).eps
    bound = (3 * info.eps + sums) * size + info.tiny * info.eps * (2 + U.size.sum(1))
    return Exact(value.view(*leading, N), bound.view(*leading, N), x.dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def glu(gate: Exact, up: Exact, activation: str) -> Exact:
    """``lowrank_glu`` from its two linears; no activation has a slope above 1.2."""
    dtype = gate.dtype
    active = ACTIVATIONS[activation](gate.value)
    value, wide = active * up.value, up.value.abs() + up.bound
    sums = torch.finfo(_sum_dtype(dtype)).eps
    rounding = 2 * torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).tiny * (1 + wide)
    bound = 1.2 * gate.bound * wide + active.abs() * up.bound + rounding + 8 * sums * (1 + gate.value.abs()) * wide
    return Exact(value, bound, dtype)


def gradient(
    tensors: dict[str, Wide | None], per_sample: bool, second_moment: str | None
) -> tuple[Exact, Exact | None]:
    """``singular_value_grad``, sample by sample; sums are in fp32 or fp64."""
    x, grad_y, U, Vh = (tensors[name] for name in ("x", "grad_y", "U", "Vh"))
    assert x and grad_y and U and Vh  # noqa: PT018
    dtype, bounds = _sum_dtype(x.dtype), _bounds(x, tensors["cu_seqlens"])
    X, D = x.rows(), grad_y.rows()
    token, size = (D.value @ U.value) * (X.value @ Vh.value.mT), (D.size @ U.size) * (X.size @ Vh.size.mT)
    if (mask := tensors["mask"]) is not None:
        token, size = token * mask.value.view(-1, 1), size * mask.value.view(-1, 1)
    factor = _SUMS * torch.finfo(dtype).eps
    first = _sums(token, bounds), factor * _sums(size, bounds)
    if second_moment == "token":
        squares, size_squares = _sums(token.square(), bounds), _sums(size.square(), bounds)
    else:
        squares, size_squares = first[0].square(), _sums(size, bounds).square()
    second = squares, 3 * factor * size_squares
    results = [pair if per_sample else (pair[0].sum(0), pair[1].sum(0)) for pair in (first, second)]
    exact = [Exact(value, bound + torch.finfo(dtype).tiny, dtype) for value, bound in results]
    return exact[0], exact[1] if second_moment else None


def _bounds(x: Wide, cu_seqlens: Wide | None) -> list[int]:
    if cu_seqlens is not None:
        return [int(bound) for bound in cu_seqlens.value.tolist()]
    shape = x.value.shape
    length = shape[-2] if len(shape) > 1 else 1
    return [i * length for i in range(shape[:-2].numel() + 1)]


def _sums(values: Tensor, bounds: list[int]) -> Tensor:
    """(T, R) → (B, R)."""
    sums = [values[start:stop].sum(0) for start, stop in pairwise(bounds)]
    return torch.stack(sums) if sums else values.new_zeros(0, values.shape[1])
