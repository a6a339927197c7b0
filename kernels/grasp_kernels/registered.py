"""The registered ops, ``torch.ops.grasp``: their implementations, checks, fake tensors and gradients.

A caller of ``torch.ops.grasp``, or of a compiled or exported program, passes by the public functions of ``ops.py``. So
a registered op checks its arguments too. The public functions call the implementations, which do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import direct, gradients
from ._ops import add_op_namespace_prefix
from .checks import check_bounds, check_factors, check_glu, check_member, check_order, check_singular_value_grad
from .dispatch import check_backend, select
from .gradients import FIELDS
from .packing import widened
from .recording import record, recorders
from .reference import Dense, Factors, accumulation_dtype, equal_samples, linear, readable

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
_FACTORS = (
    "Tensor {0}U, Tensor? {0}s, Tensor {0}Vh, Tensor? {0}bias, Tensor? {0}order, Tensor? {0}U_scales, "
    "Tensor? {0}Vh_scales"
)
_LISTS = ", ".join(f"Tensor[] {name}" for name in Factors._fields)
_SCHEMAS = {
    "lowrank_linear": f"(Tensor x, {_FACTORS.format('')}, str backend) -> Tensor",
    "lowrank_linear_grouped": (
        # Autograd supports lists of tensors, but not of optional ones: `present` tells which fields each group has.
        f"(Tensor x, {_LISTS}, bool[] present, str backend) -> Tensor[]"
    ),
    "lowrank_linear_merged": f"(Tensor x, {_LISTS}, bool[] present, str backend) -> Tensor",
    "lowrank_glu": (
        f"(Tensor x, {_FACTORS.format('gate_')}, {_FACTORS.format('up_')}, str activation, str backend) -> Tensor"
    ),
    "singular_value_grad": (
        "(Tensor x, Tensor grad_y, Tensor U, Tensor Vh, Tensor? cu_seqlens, bool per_sample, str second_moment, "
        "Tensor? mask, str backend) -> (Tensor, Tensor)"
    ),
}


_FLOATING: frozenset[str] = frozenset()


def _select(backend: str, op: str, x: Tensor, *factors: Factors) -> Callable[..., Any]:
    rank, pivoted, weights = 0, False, _FLOATING  # a loop: generators take longer
    for group in factors:
        rank = max(rank, group.Vh.shape[0])
        if group.order is not None:
            pivoted = True
            check_order(group.order)
        if group.U_scales is not None or group.Vh_scales is not None:
            weights |= group.kinds
    run = select(backend, op, x.device, x.dtype, x.numel() // x.shape[-1], rank, pivoted, weights)
    if recorders:
        record(op, x, factors)
    return run


def _rows(x: Tensor) -> Tensor:
    """(..., K) → (M, K)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unrows(y: Tensor, x: Tensor) -> Tensor:
    """(M, N) → (..., N), with the leading dimensions of ``x``."""
    if x.dim() == 2:
        return y
    *leading, _ = x.shape
    return y.view(*leading, y.shape[-1])


def lowrank_linear(
    x: Tensor,
    U: Tensor,
    s: Tensor | None,
    Vh: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    U_scales: Tensor | None,
    Vh_scales: Tensor | None,
    backend: str,
) -> Tensor:
    """Run a checked call of ``lowrank_linear`` with the backend that the table selects."""
    factors = widened(Factors(U, s, Vh, bias, order, U_scales, Vh_scales))
    run = _select(backend, "lowrank_linear", x, factors)
    return _unrows(run(_rows(x), (factors,))[0], x)


def lowrank_linear_grouped(x: Tensor, factors: Sequence[Factors], backend: str) -> list[Tensor]:
    """Run a checked call of ``lowrank_linear_grouped`` with the backend that the table selects."""
    return [_unrows(y, x) for y in _run_grouped(x, factors, backend)]


def lowrank_linear_merged(x: Tensor, members: Sequence[Factors | Dense], backend: str) -> Tensor:
    """Run a checked call of ``lowrank_linear_merged``: each output is written into its columns of one tensor."""
    widths = [member.out_features for member in members]
    y = x.new_empty(*x.shape[:-1], sum(widths))
    factors: list[Factors] = []
    outputs: list[Tensor] = []
    for member, output in zip(members, y.view(-1, y.shape[-1]).split(widths, dim=1), strict=True):
        if isinstance(member, Dense):
            linear(readable(_rows(x)), *member, output)
        else:
            factors.append(member)
            outputs.append(output)
    if factors:
        _run_grouped(x, factors, backend, outputs)
    return y


