"""The public ops: check the arguments, apply autocast, and call a registered op, which asks the dispatch table."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from grasp_kernels import gradients
from grasp_kernels.checks import check_bounds, check_factors, check_singular_value_grad
from grasp_kernels.dispatch import open_direct_path, select
from grasp_kernels.reference import ACTIVATIONS, Factors, accumulation_dtype

_PLAIN_TYPES = (Tensor, nn.Parameter)
# Each returns a true value while a mode, a transform or a tracer is active, which must see the registered op.
_WATCHERS: tuple[Callable[[], object], ...] = (
    torch._C._len_torch_function_stack,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)
SECOND_MOMENTS = ("none", "token", "sample")


class SingularValueGrad(NamedTuple):
    """The gradient of the loss in each singular value, and the sum of its squares over tokens or samples.

    Example:
        >>> import torch
        >>> from grasp_kernels import SingularValueGrad
        >>> SingularValueGrad(first=torch.ones(3), second=None).first
        tensor([1., 1., 1.])
    """

    first: Tensor
    second: Tensor | None


def lowrank_linear(
    x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Apply a rank-R linear layer without forming its weight: ``((x @ Vh.mT) * s) @ U.mT + bias``.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        U: left factor, (N, R), dtype of ``x``.
        s: singular values, (R,), fp32 or the dtype of ``x``, or ``None`` if they are folded into the factors.
        Vh: right factor, (R, K), dtype of ``x``.
        bias: (N,), dtype of ``x``, or ``None``.
        backend: a name from ``available_backends()``, or ``"auto"`` for the first that accepts the call.

    Returns:
        (..., N), dtype of ``x`` (under autocast: autocast's dtype), accumulated in fp32.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree; the message has both.
        BackendUnavailableError: if a named backend cannot run this call; the message has its reason.

    Example:
        >>> import torch
        >>> from grasp_kernels import lowrank_linear
        >>> x, U, Vh = torch.randn(2, 64), torch.randn(32, 8), torch.randn(8, 64)
        >>> y = lowrank_linear(x, U, None, Vh)
        >>> torch.allclose(y, x @ (U @ Vh).mT, atol=1e-3)
        True
    """
    if not is_dynamo_compiling() and (y := _direct_linear(x, U, s, Vh, bias, backend)) is not None:
        return y
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x, ((U, s, Vh, bias),) = _autocast(x, (Factors(U, s, Vh, bias),))
    check_factors(x, U, s, Vh, bias)
    run = _lowrank_linear if _is_plain(x, U, s, Vh, bias) else torch.ops.grasp.lowrank_linear.default
    return run(x, U, s, Vh, bias, backend)


