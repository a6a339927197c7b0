"""The checks of the public ops' arguments, done once; every message says what was got and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .quantized import GROUPS, KINDS, group_size, stored_columns
from .reference import ACTIVATIONS, Dense, Factors
from .versions import PerVersion

_bounds_on_gpu: PerVersion[list[int]] = PerVersion(lambda cu_seqlens: cu_seqlens.tolist())
Member = TypeVar("Member")
_FACTORS = "Factors(U, s, Vh, bias, order, U_scales, Vh_scales)"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_factors(
    x: Tensor,
    U: Tensor,
    s: Tensor | None,
    Vh: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    U_scales: Tensor | None = None,
    Vh_scales: Tensor | None = None,
) -> None:
    """Check that the factors apply to ``x``. A valid call passes one test of 2 µs; the others find what is wrong.

    The entries of ``order`` are not read; see ``check_order``.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if a tensor is not dense, or shapes, dtypes or devices do not agree.
    """
    try:
        agree = U_scales is None and Vh_scales is None and _agree(x, U, s, Vh, bias, order)
    except (AttributeError, RuntimeError):  # not a tensor; a nested tensor, which has no shape
        agree = False
    if not agree:
        factors = Factors(U, s, Vh, bias, order, U_scales, Vh_scales)
        _check_dense(x=x, U=U, Vh=Vh)
        _check_optional(s=s, bias=bias, order=order, U_scales=U_scales, Vh_scales=Vh_scales)
        _check_shapes(x, factors)
        _check_dtypes(x, factors)
        _check_devices(x, factors)


def check_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that a dense linear applies to ``x``.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if a tensor is not dense, or shapes, dtypes or devices do not agree.
    """
    _check_dense(x=x, weight=weight)
    _check_optional(bias=bias)
    _check_dtype(x)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(f"expected x (..., K), weight (N, K), N and K at least 1; got {_shape(x)}, {_shape(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {_shape(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device}, got {tensor.dtype} on {tensor.device}")


def check_member(x: Tensor, member: Factors | Dense) -> None:
    """Check that a member of a merged call applies to ``x``; raises as ``check_factors`` and ``check_dense``."""
    if isinstance(member, Dense):
        check_dense(x, *member)
    else:
        check_factors(x, *member)