def _run_grouped(x: Tensor, factors: Sequence[Factors], backend: str, *outputs: Sequence[Tensor]) -> list[Tensor]:
    factors = [widened(group) for group in factors]
    run = _select(backend, "lowrank_linear_grouped", x, *factors)
    return run(_rows(x), factors, *outputs)


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, activation: str, backend: str) -> Tensor:
    """Run a checked call of ``lowrank_glu`` with the backend that the table selects."""
    gate, up = widened(gate), widened(up)
    run = _select(backend, "lowrank_glu", x, gate, up)
    return _unrows(run(_rows(x), gate, up, activation), x)


def singular_value_grad(
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
    """Run a checked call of ``singular_value_grad`` with the backend that the table selects; check its bounds.

    Raises:
        ValueError: if ``cu_seqlens`` does not rise from 0 to the number of tokens.
    """
    run = _select(backend, "singular_value_grad", x, Factors(U, None, Vh))
    if cu_seqlens is None and (per_sample or second_moment == "sample"):
        cu_seqlens = equal_samples(x)
    elif cu_seqlens is not None:
        check_bounds(cu_seqlens, x.numel() // x.shape[-1])
    x, grad_y, mask = _rows(x), _rows(grad_y), None if mask is None else mask.reshape(-1)
    if x.shape[0] == 0:
        first, second = _singular_value_grad_fake(x, grad_y, U, Vh, cu_seqlens, per_sample, second_moment)
        return first.zero_(), second.zero_()
    return run(x, grad_y, U, Vh, cu_seqlens, per_sample, second_moment, mask)


def _lowrank_linear_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], Factors(*args[:FIELDS]).out_features)


def _lowrank_linear_grouped_fake(x: Tensor, factors: Sequence[Factors], _: str) -> list[Tensor]:
    return [_lowrank_linear_fake(x, *group) for group in factors]


def _lowrank_linear_merged_fake(x: Tensor, members: Sequence[Factors | Dense], _: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(member.out_features for member in members))


def _lowrank_glu_fake(x: Tensor, gate: Factors, *_: Any) -> Tensor:
    return _lowrank_linear_fake(x, *gate)


def _singular_value_grad_fake(
    x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, cu_seqlens: Tensor | None, per_sample: bool, unit: str, *_: Any
) -> tuple[Tensor, Tensor]:
    shape: tuple[int, ...] = (U.shape[1],)
    if per_sample:
        shape = (x.shape[:-2].numel() if cu_seqlens is None else cu_seqlens.shape[0] - 1, U.shape[1])
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(0 if unit == "none" else shape, dtype=dtype)


# --- from the arguments of a registered op to the checked arguments of its implementation -----------------------------


def _check_lowrank_linear(x: Tensor, *args: Any) -> tuple[Any, ...]:
    check_factors(x, *args[:FIELDS])
    return x, *args


def _check_members(x: Tensor, *args: Any, dense: bool) -> tuple[Any, ...]:
    members = gradients.to_members(args[:FIELDS], args[FIELDS], dense=dense)
    for member in members:
        check_member(x, member)
    return x, members, args[FIELDS + 1]


def _check_lowrank_glu(x: Tensor, *args: Any) -> tuple[Any, ...]:
    gate, up = Factors(*args[:FIELDS]), Factors(*args[FIELDS : 2 * FIELDS])
    check_glu(x, gate, up, args[2 * FIELDS])
    return x, gate, up, *args[2 * FIELDS :]


def _check_singular_value_grad(*args: Any) -> tuple[Any, ...]:
    x, grad_y, U, Vh, cu_seqlens, _, second_moment, mask, _ = args
    check_singular_value_grad(x, grad_y, U, Vh, cu_seqlens, mask)
    if second_moment not in ("none", "token", "sample"):
        raise ValueError(f"second_moment must be 'none', 'token' or 'sample', got {second_moment!r}")
    return args