def lowrank_linear_grouped(x: Tensor, factors: Sequence[Factors], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Apply several low-rank linears to one input, such as q/k/v or gate/up.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        factors: one ``Factors(U, s, Vh, bias)`` per output; ranks and widths may differ.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        One (..., N_i) per entry of ``factors``, dtype of ``x``.

    Raises:
        ValueError: if ``factors`` is empty, or shapes, dtypes or devices do not agree.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, lowrank_linear_grouped
        >>> q, k = (Factors(torch.randn(N, 8), None, torch.randn(8, 64)) for N in (64, 16))
        >>> [tuple(y.shape) for y in lowrank_linear_grouped(torch.randn(2, 64), [q, k])]
        [(2, 64), (2, 16)]
    """
    if not is_dynamo_compiling() and (outputs := _direct_grouped(x, factors, backend)) is not None:
        return outputs
    if not factors:
        raise ValueError("lowrank_linear_grouped needs at least one Factors(U, s, Vh, bias), got none")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x, factors = _autocast(x, factors)
    for group in factors:
        check_factors(x, *group)
    if _is_plain(x, *itertools.chain(*factors)):
        return tuple(_run_grouped(x, factors, backend))
    columns = [[tensor for tensor in column if tensor is not None] for column in zip(*factors, strict=True)]
    present = [tensor is not None for group in factors for tensor in group]
    return tuple(torch.ops.grasp.lowrank_linear_grouped.default(x, *columns, present, backend))


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """Apply a gated linear unit whose two linears are low-rank: ``act(gate(x)) * up(x)``.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        gate: factors of the linear whose output goes through the activation, width N.
        up: factors of the other linear, width N; the rank may differ.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        (..., N), dtype of ``x``.

    Raises:
        ValueError: if the activation is unknown, the widths differ, or shapes, dtypes or devices do not agree.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, lowrank_glu
        >>> gate, up = (Factors(torch.randn(48, R), None, torch.randn(R, 64)) for R in (8, 16))
        >>> lowrank_glu(torch.randn(2, 64), gate, up, activation="silu").shape
        torch.Size([2, 48])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x, (gate, up) = _autocast(x, (gate, up))
    check_factors(x, *gate)
    check_factors(x, *up)
    if gate.U.shape[0] != up.U.shape[0]:
        raise ValueError(f"gate and up must have one width, got {gate.U.shape[0]} and {up.U.shape[0]}")
    run = _lowrank_glu if _is_plain(x, *gate, *up) else torch.ops.grasp.lowrank_glu.default
    return run(x, *gate, *up, activation, backend)


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
        cu_seqlens: (B + 1,) int32 or int64, rising from 0 to T: the first of the T flattened tokens of each sample.
            Without it each index of ``x.shape[:-2]`` is a sample; a 2-D ``x`` is one sample.
        per_sample: return one gradient per sample instead of their sum.
        second_moment: also sum the squared gradient of each ``"token"`` or each ``"sample"``.
        mask: bool, the leading dimensions of ``x``; tokens where it is False are ignored.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        ``first`` and ``second`` (``None`` without ``second_moment``), (R,) or with ``per_sample`` (B, R); fp32, or fp64
        for fp64. With ``per_sample``, ``second`` is summed within each sample.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree, or ``cu_seqlens`` does not rise from 0 to T.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import singular_value_grad
        >>> x, grad_y = torch.randn(10, 64), torch.randn(10, 32)
        >>> singular_value_grad(x, grad_y, torch.randn(32, 8), torch.randn(8, 64)).first.shape
        torch.Size([8])
    """
    unit = "none" if second_moment is None else second_moment
    if unit not in SECOND_MOMENTS or second_moment == "none":
        raise ValueError(f"second_moment must be None, 'token' or 'sample', got {second_moment!r}")
    options = (cu_seqlens, per_sample, unit, mask, backend)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = _widest_dtype(x, grad_y, U, Vh)
        with torch.autocast(x.device.type, enabled=False):
            return _run_singular_value_grad(x.to(dtype), grad_y.to(dtype), U.to(dtype), Vh.to(dtype), *options)
    return _run_singular_value_grad(x, grad_y, U, Vh, *options)


def _run_singular_value_grad(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    cu_seqlens: Tensor | None,
    per_sample: bool,
    unit: str,
    mask: Tensor | None,
    backend: str,
) -> SingularValueGrad:
    check_singular_value_grad(x, grad_y, U, Vh, cu_seqlens, mask)
    if cu_seqlens is None and (per_sample or unit == "sample"):
        cu_seqlens = _equal_samples(x)
    plain = _is_plain(x, grad_y, U, Vh, cu_seqlens, mask)
    run = _singular_value_grad if plain else torch.ops.grasp.singular_value_grad.default
    first, second = run(x, grad_y, U, Vh, cu_seqlens, per_sample, unit, mask, backend)
    return SingularValueGrad(first, None if unit == "none" else second)


def _autocast(x: Tensor, factors: Sequence[Factors]) -> tuple[Tensor, Sequence[Factors]]:
    """Cast as autocast does for a linear: it does not cast for a registered op. Singular values keep their dtype."""
    if x.dtype == torch.float64:
        return x, factors
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [Factors(g.U.to(dtype), g.s, g.Vh.to(dtype), None if g.bias is None else g.bias.to(dtype)) for g in factors]
    return x.to(dtype), cast


def _widest_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a statistic under autocast, which gives x and grad_y different ones: nothing is rounded."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _equal_samples(x: Tensor) -> Tensor:
    """The ``cu_seqlens`` of an input without one: samples of equal length, (B + 1,) int64."""
    length = x.shape[-2] if x.dim() > 1 else 1
    return torch.arange(x.shape[:-2].numel() + 1, device=x.device, dtype=torch.int64) * length


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether the op's implementation can be called at once, without the 3 to 6 µs of PyTorch's dispatcher.

    False if a gradient is recorded, or a tensor subclass, a mode, a transform or a tracer must see the registered op.
    """
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError("the low-rank ops have no forward-mode derivative; use reverse mode")
    if torch.compiler.is_compiling() or any(watcher() for watcher in _WATCHERS) or forward_ad._current_level >= 0:
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or tensor.is_meta
            or tensor.is_neg()
            or (recording and tensor.requires_grad)
        ):
            return False
    return True


def _decline(*_: object) -> None:
    """Stands for the direct path of an op that has none."""


# The table decides which calls take the direct path. A call that does returns before any check in this file.
_DIRECT = open_direct_path(_PLAIN_TYPES, (*_WATCHERS, torch._C._is_any_autocast_enabled))
_direct_linear: Callable[..., Tensor | None] = _DIRECT.get("lowrank_linear", _decline)
_direct_grouped: Callable[..., tuple[Tensor, ...] | None] = _DIRECT.get("lowrank_linear_grouped", _decline)


