"""Factors in the layout that the kernels read fastest: ranks in multiples of 16, the Vh of a group contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.checks import check_factors, to_groups
from grasp_kernels.reference import Factors

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
        ValueError: if ``factors`` is empty, a group's tensors do not agree, or the Vh differ in K, dtype or device.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, pack_factors
        >>> (packed,) = pack_factors([Factors(torch.randn(32, 9), None, torch.randn(9, 64))])
        >>> packed.U.shape, packed.Vh.shape
        (torch.Size([32, 16]), torch.Size([16, 64]))
    """
    factors = to_groups("pack_factors", factors)
    for group in factors:
        check_factors(group.Vh, *group)
    kinds = {(group.Vh.shape[1], group.Vh.dtype, group.Vh.device) for group in factors}
    if len(kinds) > 1:
        raise ValueError(f"the Vh of a group must agree in K, dtype and device, got {sorted(map(str, kinds))}")
    ranks = [-(-group.U.shape[1] // RANK_MULTIPLE) * RANK_MULTIPLE for group in factors]
    first = factors[0].Vh
    Vhs = first.new_zeros(sum(ranks), first.shape[1]).split(ranks)
    packed = []
    for group, rank, Vh in zip(factors, ranks, Vhs, strict=True):
        padding = rank - group.U.shape[1]
        Vh[: group.Vh.shape[0]].copy_(group.Vh)
        s = None if group.s is None else F.pad(group.s, (0, padding))
        U = F.pad(group.U, (0, padding)).clone(memory_format=torch.contiguous_format)
        packed.append(Factors(U, s, Vh, None if group.bias is None else group.bias.detach()))
    return packed


def stacked(Vhs: Sequence[Tensor]) -> Tensor | None:
    """The (sum of R_i, K) tensor whose consecutive slices are the Vh of a group, or ``None`` if there is none."""
    first = Vhs[0]
    if len(Vhs) == 1:
        return first
    if not all(Vh.is_contiguous() for Vh in Vhs):
        return None
    storage = first.untyped_storage().data_ptr()
    for Vh, following in pairwise(Vhs):
        if following.data_ptr() != Vh.data_ptr() + Vh.numel() * Vh.element_size():
            return None
        if following.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((sum(Vh.shape[0] for Vh in Vhs), first.shape[1]), first.stride())
