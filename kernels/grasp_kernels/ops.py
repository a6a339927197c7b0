"""The public ops: validate, apply autocast, and call one opaque op that asks the dispatch table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grasp_kernels.dispatch import Call, select
from grasp_kernels.reference import ACTIVATIONS, Factors, accumulation_dtype, project

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SECOND_MOMENTS = ("none", "token", "sample")


class SingularValueGrad(NamedTuple):
    """The gradient of the loss in each singular value, and the sum of its squares over tokens or samples."""

    first: Tensor
    second: Tensor | None


def lowrank_linear(
    x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Apply a rank-R linear layer without forming its weight: ``((x @ Vh.mT) * s) @ U.mT + bias``.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        U: left factor, (N, R), dtype of ``x``.
        s: singular values, (R,), fp32 or the dtype of ``x``, or ``None`` where they are folded into the factors.
        Vh: right factor, (R, K), dtype of ``x``.
        bias: (N,), dtype of ``x``, or ``None``.
        backend: a name from ``available_backends()``, or ``"auto"`` for the first that accepts the call.

    Returns:
        (..., N), dtype of ``x`` (under autocast: autocast's dtype), accumulated in fp32.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree; the message has both.
        BackendUnavailableError: if a named backend cannot run this call; the message has its reason.
    """
    x, (factors,) = _autocast(x, [Factors(U, s, Vh, bias)])
    _check_factors(x, factors)
    return torch.ops.grasp.lowrank_linear(x, *factors, backend)


