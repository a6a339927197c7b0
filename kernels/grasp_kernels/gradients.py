"""The backward of each op, made of ordinary ops, so that it can be traced and differentiated again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import ops
from .reference import ACTIVATIONS, Dense, Factors, accumulation_dtype, equal_samples, project

FIELDS = len(Factors._fields)


def to_members(columns: Sequence[Sequence[Tensor]], present: Sequence[bool], *, dense: bool = True) -> list[Any]:
    """The members of a group, rebuilt from the arguments of a registered op: ``Factors``, and ``Dense`` without Vh.

    Args:
        columns: the fields of ``Factors`` of all members, without the absent ones; U is the weight of a dense one.
        present: for each member, which of the fields it has.
        dense: whether a member may be dense.

    Raises:
        ValueError: if there is no member, one has other fields, or a list has not one tensor for each that is present.
    """
    given = [len(column) for column in columns]
    groups = [tuple(present[i : i + FIELDS]) for i in range(0, len(present), FIELDS)]
    needed = [sum(present[i::FIELDS]) for i in range(FIELDS)]
    if not groups or given != needed or not all(_is_member(group, dense) for group in groups):
        raise ValueError(
            f"present must tell of each group which of {', '.join(Factors._fields)} it has: U and Vh"
            f"{', a dense one U' * dense}. The lists must have one tensor for each; got {list(present)} and lists of "
            f"{', '.join(map(str, given))}"
        )
    remaining = [iter(column) for column in columns]
    members: list[Factors | Dense] = []
    for group in groups:
        U, s, Vh, bias, *rest = (next(column) if p else None for column, p in zip(remaining, group, strict=True))
        assert U is not None
        members.append(Dense(U, bias) if Vh is None else Factors(U, s, Vh, bias, *rest))
    return members


def _is_member(present: tuple[bool, ...], dense: bool) -> bool:
    """Whether a group can have these fields of ``Factors``; a dense one has U and perhaps a bias."""
    lone = dense and not (present[1] or any(present[4:]))
    return len(present) == FIELDS and present[0] and (present[2] or lone)


def _factor_grads(
    needs: Sequence[bool], grad_y: Tensor, x: Tensor, factors: Factors
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of one low-rank linear in x and in its factors; ``needs`` tells which to compute, never of order.

    Quantised factors and scales have none.
    """
    needs_x, needs_U, needs_s, needs_Vh, needs_bias, *_ = needs
    if factors.quantized:
        if any(needs[1:4]) or any(needs[6:]):
            raise NotImplementedError("quantised factors and their scales have no gradient; train with floating ones")
        factors = factors.dequantized(x.shape[-1], x.dtype)
    U, s, Vh, bias, order, *_ = factors
    x, grad_y = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    grad_x = grad_U = grad_s = grad_Vh = grad_bias = grad_pivots = None
    if needs_bias and bias is not None:
        grad_bias = grad_y.sum(0)
    if order is not None:
        grad_pivots, grad_y = grad_y.index_select(1, order).tensor_split([Vh.shape[0]], dim=1)
    if needs_U:
        grad_U = grad_y.mT @ project(x, s, Vh)
    if needs_x or needs_s or needs_Vh:
        grad_h = grad_y @ U if grad_pivots is None else torch.addmm(grad_pivots, grad_y, U)  # [M, R]
        if s is not None:
            wide = grad_h.to(accumulation_dtype(x.dtype))
            if needs_s:
                grad_s = (wide * (x @ Vh.mT)).sum(0).to(s.dtype)
            grad_h = (wide * s).to(grad_h.dtype)
        grad_x = grad_h @ Vh if needs_x else None
        grad_Vh = grad_h.mT @ x if needs_Vh else None
    return grad_x, (grad_U, grad_s, grad_Vh, grad_bias, None, None, None)