def check_glu(x: Tensor, gate: Factors, up: Factors, activation: str) -> None:
    """Check the arguments of ``lowrank_glu``.

    Raises:
        TypeError: if an argument is not a tensor, or the activation is not a string.
        ValueError: if the activation is unknown, the widths differ, or a factor does not apply to ``x``.
    """
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a string, got {_type(activation)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    check_factors(x, *gate)
    check_factors(x, *up)
    if gate.out_features != up.out_features:
        raise ValueError(f"gate and up must have one width, got {gate.out_features} and {up.out_features}")


def check_singular_value_grad(
    x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> None:
    """Check the arguments of ``singular_value_grad`` but not the values of ``cu_seqlens``.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if a tensor is not dense, or shapes, dtypes or devices do not agree.
    """
    check_factors(x, U, None, Vh)
    _check_dense(grad_y=grad_y)
    _check_optional(mask=mask, cu_seqlens=cu_seqlens)
    if grad_y.shape != (*x.shape[:-1], U.shape[0]):
        raise ValueError(f"grad_y must be {(*x.shape[:-1], U.shape[0])}, got {_shape(grad_y)}")
    if grad_y.dtype != x.dtype or grad_y.device != x.device:
        raise ValueError(f"grad_y must be {x.dtype} on {x.device}, got {grad_y.dtype} on {grad_y.device}")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device):
        raise ValueError(
            f"mask must be bool {_shape(x)[:-1]} on {x.device}, got {mask.dtype} {_shape(mask)} on {mask.device}"
        )
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be (B + 1,) int32 or int64, got {_shape(cu_seqlens)} {cu_seqlens.dtype}")
        if cu_seqlens.device != x.device:
            raise ValueError(f"cu_seqlens must be on the device of x, {x.device}, got {cu_seqlens.device}")


def check_castable(**tensors: Tensor) -> None:
    """Check that autocast can cast the tensors: the dtypes may differ.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if one is not dense or not floating point.
    """
    _check_dense(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")


def to_factors(name: str, value: object) -> Factors:
    """A group of factors, given as ``Factors`` or as another tuple of four to seven.

    Raises:
        TypeError: if it is neither; the message has ``name``.
    """
    if type(value) is Factors:
        return value
    if isinstance(value, tuple) and 4 <= len(value) <= len(Factors._fields):
        return Factors(*value)
    raise TypeError(f"{name} must be {_FACTORS}, got {_type(value)}")


def to_groups(op: str, factors: Iterable[object]) -> tuple[Factors, ...]:
    """Several groups as a tuple, which another thread cannot change between a check and its use.

    Raises:
        TypeError: if ``factors`` is not a sequence of groups.
        ValueError: if it is empty; the message has the name of the op.
    """
    return _to_tuple(op, factors, _FACTORS, to_factors)


def to_members(op: str, members: Iterable[object]) -> tuple[Factors | Dense, ...]:
    """The members of a merged call as a tuple; as ``to_groups``, but each may be ``Dense``."""
    expected = f"{_FACTORS} or Dense(weight, bias)"
    return _to_tuple(
        op, members, expected, lambda name, value: value if type(value) is Dense else to_factors(name, value)
    )


def _to_tuple(
    op: str, factors: Iterable[object], expected: str, convert: Callable[[str, object], Member]
) -> tuple[Member, ...]:
    if not isinstance(factors, Sequence) or isinstance(factors, str):
        raise TypeError(f"factors must be a list or tuple of {expected}, got {_type(factors)}")
    groups = tuple([convert("each of factors", group) for group in factors])
    if not groups:
        raise ValueError(f"{op} needs at least one {expected}, got none")
    return groups


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Check the values of ``cu_seqlens``; not while a CUDA graph is captured, because that would synchronize.

    Bounds on a GPU are read once per tensor and version, not in every call, because reading them synchronizes.

    Raises:
        ValueError: if they do not rise from 0 to ``tokens``.
    """
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bounds = _bounds_on_gpu(cu_seqlens) if cu_seqlens.is_cuda else cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got {bounds}")


def check_order(order: Tensor) -> None:
    """Check the entries of an ``order``; not while a CUDA graph is captured, because that would synchronize.

    They are read once per tensor and version, not in every call; see ``PerVersion``.

    Raises:
        ValueError: if they are no permutation of ``range(N)``.
    """
    if order.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if (objection := _order_objection(order)) is not None:
        raise ValueError(objection)


def _objection(order: Tensor) -> str | None:
    size = len(order)
    if torch.equal(order.sort().values, torch.arange(size, dtype=order.dtype, device=order.device)):
        return None
    places = order.sort().values.tolist()
    outside = [place for place in (places[0], places[-1]) if not 0 <= place < size]
    got = str(outside[0]) if outside else f"{next(a for a, b in pairwise(places) if a == b)} twice"
    return (
        f"order must have each of 0..{size - 1} once, the outputs of the rows of Vh and then of those of U; got {got}. "
        "Outputs that it lacks would not be written"
    )


_order_objection: PerVersion[str | None] = PerVersion(_objection, uncounted=True)


def _check_optional(**tensors: object) -> None:
    _check_dense(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def _check_dense(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_type(tensor)}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
            raise ValueError(f"{name} must be a dense tensor, got {kind}")


def _agree(x: Tensor, U: Tensor, s: Tensor | None, Vh: Tensor, bias: Tensor | None, order: Tensor | None) -> bool:
    left, right, dtype, device = U.shape, Vh.shape, x.dtype, x.device
    return (
        dtype in DTYPES
        and x.dim() > 0
        and len(left) == 2
        and right == (left[1], x.shape[-1])
        and 0 not in right
        and (left[0] > 0 or (order is not None and x.is_cpu))
        and U.dtype == dtype == Vh.dtype
        and U.device == device == Vh.device
        and x.layout is U.layout is Vh.layout is torch.strided
        and (s is None or (s.dtype in (torch.float32, dtype) and _is_vector(s, left[1:], device)))
        and (order is None or (s is None and order.dtype == torch.int32 and _is_vector(order, (sum(left),), device)))
        and (
            bias is None
            or (bias.dtype == dtype and _is_vector(bias, left[:1] if order is None else (sum(left),), device))
        )
    )


def _is_vector(tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> bool:
    return tensor.shape == shape and tensor.device == device and tensor.layout is torch.strided


def _check_shapes(x: Tensor, factors: Factors) -> None:
    U, s, Vh, bias, order, U_scales, Vh_scales = factors
    if x.dim() < 1 or U.dim() != 2 or Vh.dim() != 2:
        raise ValueError(f"expected x (..., K), U (N, R), Vh (R, K); got x {_shape(x)}, U {_shape(U)}, Vh {_shape(Vh)}")
    _check_scales("U", U, U_scales, len(Vh))
    _check_scales("Vh", Vh, Vh_scales, x.shape[-1])
    rank = len(Vh)
    if U.shape[1] != _stored(U, U_scales, rank) or Vh.shape[1] != _stored(Vh, Vh_scales, x.shape[-1]):
        halves = "; two int4 are one uint8" if torch.uint8 in (U.dtype, Vh.dtype) else ""
        raise ValueError(
            f"expected x (..., K), U (N, R), Vh (R, K){halves}; got x {_shape(x)}, U {_shape(U)}, Vh {_shape(Vh)}"
        )
    if 0 in Vh.shape or (U.shape[0] == 0 and order is None):
        raise ValueError(f"rank, N and K must be at least 1; got U {_shape(U)} and Vh {_shape(Vh)}")
    if U.shape[0] == 0 and Vh_scales is None and not x.is_cpu:
        raise ValueError(
            f"U without rows, a dense floating weight in Vh, is for the CPU, got tensors on {x.device}; use F.linear"
        )
    if s is not None and s.shape != (rank,):
        raise ValueError(f"s must be ({rank},), got {_shape(s)}")
    if s is not None and (order is not None or factors.quantized):
        kind = "pivoted" if order is not None else "quantised"
        raise ValueError(f"{kind} factors have no s, got s {_shape(s)}; fold it into U or Vh before")
    if order is not None and order.shape != (len(U) + rank,):
        raise ValueError(f"order must be ({len(U) + rank},) for U (N - R, R) = {_shape(U)}, got {_shape(order)}")
    if bias is not None and bias.shape != (factors.out_features,):
        raise ValueError(f"bias must be ({factors.out_features},), got {_shape(bias)}")


def _check_scales(name: str, values: Tensor, scales: Tensor | None, depth: int) -> None:
    if scales is None:
        return
    if values.dtype not in KINDS:
        kinds = ", ".join(f"{dtype} ({kind})" for dtype, kind in KINDS.items())
        raise ValueError(f"{name} with scales must be one of {kinds}, got {values.dtype}")
    if scales.dim() != 2 or len(scales) != len(values) or group_size(scales.shape[1], depth) is None:
        counts = sorted({1, *(-(-depth // size) for size in GROUPS)})
        raise ValueError(
            f"{name}_scales must be ({len(values)}, G), with G = 1 or groups of {', '.join(map(str, GROUPS))} of the "
            f"{depth} columns, {' or '.join(map(str, counts))}; got {_shape(scales)}"
        )


def _stored(matrix: Tensor, scales: Tensor | None, depth: int) -> int:
    return depth if scales is None else stored_columns(matrix.dtype, depth)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")


def _check_dtypes(x: Tensor, factors: Factors) -> None:
    U, s, Vh, bias, order, U_scales, Vh_scales = factors
    _check_dtype(x)
    plain = {"U": U if U_scales is None else None, "Vh": Vh if Vh_scales is None else None, "bias": bias}
    for name, tensor in plain.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}; cast one of them")
    for name, tensor in (("s", s), ("U_scales", U_scales), ("Vh_scales", Vh_scales)):
        if tensor is not None and tensor.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"{name} must be float32 or the dtype of x, {x.dtype}, got {tensor.dtype}")
    if order is not None and order.dtype != torch.int32:
        raise ValueError(f"order must be int32, got {order.dtype}")


def _check_devices(x: Tensor, factors: Factors) -> None:
    for name, tensor in zip(Factors._fields, factors, strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _type(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