# --- the registered ops -----------------------------------------------------------------------------------------------

_library = torch.library.Library("grasp", "DEF")
_FACTORS = "Tensor {0}U, Tensor? {0}s, Tensor {0}Vh, Tensor? {0}bias"
_SCHEMAS = {
    "lowrank_linear": f"(Tensor x, {_FACTORS.format('')}, str backend) -> Tensor",
    "lowrank_linear_grouped": (
        # Autograd supports lists of tensors, but not of optional ones: `present` tells which of the 4 each group has.
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


def _select(backend: str, op: str, x: Tensor, rank: int) -> Callable[..., Any]:
    return select(backend, op, x.device, x.dtype, x.numel() // x.shape[-1], rank)


def _rows(x: Tensor) -> Tensor:
    """(..., K) → (M, K)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unrows(y: Tensor, x: Tensor) -> Tensor:
    """(M, N) → (..., N), with the leading dimensions of ``x``."""
    if x.dim() == 2:
        return y
    *leading, _ = x.shape
    return y.view(*leading, y.shape[-1])


def _lowrank_linear(x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    run = _select(backend, "lowrank_linear", x, U.shape[1])
    return _unrows(run(_rows(x), U, s, Vh, bias), x)


def _run_grouped(x: Tensor, factors: Sequence[Factors], backend: str) -> list[Tensor]:
    run = _select(backend, "lowrank_linear_grouped", x, max(group.U.shape[1] for group in factors))
    return [_unrows(y, x) for y in run(_rows(x), factors)]


def _lowrank_linear_grouped(x: Tensor, *args: Any) -> list[Tensor]:
    columns, (present, backend) = args[:4], args[4:]
    return _run_grouped(x, gradients.regroup(columns, present), backend)


def _lowrank_glu(x: Tensor, *args: Any) -> Tensor:
    gate, up, (activation, backend) = Factors(*args[:4]), Factors(*args[4:8]), args[8:]
    run = _select(backend, "lowrank_glu", x, max(gate.U.shape[1], up.U.shape[1]))
    return _unrows(run(_rows(x), gate, up, activation), x)


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
    run = _select(backend, "singular_value_grad", x, U.shape[1])
    x, grad_y, mask = _rows(x), _rows(grad_y), None if mask is None else mask.reshape(-1)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, x.shape[0])
    if x.shape[0] == 0:
        first, second = _singular_value_grad_fake(x, grad_y, U, Vh, cu_seqlens, per_sample, second_moment)
        return first.zero_(), second.zero_()
    return run(x, grad_y, U, Vh, cu_seqlens, per_sample, second_moment, mask)


def _lowrank_linear_fake(x: Tensor, U: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], U.shape[0])


def _lowrank_linear_grouped_fake(x: Tensor, U: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], u.shape[0]) for u in U]


def _lowrank_glu_fake(x: Tensor, gate_U: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate_U.shape[0])


def _singular_value_grad_fake(
    x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, cu_seqlens: Tensor | None, per_sample: bool, unit: str, *_: Any
) -> tuple[Tensor, Tensor]:
    shape: tuple[int, ...] = (U.shape[1],)
    if per_sample:
        assert cu_seqlens is not None
        shape = (cu_seqlens.shape[0] - 1, U.shape[1])
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(0 if unit == "none" else shape, dtype=dtype)


class _Op(NamedTuple):
    implementation: Callable[..., Any]
    fake: Callable[..., Any]
    setup: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]


_OPS = {
    "lowrank_linear": _Op(
        _lowrank_linear,
        _lowrank_linear_fake,
        gradients.lowrank_linear_setup,
        gradients.lowrank_linear_backward,
    ),
    "lowrank_linear_grouped": _Op(
        _lowrank_linear_grouped,
        _lowrank_linear_grouped_fake,
        gradients.lowrank_linear_grouped_setup,
        gradients.lowrank_linear_grouped_backward,
    ),
    "lowrank_glu": _Op(_lowrank_glu, _lowrank_glu_fake, gradients.lowrank_glu_setup, gradients.lowrank_glu_backward),
    "singular_value_grad": _Op(
        _singular_value_grad,
        _singular_value_grad_fake,
        gradients.singular_value_grad_setup,
        gradients.singular_value_grad_backward,
    ),
}
for _name, _op in _OPS.items():
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _op.implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grasp::{_name}", _op.fake, lib=_library)
    torch.library.register_autograd(f"grasp::{_name}", _op.backward, setup_context=_op.setup, lib=_library)