def lowrank_linear_grouped(x: Tensor, factors: Sequence[Factors], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Apply several low-rank linears to one input, as q/k/v or gate/up do.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        factors: one ``Factors(U, s, Vh, bias)`` per output; ranks and widths may differ.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        One (..., N_i) per entry of ``factors``, dtype of ``x``.

    Raises:
        ValueError: if ``factors`` is empty, or shapes, dtypes or devices do not agree.
        BackendUnavailableError: if a named backend cannot run this call.
    """
    if not factors:
        raise ValueError("lowrank_linear_grouped needs at least one Factors(U, s, Vh, bias), got none")
    x, factors = _autocast(x, factors)
    for group in factors:
        _check_factors(x, group)
    columns = [[tensor for tensor in column if tensor is not None] for column in zip(*factors, strict=True)]
    present = [tensor is not None for group in factors for tensor in group]
    return tuple(torch.ops.grasp.lowrank_linear_grouped(x, *columns, present, backend))


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """Apply a gated linear unit whose two linears are low-rank: ``act(gate(x)) * up(x)``.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        gate: factors of the linear under the activation, width N.
        up: factors of the other linear, width N; its rank may differ.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        (..., N), dtype of ``x``.

    Raises:
        ValueError: if the activation is unknown, the widths differ, or shapes, dtypes or devices do not agree.
        BackendUnavailableError: if a named backend cannot run this call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    x, (gate, up) = _autocast(x, [gate, up])
    _check_factors(x, gate)
    _check_factors(x, up)
    if gate.U.shape[0] != up.U.shape[0]:
        raise ValueError(f"gate and up must have one width, got {gate.U.shape[0]} and {up.U.shape[0]}")
    return torch.ops.grasp.lowrank_glu(x, *gate, *up, activation, backend)


def singular_value_grad(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    per_sample: bool = False,
    second_moment: str | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> SingularValueGrad:
    """Gradient of the loss in each singular value of ``W = U diag(s) Vh``: ``colsum((grad_y @ U) * (x @ Vh.mT))``.

    With G = ∂L/∂W this is ``diag(U.mT @ G @ Vh.mT)`` (arXiv 2501.00339, eq. for ∂L/∂σ), computed without G.

    Args:
        x: the linear's input, (..., K). fp32, fp16, bf16 or fp64.
        grad_y: gradient of the loss in its output, (..., N), dtype of ``x``.
        U: left singular vectors, (N, R), dtype of ``x``.
        Vh: right singular vectors, (R, K), dtype of ``x``.
        cu_seqlens: (B + 1,) int32 or int64, from 0 to T: where each sample starts among the T flattened tokens. Without
            it the rows of the leading dimensions but the last are the samples; a 2-D ``x`` is one sample.
        per_sample: keep one gradient per sample instead of their sum.
        second_moment: also sum the squared gradient of each ``"token"`` or each ``"sample"``.
        mask: bool, the leading dimensions of ``x``; tokens where it is False count nothing.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        ``first`` and ``second`` (``None`` unless asked for), (R,) or with ``per_sample`` (B, R); fp32, or fp64 for fp64.
        With ``per_sample``, ``second`` sums the units within each sample.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree, or ``cu_seqlens`` does not run from 0 to T in order.
        BackendUnavailableError: if a named backend cannot run this call.
    """
    unit = "none" if second_moment is None else second_moment
    if unit not in SECOND_MOMENTS or second_moment == "none":
        raise ValueError(f"second_moment must be None, 'token' or 'sample', got {second_moment!r}")
    _check_svg(x, grad_y, U, Vh, cu_seqlens, mask)
    if cu_seqlens is None and (per_sample or unit == "sample"):
        length = x.shape[-2] if x.dim() > 1 else 1
        samples = x.shape[:-2].numel()
        cu_seqlens = torch.arange(samples + 1, device=x.device, dtype=torch.int64) * length
    first, second = torch.ops.grasp.singular_value_grad(x, grad_y, U, Vh, cu_seqlens, per_sample, unit, mask, backend)
    return SingularValueGrad(first, None if unit == "none" else second)


# --- checks -----------------------------------------------------------------------------------------------------------


def _autocast(x: Tensor, factors: Sequence[Factors]) -> tuple[Tensor, Sequence[Factors]]:
    """Cast as autocast would for a linear: an opaque op is outside its reach. Singular values stay as they are."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, factors
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [Factors(g.U.to(dtype), g.s, g.Vh.to(dtype), None if g.bias is None else g.bias.to(dtype)) for g in factors]
    return x.to(dtype), cast


def _check_factors(x: Tensor, factors: Factors) -> None:
    U, s, Vh, bias = factors
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.dim() < 1 or U.dim() != 2 or Vh.dim() != 2 or U.shape[1] != Vh.shape[0] or x.shape[-1] != Vh.shape[1]:
        raise ValueError(f"expected x (..., K), U (N, R), Vh (R, K); got x {_shape(x)}, U {_shape(U)}, Vh {_shape(Vh)}")
    if U.shape[1] < 1:
        raise ValueError(f"the rank must be at least 1, got U {_shape(U)} and Vh {_shape(Vh)}")
    if s is not None and (s.shape != (U.shape[1],) or s.dtype not in (torch.float32, x.dtype)):
        raise ValueError(f"s must be ({U.shape[1]},) in float32 or {x.dtype}, got {_shape(s)} in {s.dtype}")
    if bias is not None and bias.shape != (U.shape[0],):
        raise ValueError(f"bias must be ({U.shape[0]},), got {_shape(bias)}")
    for name, tensor in (("U", U), ("Vh", Vh), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}; cast one of them")
    for name, tensor in (("U", U), ("s", s), ("Vh", Vh), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _check_svg(
    x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> None:
    _check_factors(x, Factors(U, None, Vh))
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


def _check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Check the values, which only the running op may read; not while a CUDA graph is captured, for that would sync."""
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {bounds}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# --- the opaque ops ---------------------------------------------------------------------------------------------------

_library = torch.library.Library("grasp", "DEF")
_FACTORS = "Tensor {0}U, Tensor? {0}s, Tensor {0}Vh, Tensor? {0}bias"
_SCHEMAS = {
    "lowrank_linear": f"(Tensor x, {_FACTORS.format('')}, str backend) -> Tensor",
    "lowrank_linear_grouped": (
        # Autograd takes lists of tensors but not of optional ones: `present` says which of the 4 each group has.
        "(Tensor x, Tensor[] U, Tensor[] s, Tensor[] Vh, Tensor[] bias, bool[] present, str backend) -> Tensor[]"
    ),
    "lowrank_glu": (
        f"(Tensor x, {_FACTORS.format('gate_')}, {_FACTORS.format('up_')}, str activation, str backend) -> Tensor"
    ),
    "singular_value_grad": (
        "(Tensor x, Tensor grad_y, Tensor U, Tensor Vh, Tensor? cu_seqlens, bool per_sample, str second_moment, "
        "Tensor? mask, str backend) -> (Tensor, Tensor)"
    ),
}


def _call(op: str, x: Tensor, rank: int) -> Call:
    return Call(op, x.device, x.dtype, x.shape[:-1].numel(), rank)


def _lowrank_linear(x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    run = select(backend, _call("lowrank_linear", x, U.shape[1]))
    return run(x.reshape(-1, x.shape[-1]), U, s, Vh, bias).view(*x.shape[:-1], U.shape[0])


def _regroup(columns: Sequence[Sequence[Tensor]], present: Sequence[bool]) -> list[Factors]:
    """Undo what ``lowrank_linear_grouped`` does to its list of factors."""
    remaining = [iter(column) for column in columns]
    groups = [present[i : i + 4] for i in range(0, len(present), 4)]
    return [Factors(*(next(c) if p else None for c, p in zip(remaining, group, strict=True))) for group in groups]


def _lowrank_linear_grouped(x: Tensor, *args: Any) -> list[Tensor]:
    columns, (present, backend) = args[:4], args[4:]
    factors = _regroup(columns, present)
    run = select(backend, _call("lowrank_linear_grouped", x, max(group.U.shape[1] for group in factors)))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in run(x.reshape(-1, x.shape[-1]), factors)]


def _lowrank_glu(x: Tensor, *args: Any) -> Tensor:
    gate, up, (activation, backend) = Factors(*args[:4]), Factors(*args[4:8]), args[8:]
    run = select(backend, _call("lowrank_glu", x, max(gate.U.shape[1], up.U.shape[1])))
    return run(x.reshape(-1, x.shape[-1]), gate, up, activation).view(*x.shape[:-1], gate.U.shape[0])


def _singular_value_grad(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    cu_seqlens: Tensor | None,
    per_sample: bool,
    second_moment: str,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = _call("singular_value_grad", x, U.shape[1])
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, call.rows)
    flat_mask = None if mask is None else mask.reshape(-1)
    x, grad_y = x.reshape(call.rows, -1), grad_y.reshape(call.rows, -1)
    return select(backend, call)(x, grad_y, U, Vh, cu_seqlens, per_sample, second_moment, flat_mask)


def _lowrank_linear_fake(x: Tensor, U: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], U.shape[0])


def _lowrank_linear_grouped_fake(x: Tensor, U: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], u.shape[0]) for u in U]


