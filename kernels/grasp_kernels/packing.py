"""Factors laid out as the kernels like to read them: ranks in multiples of 16, a group's Vh one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels.reference import Factors

RANK_MULTIPLE = 16


@torch.no_grad()
def pack_factors(factors: Sequence[Factors]) -> list[Factors]:
    """Copy a group's factors, each rank padded with zeros to a multiple of 16; every op gives the same result on both.

    Meant to be done once, where a model is loaded, not per call: padded, a kernel reads U in pieces of 16 bytes instead
    of 2. The Vh of the group are slices of one tensor, so that one matrix product serves all of them. A bias and an
    absent s are handed on as they are. The copies take no part in autograd; when a factor changes, pack again.

    Args:
        factors: U (N_i, R_i), s (R_i,) or ``None``, Vh (R_i, K), bias (N_i,) or ``None``, of one K, dtype and device.

    Raises:
        ValueError: if ``factors`` is empty, or the Vh differ in K, dtype or device.
    """
    if not factors:
        raise ValueError("pack_factors needs at least one Factors(U, s, Vh, bias), got none")
    kinds = {(group.Vh.shape[1], group.Vh.dtype, group.Vh.device) for group in factors}
    if len(kinds) > 1:
        raise ValueError(f"a group's Vh must agree in K, dtype and device, got {sorted(map(str, kinds))}")
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
    """The (sum of R_i, K) tensor of which a group's Vh are consecutive slices, or ``None`` where they are not."""
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
