"""Random linears as checkpoints have them: dense or low-rank, floating or quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp.method.storage import Storage
from grasp.model.lowrank_linear import pivots_order
from grasp_kernels import Factors
from grasp_kernels.quantized import dequantize, pack_int4


def matrix(name: str, rows: int, columns: int, storage: Storage | None = None) -> dict[str, Tensor]:
    """A matrix, or its values and scales."""
    if storage is None:
        return {name: torch.randn(rows, columns)}
    values = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, storage.scales(columns)) / 4
    kinds = {"U8": pack_int4, "F8_E4M3": lambda whole: whole.to(torch.float8_e4m3fn)}
    return {name: kinds.get(storage.dtype, lambda whole: whole)(values), f"{name}_scales": scales}


def stored(
    rows: int, columns: int, rank: int = 0, *, pivoted: bool = False, storage: Storage | None = None
) -> dict[str, Tensor]:
    """The tensors of a linear in a checkpoint; it is dense if the rank is 0."""
    if not rank:
        return matrix("weight", rows, columns, storage)
    order = {"order": pivots_order(torch.randperm(rows)[:rank].sort().values, rows)} if pivoted else {}
    return {**order, **matrix("U", rows - rank * pivoted, rank, storage), **matrix("Vh", rank, columns, storage)}


def weight(tensors: dict[str, Tensor], columns: int) -> Tensor:
    """The dense floating weight, (rows, columns)."""
    if "weight" in tensors:
        scales = tensors.get("weight_scales")
        return tensors["weight"] if scales is None else dequantize(tensors["weight"], scales, columns)
    none = {"U": tensors["Vh"].new_empty(0, len(tensors["Vh"]), dtype=torch.float32)}
    factors = Factors(s=None, **{**none, **tensors}).dequantized(columns, torch.float32)
    product = factors.U @ factors.Vh
    return product if factors.order is None else torch.cat([factors.Vh, product])[factors.order.argsort()]