def _lowrank_glu_fake(x: Tensor, gate_U: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate_U.shape[0])


def _singular_value_grad_fake(
    x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, cu_seqlens: Tensor | None, per_sample: bool, unit: str, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (U.shape[1],)
    if per_sample:
        assert cu_seqlens is not None
        shape = (cu_seqlens.shape[0] - 1, U.shape[1])
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(0 if unit == "none" else shape, dtype=dtype)


# --- gradients: in terms of ordinary ops, so that they can be traced and differentiated again ------------------------


def _factor_grads(
    needs: Sequence[bool], grad_y: Tensor, x: Tensor, factors: Factors
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of one low-rank linear in x and in (U, s, Vh, bias); ``needs`` says for which of the five."""
    U, s, Vh, bias = factors
    x, grad_y = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    needs_x, needs_U, needs_s, needs_Vh, needs_bias = needs
    grad_x = grad_U = grad_s = grad_Vh = grad_bias = None
    if needs_U:
        grad_U = grad_y.mT @ project(x, s, Vh)
    if needs_x or needs_s or needs_Vh:
        grad_h = grad_y @ U  # [M, R]
        if s is not None:
            if needs_s:
                grad_s = (grad_h.to(s.dtype) * (x @ Vh.mT).to(s.dtype)).sum(0)
            grad_h = (grad_h.to(s.dtype) * s).to(grad_h.dtype)
        grad_x = grad_h @ Vh if needs_x else None
        grad_Vh = grad_h.mT @ x if needs_Vh else None
    if needs_bias and bias is not None:
        grad_bias = grad_y.sum(0)
    return grad_x, (grad_U, grad_s, grad_Vh, grad_bias)


def _lowrank_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])


def _lowrank_linear_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, *factors = ctx.saved_tensors
    grad_x, grads = _factor_grads(ctx.needs_input_grad[:5], grad_y, x, Factors(*factors))
    return None if grad_x is None else grad_x.view_as(x), *grads, None


def _lowrank_linear_grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, *columns, present, _ = inputs
    ctx.counts = [len(column) for column in columns]
    ctx.present = present
    ctx.save_for_backward(x, *(tensor for column in columns for tensor in column))


def _lowrank_linear_grouped_backward(ctx: Any, grad_ys: list[Tensor]) -> tuple[Any, ...]:
    x, *flat = ctx.saved_tensors
    remaining = iter(flat)
    columns = [[next(remaining) for _ in range(count)] for count in ctx.counts]
    needs_x = ctx.needs_input_grad[0]
    grad_x = None
    grads: list[list[Tensor | None]] = [[], [], [], []]
    for grad_y, factors in zip(grad_ys, _regroup(columns, ctx.present), strict=True):
        needs = [needs_x, *(tensor is not None and tensor.requires_grad for tensor in factors)]
        part, group = _factor_grads(needs, grad_y, x, factors)
        if part is not None:
            grad_x = part if grad_x is None else grad_x + part
        for column, tensor, grad in zip(grads, factors, group, strict=True):
            if tensor is not None:
                column.append(grad)
    return None if grad_x is None else grad_x.view_as(x), *grads, None, None


def _lowrank_glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.activation = inputs[9]


def _lowrank_glu_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    gate, up = Factors(*tensors[:4]), Factors(*tensors[4:])
    activation = ACTIVATIONS[ctx.activation]
    gate_y = torch.ops.grasp.lowrank_linear(x, *gate, "auto")
    up_y = torch.ops.grasp.lowrank_linear(x, *up, "auto")
    needs_x, *needs = ctx.needs_input_grad[:9]
    gate_x, gate_grads = _factor_grads([needs_x, *needs[:4]], activation.backward(grad_y * up_y, gate_y), x, gate)
    up_x, up_grads = _factor_grads([needs_x, *needs[4:]], grad_y * activation.forward(gate_y), x, up)
    grad_x = (gate_x + up_x).view_as(x) if gate_x is not None and up_x is not None else None
    return grad_x, *gate_grads, *up_grads, None, None


def _singular_value_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, grad_y, U, Vh, cu_seqlens, ctx.per_sample, ctx.unit, mask, _ = inputs
    ctx.save_for_backward(x, grad_y, U, Vh, cu_seqlens, mask)


def _singular_value_grad_backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
    x, grad_y, U, Vh, cu_seqlens, mask = ctx.saved_tensors
    dtype = accumulation_dtype(x.dtype)
    flat_x, flat_d = x.reshape(-1, x.shape[-1]).to(dtype), grad_y.reshape(-1, grad_y.shape[-1]).to(dtype)
    d_U, x_V = flat_d @ U.to(dtype), flat_x @ Vh.to(dtype).mT  # [T, R]
    sample = None  # [T]: the sample of each token
    if cu_seqlens is not None:
        starts = torch.arange(flat_x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        sample = torch.searchsorted(cu_seqlens[1:], starts, right=True)
    # The gradient in each token's product d_U * x_V.
    weight = grad_first[sample] if ctx.per_sample else grad_first.expand_as(d_U)
    if ctx.unit != "none":
        unit = d_U * x_V if mask is None else (d_U * x_V).masked_fill(~mask.reshape(-1, 1), 0)
        if ctx.unit == "sample":
            sums = unit.new_zeros(cu_seqlens.shape[0] - 1, unit.shape[1]).index_add(0, sample, unit)
            unit = sums[sample]
        weight = weight + 2 * unit * (grad_second[sample] if ctx.per_sample else grad_second)
    if mask is not None:
        weight = weight.masked_fill(~mask.reshape(-1, 1), 0)
    grad_d_U, grad_x_V = weight * x_V, weight * d_U
    needs_x, needs_d, needs_U, needs_Vh = ctx.needs_input_grad[:4]
    return (
        (grad_x_V @ Vh.to(dtype)).to(x.dtype).view_as(x) if needs_x else None,
        (grad_d_U @ U.to(dtype).mT).to(x.dtype).view_as(grad_y) if needs_d else None,
        (flat_d.mT @ grad_d_U).to(x.dtype) if needs_U else None,
        (grad_x_V.mT @ flat_x).to(x.dtype) if needs_Vh else None,
        *(None,) * 5,
    )


_OPS = {
    "lowrank_linear": (_lowrank_linear, _lowrank_linear_fake, _lowrank_linear_setup, _lowrank_linear_backward),
    "lowrank_linear_grouped": (
        _lowrank_linear_grouped,
        _lowrank_linear_grouped_fake,
        _lowrank_linear_grouped_setup,
        _lowrank_linear_grouped_backward,
    ),
    "lowrank_glu": (_lowrank_glu, _lowrank_glu_fake, _lowrank_glu_setup, _lowrank_glu_backward),
    "singular_value_grad": (
        _singular_value_grad,
        _singular_value_grad_fake,
        _singular_value_grad_setup,
        _singular_value_grad_backward,
    ),
}
for _name, (_implementation, _fake, _setup, _backward) in _OPS.items():
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grasp::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"grasp::{_name}", _backward, setup_context=_setup, lib=_library)
