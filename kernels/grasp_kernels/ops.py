"""The public ops: check the arguments, apply autocast, and call a registered op, which asks the dispatch table."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import direct, registered
from ._ops import ops
from .checks import (
    check_castable,
    check_factors,
    check_glu,
    check_member,
    check_singular_value_grad,
    to_factors,
    to_groups,
    to_members,
)
from .direct import PLAIN_TYPES, WATCHERS
from .dispatch import check_backend
from .reference import Dense, Factors

Linear = TypeVar("Linear", Factors, Factors | Dense)


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
    x: Tensor,
    U: Tensor,
    s: Tensor | None,
    Vh: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    U_scales: Tensor | None = None,
    Vh_scales: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Apply a rank-R linear layer without forming its weight: ``((x @ Vh.mT) * s) @ U.mT + bias``.

    With ``order``: ``h = x @ Vh.mT; y[..., order] = cat([h, h @ U.mT]) + bias[order]``; see ``Factors``.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        U: left factor, (N, R), dtype of ``x``; (N − R, R) with ``order``, which may be no rows (see ``Factors``).
        s: singular values, (R,), fp32 or the dtype of ``x``, or ``None`` if they are folded into the factors.
        Vh: right factor, (R, K), dtype of ``x``.
        bias: (N,), dtype of ``x``, or ``None``.
        order: (N,) int32, a permutation of ``range(N)``, or ``None``. Its values are read in each call of the CPU
            kernels, else once, and again after a change in place; not while a CUDA graph is captured.
        U_scales: if U is quantised, its scales, (rows of U, groups); see ``Factors``.
        Vh_scales: if Vh is quantised, its scales, (R, groups).
        backend: a name from ``available_backends()``, or ``"auto"`` for the first that accepts the call.

    Returns:
        (..., N), dtype of ``x`` (under autocast: autocast's dtype), accumulated in fp32.

    Raises:
        TypeError: if an argument has another type, such as an array instead of a tensor.
        ValueError: if a tensor is not dense, shapes, dtypes or devices do not agree, or ``order`` is no permutation;
            the message has what was got and what was expected.
        BackendUnavailableError: if a named backend cannot run this call; the message has its reason.

    Example:
        >>> import torch
        >>> from grasp_kernels import lowrank_linear
        >>> x, U, Vh = torch.randn(2, 64), torch.randn(32, 8), torch.randn(8, 64)
        >>> y = lowrank_linear(x, U, None, Vh)
        >>> torch.allclose(y, x @ (U @ Vh).mT, atol=1e-3)
        True
    """
    if (
        not is_dynamo_compiling()
        and (y := direct.linear(x, U, s, Vh, bias, order, U_scales, Vh_scales, backend)) is not None
    ):
        return y
    check_backend(backend)
    if torch._C._is_any_autocast_enabled():
        x, (group,) = _autocast(x, (Factors(U, s, Vh, bias, order, U_scales, Vh_scales),))
        U, s, Vh, bias, order, U_scales, Vh_scales = group
    check_factors(x, U, s, Vh, bias, order, U_scales, Vh_scales)
    plain = _is_plain(x, U, s, Vh, bias, order, U_scales, Vh_scales)
    run = registered.lowrank_linear if plain else ops.lowrank_linear.default
    return run(x, U, s, Vh, bias, order, U_scales, Vh_scales, backend)


def lowrank_linear_grouped(x: Tensor, factors: Sequence[Factors], *, backend: str = "auto") -> tuple[Tensor, ...]:
    """Apply several low-rank linears to one input, such as q/k/v or gate/up.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        factors: one ``Factors`` per output; ranks, widths and forms may differ.
        backend: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        One (..., N_i) per entry of ``factors``, dtype of ``x``.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if ``factors`` is empty, a tensor is not dense, shapes, dtypes or devices do not agree, or an
            ``order`` is no permutation.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, lowrank_linear_grouped
        >>> q, k = (Factors(torch.randn(N, 8), None, torch.randn(8, 64)) for N in (64, 16))
        >>> [tuple(y.shape) for y in lowrank_linear_grouped(torch.randn(2, 64), [q, k])]
        [(2, 64), (2, 16)]
    """
    if not is_dynamo_compiling() and (outputs := direct.grouped(x, factors, backend)) is not None:
        return outputs
    return tuple(_run_group("lowrank_linear_grouped", x, to_groups("lowrank_linear_grouped", factors), backend))