class _Op(NamedTuple):
    check: Callable[..., tuple[Any, ...]]
    implementation: Callable[..., Any]
    fake: Callable[..., Any]
    setup: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]

    def checked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, the implementation or the fake, as a function of the registered op's arguments."""

        def run_checked(*args: Any) -> Any:
            check_backend(args[-1])
            args = self.check(*args)
            if not torch._C._is_any_autocast_enabled() or args[0].is_meta:
                return run(*args)
            with torch.autocast(args[0].device.type, enabled=False):  # the public functions have cast
                return run(*args)

        return run_checked


_OPS = {
    "lowrank_linear": _Op(
        _check_lowrank_linear,
        lowrank_linear,
        _lowrank_linear_fake,
        gradients.lowrank_linear_setup,
        gradients.lowrank_linear_backward,
    ),
    "lowrank_linear_grouped": _Op(
        functools.partial(_check_members, dense=False),
        lowrank_linear_grouped,
        _lowrank_linear_grouped_fake,
        gradients.lowrank_linear_grouped_setup,
        gradients.lowrank_linear_grouped_backward,
    ),
    "lowrank_linear_merged": _Op(
        functools.partial(_check_members, dense=True),
        lowrank_linear_merged,
        _lowrank_linear_merged_fake,
        gradients.lowrank_linear_grouped_setup,
        gradients.lowrank_linear_merged_backward,
    ),
    "lowrank_glu": _Op(
        _check_lowrank_glu,
        lowrank_glu,
        _lowrank_glu_fake,
        gradients.lowrank_glu_setup,
        gradients.lowrank_glu_backward,
    ),
    "singular_value_grad": _Op(
        _check_singular_value_grad,
        singular_value_grad,
        _singular_value_grad_fake,
        gradients.singular_value_grad_setup,
        gradients.singular_value_grad_backward,
    ),
}


def _grouped_directly(x: Tensor, *args: Any) -> list[Tensor] | None:
    outputs = direct.grouped(x, gradients.to_members(args[:FIELDS], args[FIELDS], dense=False), args[FIELDS + 1])
    return None if outputs is None else list(outputs)


def merged_directly(x: Tensor, members: Sequence[Factors | Dense], backend: str) -> Tensor | None:
    """``lowrank_linear_merged`` by the direct path, or ``None`` if it declines the call.

    Dense members, as factors of full rank, are part of the one call: PyTorch's product reads weights slower.
    """
    if isinstance(members, (list, tuple)) and any(type(member) is Dense for member in members):
        if type(x) not in direct.PLAIN_TYPES or not x.is_cpu or any(watcher() for watcher in direct.DIRECT_WATCHERS):
            return None  # a mode would also take what is cached for its own
        members = [_full_rank(member) if type(member) is Dense else member for member in members]
    outputs = direct.grouped(x, members, backend)
    return None if outputs is None else torch.cat(outputs, dim=-1)


def _full_rank(dense: Dense) -> Factors | Dense:
    """Pivoted factors whose Vh is the weight, without rows for U; ``dense`` itself if its weight is no matrix."""
    weight = dense.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return dense
    return Factors(weight.new_empty(0, len(weight)), None, weight, dense.bias, _identity(len(weight)))


@functools.cache
def _identity(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.int32, device="cpu")


def _merged_directly(x: Tensor, *args: Any) -> Tensor | None:
    return merged_directly(x, gradients.to_members(args[:FIELDS], args[FIELDS]), args[FIELDS + 1])


_DIRECT: dict[str, Callable[..., Any]] = {
    "lowrank_linear": direct.linear,
    "lowrank_linear_grouped": _grouped_directly,
    "lowrank_linear_merged": _merged_directly,
}


def _kernel(name: str, op: _Op) -> Callable[..., Any]:
    """What PyTorch's dispatcher calls: the direct path if the op has one that takes the call."""
    checked, directly = op.checked(op.implementation), _DIRECT.get(name)
    if directly is None:
        return checked

    def run(*args: Any) -> Any:
        result = directly(*args) if args[0].is_cpu else None
        return checked(*args) if result is None else result

    return run


for _name, _op in _OPS.items():
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _kernel(_name, _op), "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _op.checked(_op.fake), lib=_library)
    torch.library.register_autograd(add_op_namespace_prefix(_name), _op.backward, setup_context=_op.setup, lib=_library)
