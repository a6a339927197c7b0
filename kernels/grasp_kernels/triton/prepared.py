"""Repeated low-rank calls: the two launches of a pair, planned once, run again with the addresses of other tensors.

A call is described by all that its plan and Triton's choice of a binary depend on: shapes, strides, dtypes, device,
which tensors there are, and that every address is a multiple of 16. Two calls of one description have launches that
differ only in addresses. A prepared pair holds binaries and numbers, but no tensor: outputs, h and counters belong to
the call, so to its stream and its CUDA graph. Triton's options for debugging act only on calls that are planned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..counters import counters, is_current, on_device
from ..reference import Factors
from .launch import Launch

_NONE = (None, None, None)
ALIGNMENT = 16  # bytes: Triton compiles other binaries for other addresses
MOST_PREPARED = 4096  # descriptions; then all are forgotten


class Addresses(NamedTuple):
    """Addresses of the tensors of a call; ``None`` for a member without s, bias or order."""

    x: int
    Vhs: tuple[int, ...]
    Us: tuple[int, ...]
    s: tuple[int | None, ...]
    biases: tuple[int | None, ...]
    orders: tuple[int | None, ...]
    aligned: bool  # all are multiples of ``ALIGNMENT``


def describe(x: Tensor, factors: Sequence[Factors], outputs: Sequence[Tensor] | None) -> tuple[Any, Addresses]:
    """The description of a checked call, hashable, and its addresses."""
    key: list[Any] = [x.shape, x.stride(), x.dtype, x.device]
    Vhs: list[int] = []
    Us: list[int] = []
    vectors: list[tuple[int | None, ...]] = []  # addresses of s, bias and order of each member, if one has any
    bits = first = x.data_ptr()
    following = 0
    for U, s, Vh, bias, order, *_ in factors:
        left, right = U.data_ptr(), Vh.data_ptr()
        bits |= left | right
        # A shrink reads Vh that lie one behind the other as one.
        key += (U.shape, U.stride(), Vh.stride(), right == following)
        following = right + Vh.nbytes
        Us.append(left)
        Vhs.append(right)
        if not (s is bias is order is None):
            vectors += [_NONE] * (len(Us) - 1 - len(vectors))
            vectors.append(tuple([None if vector is None else vector.data_ptr() for vector in (s, bias, order)]))
            present = [vector for vector in (s, bias, order) if vector is not None]
            key += [(s is None, bias is None, order is None), *((v.shape, v.stride(), v.dtype) for v in present)]
    if outputs is not None:
        key += [output.stride() for output in outputs]
    scales: tuple[int | None, ...] = (None,) * len(Us)
    biases = orders = scales
    if vectors:
        vectors += [_NONE] * (len(Us) - len(vectors))
        scales, biases, orders = zip(*vectors, strict=True)
        for address in (*scales, *biases, *orders):
            bits |= address or 0
    aligned = bits % ALIGNMENT == 0
    return tuple(key), Addresses(first, tuple(Vhs), tuple(Us), scales, biases, orders, aligned)


class _Kernel(NamedTuple):
    """A compiled launch whose first arguments change from call to call."""

    launcher: Callable[..., None]  # of Triton, in place of all that it does before in every launch
    grid: tuple[int, int, int]
    handles: tuple[Any, ...]  # of the binary, for the launcher; no hooks
    rest: tuple[Any, ...]  # the arguments after those that change

    @classmethod
    def of(cls, launch: Launch, binary: Any, changing: int) -> _Kernel:
        x, y, z = (*launch.grid, 1, 1)[:3]
        handles = (binary.function, binary.packed_metadata, None, None, None)
        rest = tuple(launch.arguments[name] for name in launch.kernel.arg_names[changing:])
        return cls(binary.run, (x, y, z), handles, rest)


class PreparedPair(NamedTuple):
    """The launches of shrink and expand."""

    rows: int
    widths: tuple[int, ...]
    hidden: int  # elements of x's dtype in the memory of h
    stacked: bool  # the shrink reads all Vh as one
    counters: int  # 0 without a reduction
    shrink: _Kernel
    expand: _Kernel
    vectors: bool  # a member has an s or a bias, or is pivoted
    pivoted: bool
    halves: tuple[int, ...] = ()  # of a gated linear unit: bytes from h to what gate and up read

    def replay(self, x: Tensor, addresses: Addresses, outputs: Sequence[Tensor] | None) -> list[Tensor] | None:
        """Run a call with the description of the first one; ``None``, and nothing, if an address is not aligned.

        Nor if Triton has hooks, such as those of its profiler, which a replay would not call.
        """
        hooks = triton.knobs.runtime
        if not addresses.aligned or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            return None
        new, device = x.new_empty, x.device
        if outputs is None:
            rows = self.rows
            ys = [new(rows, width) for width in self.widths]
        else:
            ys = list(outputs)
        memory = new(self.hidden)
        bits = h = memory.data_ptr()
        y = tuple([output.data_ptr() for output in ys])
        for address in y:
            bits |= address
        if bits % ALIGNMENT:
            return None
        if is_current(device):
            self._launch(x, addresses, y, h, memory)
        else:
            with on_device(device):
                self._launch(x, addresses, y, h, memory)
        return ys

    def _launch(self, x: Tensor, addresses: Addresses, y: tuple[int, ...], h: int, memory: Tensor) -> None:
        first, Vhs, Us, scales, biases, orders, _ = addresses
        device, shrink, expand = x.device, self.shrink, self.expand
        counter = counters(device, self.counters) if self.counters else memory  # alive until it is launched
        stream = driver.active.get_current_stream(device.index)
        start = (first, Vhs[:1] if self.stacked else Vhs, h, counter.data_ptr())
        run, (run_expand, grid, handles, rest) = shrink.launcher, expand
        if self.halves:
            gate_order, up_order = orders
            inverse = None if up_order is None else x.new_empty(self.widths[0], dtype=torch.int32)
            entries = None if inverse is None else inverse.data_ptr()
            run(*shrink.grid, stream, *shrink.handles, *start, up_order, entries, *shrink.rest)
            gate, up = (
                (U, s or U, bias or U, h + offset)  # U is a placeholder
                for U, s, bias, offset in zip(Us, scales, biases, self.halves, strict=True)
            )
            run_expand(*grid, stream, *handles, *gate, *up, *y, gate_order, entries, *rest)
            return
        run(*shrink.grid, stream, *shrink.handles, *start, None, None, *shrink.rest)
        if self.vectors:
            places = _filled(orders, h) if self.pivoted else None
            run_expand(*grid, stream, *handles, Us, _filled(scales, h), _filled(biases, h), y, h, places, *rest)
        else:
            run_expand(*grid, stream, *handles, Us, (h,), (h,), y, h, None, *rest)


PREPARED: dict[Any, PreparedPair] = {}  # by description; whoever changes what a plan depends on clears it


def prepare(
    key: Any,
    addresses: Addresses,
    outputs: Sequence[Tensor],
    launches: Sequence[Launch],
    binaries: Sequence[Any],
) -> None:
    """Remember a pair that has run, unless it copied a tensor, an address is not aligned, or it was interpreted.

    Args:
        key: the description of the call.
        addresses: of the call.
        outputs: of the call.
        launches: its shrink and expand.
        binaries: what they returned.
    """
    shrink, expand = launches
    first, second = shrink.arguments, expand.arguments
    x, hidden, Vhs = first["x_ptr"], first["h_ptr"], first["vh_ptrs"]
    h = hidden.data_ptr()
    gated, pivoted = "gate_h_ptr" in second, any(addresses.orders)
    given: list[tuple[int | None, ...]] = [(addresses.x,), addresses.Vhs[: len(Vhs)], addresses.Us]
    if gated:
        vectors = [[second[f"{member}_{name}_ptr"] for member in ("gate", "up")] for name in ("u", "s", "bias")]
        vectors.append([second["gate_order_ptr"], first["order_ptr"]])
        given += [
            tuple(address or U for address, U in zip(column, addresses.Us, strict=True))
            for column in (addresses.s, addresses.biases)
        ]
        given.append(addresses.orders)
    else:
        vectors = [second[name] for name in ("u_ptrs", "s_ptrs", "bias_ptrs", *["order_ptrs"] * pivoted)]
        given += [_filled(column, h) for column in (addresses.s, addresses.biases, *[addresses.orders] * pivoted)]
    used = [
        tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors) for tensors in ((x,), Vhs, *vectors)
    ]
    aligned = addresses.aligned and not any(tensor.data_ptr() % ALIGNMENT for tensor in (hidden, *outputs))
    if None in binaries or not aligned or used != given:
        return
    if len(PREPARED) >= MOST_PREPARED:
        PREPARED.clear()
    PREPARED[key] = PreparedPair(
        rows=x.shape[0],
        widths=tuple(output.shape[1] for output in outputs),
        hidden=hidden.nbytes // x.element_size(),
        stacked=len(Vhs) < len(addresses.Us),
        counters=first["counter_ptr"].numel() if first["REDUCE"] else 0,
        shrink=_Kernel.of(shrink, binaries[0], changing=6),
        expand=_Kernel.of(expand, binaries[1], changing=11 if gated else 6),
        vectors=pivoted or any(addresses.s) or any(addresses.biases),
        pivoted=pivoted,
        halves=tuple(second[f"{member}_h_ptr"].data_ptr() - h for member in ("gate", "up")) if gated else (),
    )


def _filled(addresses: tuple[int | None, ...], placeholder: int) -> tuple[int, ...]:
    """The addresses of s, biases or orders for a kernel: a member without one gets another's, or the placeholder."""
    present = [address for address in addresses if address is not None]
    if not present:
        return (placeholder,)
    return tuple([present[0] if address is None else address for address in addresses])