def lowrank_linear_merged(x: Tensor, factors: Sequence[Factors | Dense], *, backend: str = "auto") -> Tensor:
    """Apply several low-rank linears to one input, with their outputs side by side in one tensor.

    It equals ``torch.cat(lowrank_linear_grouped(x, factors), dim=-1)``, but a GPU copies nothing: kernels write each
    output into its columns. Some of the linears may be dense.

    Args:
        x: input, (..., K). fp32, fp16, bf16 or fp64.
        factors: one ``Factors`` per output; ranks, widths and forms may differ. Or
            ``Dense(weight, bias)``, which PyTorch computes but for few rows on a CPU.
        backend: of the low-rank linears: a name from ``available_backends()``, or ``"auto"``.

    Returns:
        (..., sum of N_i), dtype of ``x``.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if ``factors`` is empty, a tensor is not dense, shapes, dtypes or devices do not agree, or an
            ``order`` is no permutation.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, lowrank_linear_merged
        >>> q, k = (Factors(torch.randn(N, 8), None, torch.randn(8, 64)) for N in (64, 16))
        >>> lowrank_linear_merged(torch.randn(2, 64), [q, k]).shape
        torch.Size([2, 80])
    """
    if not is_dynamo_compiling() and (joined := registered.merged_directly(x, factors, backend)) is not None:
        return joined  # a few rows on a CPU: cheaper than to pass places for them
    return _run_group("lowrank_linear_merged", x, to_members("lowrank_linear_merged", factors), backend)


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
        TypeError: if an argument has another type.
        ValueError: if the activation is unknown, a tensor is not dense, shapes, dtypes or devices do not agree, or an
            ``order`` is no permutation.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors, lowrank_glu
        >>> gate, up = (Factors(torch.randn(48, R), None, torch.randn(R, 64)) for R in (8, 16))
        >>> lowrank_glu(torch.randn(2, 64), gate, up, activation="silu").shape
        torch.Size([2, 48])
    """
    check_backend(backend)
    gate, up = to_factors("gate", gate), to_factors("up", up)
    if torch._C._is_any_autocast_enabled():
        x, (gate, up) = _autocast(x, (gate, up))
    check_glu(x, gate, up, activation)
    if _is_plain(x, *gate, *up):
        return registered.lowrank_glu(x, gate, up, activation, backend)
    return ops.lowrank_glu.default(x, *gate, *up, activation, backend)


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
        TypeError: if an argument has another type.
        ValueError: if a tensor is not dense, shapes, dtypes or devices do not agree, or ``cu_seqlens`` does not rise
            from 0 to T.
        BackendUnavailableError: if a named backend cannot run this call.

    Example:
        >>> import torch
        >>> from grasp_kernels import singular_value_grad
        >>> x, grad_y = torch.randn(10, 64), torch.randn(10, 32)
        >>> singular_value_grad(x, grad_y, torch.randn(32, 8), torch.randn(8, 64)).first.shape
        torch.Size([8])
    """
    check_backend(backend)
    if not isinstance(per_sample, bool):
        raise TypeError(f"per_sample must be a bool, got {type(per_sample).__name__}")
    if second_moment is not None and not isinstance(second_moment, str):
        raise TypeError(f"second_moment must be a string or None, got {type(second_moment).__name__}")
    if second_moment not in (None, "token", "sample"):
        raise ValueError(f"second_moment must be None, 'token' or 'sample', got {second_moment!r}")
    unit = second_moment or "none"
    context: AbstractContextManager[object] = nullcontext()
    if torch._C._is_any_autocast_enabled():
        check_castable(x=x, grad_y=grad_y, U=U, Vh=Vh)
        if _autocasts(x):
            dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in (x, grad_y, U, Vh)))
            x, grad_y, U, Vh = (tensor.to(dtype) for tensor in (x, grad_y, U, Vh))
            context = torch.autocast(x.device.type, enabled=False)
    with context:
        check_singular_value_grad(x, grad_y, U, Vh, cu_seqlens, mask)
        plain = _is_plain(x, grad_y, U, Vh, cu_seqlens, mask)
        run = registered.singular_value_grad if plain else ops.singular_value_grad.default
        first, second = run(x, grad_y, U, Vh, cu_seqlens, per_sample, unit, mask, backend)
    return SingularValueGrad(first, None if unit == "none" else second)


