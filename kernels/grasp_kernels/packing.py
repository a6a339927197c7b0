"""Factors in the layout that the kernels read fastest: ranks in multiples of 16, the Vh of a group contiguous.

``pack_factors`` makes packed copies. ``pad_columns`` and ``stack_rows`` make factors of the logical rank that lie in
packed memory: ``widened`` finds it again, whatever path a call takes, so a model holds its factors once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .checks import check_factors, to_groups
from .reference import Factors

RANK_MULTIPLE = 16


@torch.no_grad()
def pack_factors(factors: Sequence[Factors]) -> list[Factors]:
    """Copy a group's factors, each rank padded with zeros to a multiple of 16; every op gives the same result on both.

    Pack once, when a model is loaded, not in every call. A kernel then reads U in pieces of 16 bytes instead of 2. The
    Vh of the group are slices of one tensor, so one matrix product computes all of them. A bias is not copied, and an
    absent s stays absent. The copies do not record gradients. Pack again after a factor changes.

    Args:
        factors: U (N_i, R_i), s (R_i,) or ``None``, Vh (R_i, K), bias (N_i,) or ``None``, of one K, dtype and device.

    Raises:
        TypeError: if ``factors`` is not a sequence of ``Factors`` of tensors.
        ValueError: if ``factors`` is empty, a group's tensors do not agree, the Vh differ in K, dtype or device, or
            factors are pivoted or quantised.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, pack_factors
        >>> (packed,) = pack_factors([Factors(torch.randn(32, 9), None, torch.randn(9, 64))])
        >>> packed.U.shape, packed.Vh.shape
        (torch.Size([32, 16]), torch.Size([16, 64]))
    """
    factors = to_groups("pack_factors", factors)
    for group in factors:
        if group.quantized:
            raise ValueError("quantised factors have no packed form; expected factors without scales")
        check_factors(group.Vh, *group)
        if group.order is not None:
            raise ValueError("pivoted factors have no packed form; expected factors without order")
    kinds = {(group.Vh.shape[1], group.Vh.dtype, group.Vh.device) for group in factors}
    if len(kinds) > 1:
        raise ValueError(f"the Vh of a group must agree in K, dtype and device, got {sorted(map(str, kinds))}")
    packed = []
    for group, Vh in zip(factors, _stack([group.Vh for group in factors]), strict=True):
        padding = Vh.shape[0] - group.U.shape[1]
        s = None if group.s is None else F.pad(group.s, (0, padding))
        U = F.pad(group.U, (0, padding)).clone(memory_format=torch.contiguous_format)
        packed.append(Factors(U, s, Vh, None if group.bias is None else group.bias.detach()))
    return packed


def pad_columns(U: Tensor) -> Tensor:
    """A copy of U, (N, R), whose rows are R rounded up to a multiple of 16 apart, with zeros in between.

    The copy is made in the memory that ``close_columns`` left, if there is any.
    """
    size = (U.shape[0], _padded(U.shape[1]))
    memory = getattr(U.untyped_storage(), "grasp_columns", None)
    if memory is None or (memory.shape, memory.dtype) != (size, U.dtype):
        memory = U.new_zeros(size)
    view = memory[:, : U.shape[1]]
    view.copy_(U)
    return _logical(view, memory)


def close_columns(U: Tensor) -> Tensor:
    """U, contiguous: a copy if ``pad_columns`` made it, which keeps that memory for the next ``pad_columns``."""
    padding, U = _padding(U), U.contiguous()
    if not may_pad(U):
        U.untyped_storage().grasp_columns = padding and padding.memory  # type: ignore[attr-defined]
    return U


def may_pad(U: Tensor) -> bool:
    """Whether the memory of U comes from ``close_columns``, and not from a library that moved it since."""
    return hasattr(U.untyped_storage(), "grasp_columns")


def stack_rows(Vhs: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the Vh of a group, (R_i, K), one behind the other in memory; each rank is padded with zero rows to 16.

    Args:
        Vhs: of one K, dtype and device.
    """
    return [_logical(memory[: len(Vh)], memory) for Vh, memory in zip(Vhs, _stack(Vhs), strict=True)]


def has_padding(factor: Tensor) -> bool:
    """Whether ``pad_columns`` or ``stack_rows`` made the factor; not for a view of a part of it."""
    return _padding(factor) is not None


def packed_memory(factor: Tensor, dim: int) -> Tensor | None:
    """The packed memory of a factor, or the factor itself if its rank is a multiple of 16; ``None`` if it has none.

    Args:
        factor: U with ``dim=1``, or Vh with ``dim=0``.
        dim: the dimension of the rank.
    """
    if (padding := _padding(factor)) is not None:
        return padding.memory
    return factor if factor.shape[dim] % RANK_MULTIPLE == 0 else None


def widened(factors: Factors, *, pivoted: bool = False) -> Factors:
    """The packed factors in whose memory these lie; the factors themselves if there are none, or there is an s.

    Pivoted factors are widened only if ``pivoted``: their rank may then be above ``Factors.pivots``, which only the
    Triton kernels allow.
    """
    U, s, Vh, bias, order, *_ = factors
    if (order is not None and not pivoted) or factors.quantized:
        return factors
    left = U if U.shape[1] % RANK_MULTIPLE == 0 else packed_memory(U, 1)
    if left is None or s is not None or (right := packed_memory(Vh, 0)) is None:
        return factors
    return Factors(left, None, right, bias, order)


class _Padding(NamedTuple):
    """Attached to the storage of a factor whose elements lie in packed memory."""

    memory: Tensor
    shape: torch.Size  # of the factor: a view of a part of it must not be widened
    stride: tuple[int, ...]


def _padding(factor: Tensor) -> _Padding | None:
    padding: _Padding | None = getattr(factor.untyped_storage(), "grasp_padding", None)
    if padding is None or factor.shape != padding.shape or factor.stride() != padding.stride:
        return None
    return padding if factor.dtype == padding.memory.dtype else None


def _logical(view: Tensor, memory: Tensor) -> Tensor:
    """``view``, a part of ``memory``, as a tensor whose storage remembers the memory.

    It has a storage of its own: libraries that save models take tensors of one storage for copies of one another.
    """
    factor: Tensor = from_dlpack(view)
    padding = _Padding(memory, factor.shape, factor.stride())
    factor.untyped_storage().grasp_padding = padding  # type: ignore[attr-defined]
    return factor


def _stack(Vhs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The slices of one new tensor with copies of the Vh, each padded with zero rows."""
    ranks = [_padded(len(Vh)) for Vh in Vhs]
    slices = Vhs[0].new_zeros(sum(ranks), Vhs[0].shape[1]).split(ranks)
    for memory, Vh in zip(slices, Vhs, strict=True):
        memory[: len(Vh)].copy_(Vh)
    return slices


def _padded(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def stacked(Vhs: Sequence[Tensor]) -> Tensor | None:
    """The (sum of R_i, K) tensor whose consecutive slices are the Vh of a group, or ``None`` if there is none."""
    first = Vhs[0]
    if len(Vhs) == 1:
        return first
    if not all(Vh.is_contiguous() for Vh in Vhs):
        return None
    storage = first.untyped_storage().data_ptr()
    for Vh, following in pairwise(Vhs):
        behind = following.data_ptr() == Vh.data_ptr() + Vh.numel() * Vh.element_size()
        if not behind or following.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((sum(Vh.shape[0] for Vh in Vhs), first.shape[1]), first.stride())