def _dense_grads(
    needs: Sequence[bool], grad_y: Tensor, x: Tensor, dense: Dense
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of a dense linear in x and in the places of the fields of ``Factors``; U is the weight."""
    x, grad_y = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    needs_x, needs_weight, needs_bias = needs
    grad_weight = grad_y.mT @ x if needs_weight else None
    grad_bias = grad_y.sum(0) if needs_bias else None
    return grad_y @ dense.weight if needs_x else None, (grad_weight, None, None, grad_bias, None, None, None)


def lowrank_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors that the backward of ``lowrank_linear`` needs."""
    ctx.save_for_backward(*inputs[: 1 + FIELDS])


def lowrank_linear_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in the arguments of ``grasp::lowrank_linear``, in their order."""
    x, *factors = ctx.saved_tensors
    grad_x, grads = _factor_grads(ctx.needs_input_grad[: 1 + FIELDS], grad_y, x, Factors(*factors))
    return None if grad_x is None else grad_x.view_as(x), *grads, None


def lowrank_linear_grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors that the backward of ``lowrank_linear_grouped`` needs."""
    x, *columns, present, _ = inputs
    ctx.counts = [len(column) for column in columns]
    ctx.present = present
    ctx.save_for_backward(x, *(tensor for column in columns for tensor in column))


def lowrank_linear_grouped_backward(ctx: Any, grad_ys: Sequence[Tensor]) -> tuple[Any, ...]:
    """Gradients in the arguments of ``grasp::lowrank_linear_grouped``, in their order."""
    return _member_grads(ctx, *_saved_members(ctx), grad_ys)


def lowrank_linear_merged_backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    """Gradients in the arguments of ``grasp::lowrank_linear_merged``, in their order."""
    x, members = _saved_members(ctx)
    return _member_grads(ctx, x, members, grad_y.split([member.out_features for member in members], dim=-1))


def _member_grads(
    ctx: Any, x: Tensor, members: Sequence[Factors | Dense], grad_ys: Sequence[Tensor]
) -> tuple[Any, ...]:
    needs_x, grad_x = ctx.needs_input_grad[0], None
    grads: list[list[Tensor | None]] = [[] for _ in range(FIELDS)]
    for index, (grad_y, member) in enumerate(zip(grad_ys, members, strict=True)):
        needs = [needs_x, *(tensor is not None and tensor.requires_grad for tensor in member)]
        if isinstance(member, Dense):
            part, group = _dense_grads(needs, grad_y, x, member)
        else:
            part, group = _factor_grads(needs, grad_y, x, member)
        if part is not None:
            grad_x = part if grad_x is None else grad_x + part
        for column, present, grad in zip(grads, ctx.present[FIELDS * index : FIELDS * (index + 1)], group, strict=True):
            if present:
                column.append(grad)
    return None if grad_x is None else grad_x.view_as(x), *grads, None, None


def _saved_members(ctx: Any) -> tuple[Tensor, list[Factors | Dense]]:
    """x and the members of the call. Once in a backward: under activation checkpointing it computes them again."""
    x, *flat = ctx.saved_tensors
    remaining = iter(flat)
    return x, to_members([[next(remaining) for _ in range(count)] for count in ctx.counts], ctx.present)


def lowrank_glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors that the backward of ``lowrank_glu`` needs."""
    ctx.save_for_backward(*inputs[: 1 + 2 * FIELDS])
    ctx.activation = inputs[1 + 2 * FIELDS]


def lowrank_glu_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in the arguments of ``grasp::lowrank_glu``, in their order."""
    x, *tensors = ctx.saved_tensors
    gate, up = Factors(*tensors[:FIELDS]), Factors(*tensors[FIELDS:])
    activation = ACTIVATIONS[ctx.activation]
    gate_y = ops.lowrank_linear(x, *gate, "auto")
    up_y = ops.lowrank_linear(x, *up, "auto")
    needs_x, *needs = ctx.needs_input_grad[: 1 + 2 * FIELDS]
    gate_x, gate_grads = _factor_grads([needs_x, *needs[:FIELDS]], activation.backward(grad_y * up_y, gate_y), x, gate)
    up_x, up_grads = _factor_grads([needs_x, *needs[FIELDS:]], grad_y * activation.forward(gate_y), x, up)
    grad_x = (gate_x + up_x).view_as(x) if gate_x is not None and up_x is not None else None
    return grad_x, *gate_grads, *up_grads, None, None


def singular_value_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors that the backward of ``singular_value_grad`` needs."""
    x, grad_y, U, Vh, cu_seqlens, ctx.per_sample, ctx.unit, mask, _ = inputs
    ctx.save_for_backward(x, grad_y, U, Vh, cu_seqlens, mask)


def singular_value_grad_backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in the arguments of ``grasp::singular_value_grad``, in their order."""
    x, grad_y, U, Vh, cu_seqlens, mask = ctx.saved_tensors
    if cu_seqlens is None and (ctx.per_sample or ctx.unit == "sample"):
        cu_seqlens = equal_samples(x)
    dtype = accumulation_dtype(x.dtype)
    flat_x, flat_d = x.reshape(-1, x.shape[-1]).to(dtype), grad_y.reshape(-1, grad_y.shape[-1]).to(dtype)
    if mask is not None:
        flat_x, flat_d = (rows.masked_fill(~mask.reshape(-1, 1), 0) for rows in (flat_x, flat_d))
    d_U, x_V = flat_d @ U.to(dtype), flat_x @ Vh.to(dtype).mT  # [T, R]
    sample = None  # [T], the sample of each token
    if cu_seqlens is not None:
        starts = torch.arange(flat_x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        sample = torch.searchsorted(cu_seqlens[1:], starts, right=True)
    # The gradient in each token's product d_U * x_V.
    weight = grad_first[sample] if ctx.per_sample else grad_first.expand_as(d_U)
    if ctx.unit != "none":
        unit = d_U * x_V
        if ctx.unit == "sample":
            sums = unit.new_zeros(cu_seqlens.shape[0] - 1, unit.shape[1]).index_add(0, sample, unit)
            unit = sums[sample]
        weight = weight + 2 * unit * (grad_second[sample] if ctx.per_sample else grad_second)
    grad_d_U, grad_x_V = weight * x_V, weight * d_U
    needs_x, needs_d, needs_U, needs_Vh = ctx.needs_input_grad[:4]
    return (
        (grad_x_V @ Vh.to(dtype)).to(x.dtype).view_as(x) if needs_x else None,
        (grad_d_U @ U.to(dtype).mT).to(x.dtype).view_as(grad_y) if needs_d else None,
        (flat_d.mT @ grad_d_U).to(x.dtype) if needs_U else None,
        (grad_x_V.mT @ flat_x).to(x.dtype) if needs_Vh else None,
        *(None,) * 5,
    )