def _run_group(op: str, x: Tensor, members: Sequence[Factors | Dense], backend: str) -> Any:
    check_backend(backend)
    if torch._C._is_any_autocast_enabled():
        x, members = _autocast(x, members)
    for member in members:
        check_member(x, member)
    if _is_plain(x, *itertools.chain(*members)):
        return getattr(registered, op)(x, members, backend)
    if not torch.compiler.is_compiling() and any(map(_is_batched, (x, *itertools.chain(*members)))):
        raise NotImplementedError(f"torch.func.vmap of {op} is not supported; x takes any number of leading dimensions")
    rows = [Factors(m.weight, None, None, m.bias) if isinstance(m, Dense) else m for m in members]  # type: ignore[arg-type]
    columns = [[tensor for tensor in column if tensor is not None] for column in zip(*rows, strict=True)]
    present = [tensor is not None for row in rows for tensor in row]
    return getattr(ops, op).default(x, *columns, present, backend)


def _autocast(x: Tensor, members: Sequence[Linear]) -> tuple[Tensor, Sequence[Linear]]:
    """Cast as autocast does for a linear: it does not cast for a registered op.

    Quantised factors keep their dtype. Singular values and scales of another 16-bit dtype become fp32, which is exact.
    """
    check_castable(x=x)
    cast = [
        {
            name: tensor
            for name, tensor in member._asdict().items()
            if tensor is not None
            and name in ("U", "Vh", "bias", "weight")
            and getattr(member, f"{name}_scales", None) is None
        }
        for member in members
    ]
    for tensors in cast:
        check_castable(**tensors)
    if not _autocasts(x) or x.dtype == torch.float64:
        return x, members
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), [
        member._replace(
            **{name: tensor.to(dtype) for name, tensor in tensors.items()}, **_widened_scales(member, dtype)
        )
        for member, tensors in zip(members, cast, strict=True)
    ]


def _widened_scales(member: Linear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Singular values and scales in fp32, of those in 16 bits but not in ``dtype``."""
    scales = {name: scale for name, scale in member._asdict().items() if name in ("s", "U_scales", "Vh_scales")}
    narrow = {torch.bfloat16, torch.float16} - {dtype}
    return {name: scale.float() for name, scale in scales.items() if getattr(scale, "dtype", None) in narrow}


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled for the device of ``x``; it does not know meta tensors."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether the op's implementation can be called at once, without the 3 to 6 µs of PyTorch's dispatcher.

    False if a gradient is recorded, or a tensor subclass, a mode, a transform or a tracer must see the registered op.
    """
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError("the low-rank ops have no forward-mode derivative; use reverse mode")
    if torch.compiler.is_compiling():
        return False
    if any(watcher() for watcher in WATCHERS) or forward_ad._current_level >= 0:
        _refuse_func_grad(tensors)
        return False
    recording = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN_TYPES or tensor.is_meta or tensor.is_neg() or (recording and tensor.requires_grad)
        ):
            return False
    return True


def _refuse_func_grad(tensors: Sequence[Tensor | None]) -> None:
    """Raise if ``torch.func`` takes a gradient in one of the tensors; PyTorch's message would be of its internals."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if all(interpreter.key() != torch._C._functorch.TransformType.Grad for interpreter in stack):
        return
    for tensor in tensors:
        while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError(
                    "torch.func takes no gradients of the low-rank ops; use torch.autograd.grad, "
                    "torch.autograd.functional.jacobian or hessian"
                )
            tensor = torch._C._functorch.get_unwrapped(tensor)


def _is_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and torch._C._functorch.is_batchedtensor(tensor)
