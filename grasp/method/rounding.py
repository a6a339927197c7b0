"""Rounding a matrix to few bits: to the nearest value, or so that its outputs change least. Pure functions.

A row has one scale, or one for each group of columns. int8 has −128…127, int4 −8…7, fp8 the values of float8_e4m3fn,
−448…448. Scales are rounded to bfloat16, so that they are the same numbers in fp32 and in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grasp.method.blocks import fp64_device, to_double
from grasp.method.ranks import Shape
from grasp.method.storage import Storage
from grasp_kernels.quantized import dequantize

_BLOCK = 128  # columns that are rounded before the error moves on to all others
_ROWS = 32  # rows that are rounded at once if there is a metric
_ENTRIES = 2**20  # for which scales are tried at once: the results stay in the cache
# Added to the diagonal, as a fraction of its mean: second moments are known from few tokens, a metric is exact.
_DAMPING, _METRIC_DAMPING = 0.05, 0.01
# Of the scale that puts the entry of largest magnitude at the end of the range: a smaller one clips it, and rounds the
# others less.
_SHRINKAGE = torch.linspace(1, 0.7, 16).tolist()


class _Range(NamedTuple):
    """The values of a kind."""

    lowest: int
    highest: int
    dtype: torch.dtype


_RANGES = {
    "int8": _Range(-128, 127, torch.int8),
    "int4": _Range(-8, 7, torch.int8),
    "fp8": _Range(-448, 448, torch.float8_e4m3fn),
}


class Rounded(NamedTuple):
    """A quantised matrix with one value per entry."""

    values: Tensor  # (rows, depth) int8, or float8_e4m3fn for fp8
    scales: Tensor  # (rows, groups) fp32, see ``grasp_kernels.quantized``

    @property
    def matrix(self) -> Tensor:
        """The dequantised matrix, (rows, depth) fp32."""
        return dequantize(self.values, self.scales, self.values.shape[1])


def round_nearest(weight: Tensor, storage: Storage) -> Rounded:
    """Round each entry to the nearest value.

    Args:
        weight: (rows, depth), finite, any floating dtype.
        storage: of the result.

    Example:
        >>> round_nearest(torch.tensor([[1.0, -0.5, 0.0]]), Storage(8)).values
        tensor([[127, -64,   0]], dtype=torch.int8)
    """
    weight, values = weight.float(), _RANGES[storage.numbers]
    scales = _scales(weight, values, storage.group, weight.new_ones(weight.shape[1]))
    return Rounded(_nearest(weight, _spread(scales, weight.shape[1], storage.group), values), scales)


def round_to_outputs(weight: Tensor, moment: Tensor, storage: Storage, metric: Tensor | None = None) -> Rounded:
    """Round such that ``Σ eᵀ metric e`` with ``e = (weight − rounded) x`` is small.

    Each rounding error is made up for in later columns, and with a metric in later rows too. Columns are rounded in the
    order of their second moments, the largest first, rows in that of the diagonal of the metric; scales are chosen
    before. Along columns this is GPTQ (arXiv 2210.17323) with fixed groups. Rows have the same rule: both together
    round to the nearest plane in the lattice of the Kronecker product of ``metric`` and ``moment``, up to rows of a
    block, which do not make up for each other.

    Args:
        weight: (rows, depth), finite.
        moment: ``Σ x xᵀ`` of the inputs, (depth, depth) symmetric; a factor does not matter.
        storage: of the result.
        metric: (rows, rows) symmetric, such as ``CᵀC`` if C is applied to the outputs; a factor does not matter.
            ``None``: the identity.

    Returns:
        As ``round_nearest``, on the device of ``weight``.
    """
    weight, values, group = weight.float(), _RANGES[storage.numbers], storage.group
    columns = _Order.by(moment, _DAMPING, weight.device)
    if metric is None:
        return _round_columns(weight, columns, values, group)
    rows = _Order.by(metric, _METRIC_DAMPING, weight.device)
    ordered, parts = weight[rows.order], []
    errors = torch.empty_like(ordered)
    for begin in range(0, len(ordered), _ROWS):
        block, before = slice(begin, begin + _ROWS), slice(0, begin)
        made = rows.factor[before, block].mT @ errors[before]
        repair = torch.linalg.solve_triangular(rows.factor[block, block].mT, made, upper=False)
        parts.append(_round_columns(ordered[block] + repair, columns, values, group))
        errors[block] = ordered[block] - parts[-1].matrix
    back = rows.order.argsort()
    return Rounded(*(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True)))


class _Order(NamedTuple):
    """An order of rounding, and how errors move on in it."""

    order: Tensor  # indices, those of the largest entry on the diagonal first
    # upper triangular, in this order; ``factor factorᵀ`` is the moment. So errors e cost ``‖factorᵀ e‖²``. Of its k-th
    # term ``factor[k, k]² e[k]²`` is left if index k makes up for all errors before it.
    factor: Tensor

    @classmethod
    def by(cls, moment: Tensor, damping: float, device: torch.device) -> _Order:
        moment = to_double(moment, fp64_device(device))
        diagonal = moment.diagonal()
        order = diagonal.argsort(descending=True)
        damped, mean = moment[order][:, order], float(diagonal.mean())
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        return cls(order.to(device), torch.linalg.cholesky(damped.flip(0, 1)).float().flip(0, 1).to(device))


def _round_columns(weight: Tensor, columns: _Order, range_: _Range, group: int | None) -> Rounded:
    """Round column by column, all rows at once."""
    order, factor = columns
    depth, back = weight.shape[1], order.argsort()
    scales = _scales(weight, range_, group, factor.diagonal()[back].square())
    shares = factor / factor.diagonal()  # of an error, by row, that each later index makes up for
    wanted, spread = (each.mT[order].contiguous() for each in (weight, _spread(scales, depth, group)))
    errors, values = wanted.clone(), torch.empty_like(wanted, dtype=range_.dtype)
    for begin in range(0, depth, _BLOCK):
        end = min(begin + _BLOCK, depth)
        for k in range(begin, end):
            values[k] = _nearest(wanted[k], spread[k], range_)
            errors[k] -= values[k].float() * spread[k]
            wanted[k + 1 : end] += torch.outer(shares[k, k + 1 : end], errors[k])
        wanted[end:] += shares[begin:end, end:].mT @ errors[begin:end]
    return Rounded(values[back].mT.contiguous(), scales)


def rounding_flops(shape: Shape) -> int:
    """The floating-point operations of ``round_to_outputs``: a Cholesky factor, and the errors."""
    rows, depth = shape
    return depth**3 // 3 + rows * depth**2


def rounding_bytes(shape: Shape) -> int:
    """The peak bytes of ``fit_weight`` followed by ``round_to_outputs``, about, with their results.

    Six matrices of the moment in fp64 and five of the weight in fp32.
    """
    rows, depth = shape
    return 8 * 6 * depth**2 + 4 * 5 * rows * depth


def _nearest(weight: Tensor, scales: Tensor, range_: _Range) -> Tensor:
    ratio = torch.where(scales == 0, 0.0, weight / scales)
    whole = ratio if range_.dtype.is_floating_point else ratio.round_()
    return whole.clamp_(range_.lowest, range_.highest).to(range_.dtype)


def _spread(scales: Tensor, depth: int, group: int | None) -> Tensor:
    """A scale for each entry, (rows, depth)."""
    return scales.expand(-1, depth) if group is None else scales.repeat_interleave(group, dim=1)[:, :depth]


def _scales(weight: Tensor, range_: _Range, group: int | None, importance: Tensor) -> Tensor:
    """The scale of each group with the least error of rounding to the nearest, weighted by column: (rows, groups).

    In 4 bits the range is −8…7, so the entry of largest magnitude is given the −8, by a negative scale if need be.
    """
    depth = weight.shape[1]
    size = depth if group is None else group
    count = -(-depth // size)
    padded = torch.nn.functional.pad(weight, (0, count * size - depth)).view(len(weight), count, size)
    weights = torch.nn.functional.pad(importance, (0, count * size - depth)).view(count, size)
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))
    if range_ != _RANGES["int4"]:
        return (largest.abs() / range_.highest).bfloat16().float()[..., 0]
    chosen, rows = [], max(1, _ENTRIES // (count * size))
    for part, end in zip(padded.split(rows), largest.split(rows), strict=True):
        scales = torch.stack([(end * (shrinkage / range_.lowest)).bfloat16().float() for shrinkage in _SHRINKAGE])
        errors = [((_nearest(part, s, range_) * s - part).square_() * weights).sum(2, keepdim=True) for s in scales]
        chosen.append(scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0, ..., 0])
    return torch.cat(chosen)
