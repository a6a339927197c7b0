"""Triton: ``act(gate(x)) * up(x)`` for two low-rank linears; one dual expand multiplies both in registers.

If gate is pivoted, outputs are computed in its order. If up is pivoted, its order is inverted first, to find its entry
for each output: by the shrink, or beside the matrix products by a small launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_configs import Config, choose
from ..packing import RANK_MULTIPLE, widened
from ..reference import ACTIVATIONS, Factors
from .expand import (
    expand_tile,
    load_bias,
    load_tiles,
    places_of,
    rows_of_u,
    store_rows,
    with_pivots,
    within,
)
from .launch import Gpu, Launch, gpu_of, run_all
from .lowrank_linear import (
    expand_gemm,
    expand_stages,
    hidden_gemm,
    launch_key,
    launch_options,
    lowrank_linear_grouped,
    max_rank,
    new_hidden,
    row_block,
    row_major,
    shrink_launch,
    tiles_ahead,
    unit_stride,
)
from .prepared import PREPARED, describe, prepare
from .tiles import wait_and_release

INVERT_BLOCK = 1024
PIVOTED_BLOCK_N = 64  # at most: with 128 rows and columns, two sums and an h spill registers


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation, in fp32."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x < 0.0, 0.0, x)  # tl.maximum loses NaN
    return y


@triton.jit(do_not_specialize=["M"])
def _lowrank_glu_expand_kernel(
    gate_u_ptr,  # [N - gate_pivots, gate_R]
    gate_s_ptr,  # [gate_R]
    gate_bias_ptr,  # [N]
    gate_h_ptr,  # [SPLITS, M, gate_R]
    up_u_ptr,  # [N - up_pivots, up_R]
    up_s_ptr,  # [up_R]
    up_bias_ptr,  # [N]
    up_h_ptr,  # [SPLITS, M, up_R]
    y_ptr,  # [M, N]
    gate_order_ptr,  # [N] int32, or None if gate is not pivoted
    up_entries_ptr,  # [N] int32: the inverse of the order of up, or None
    M,
    N,
    gate_R,
    up_R,
    gate_pivots,
    up_pivots,
    gate_stride_un,
    up_stride_un,
    gate_stride_hm,
    up_stride_hm,
    gate_stride_hs,
    up_stride_hs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALES: tl.constexpr,  # bit 0: gate has an s, bit 1: up has one
    BIASES: tl.constexpr,  # bit 0: gate has a bias, bit 1: up has one
    STAGES: tl.constexpr,
    TILES: tl.constexpr,  # of each U, loaded before the wait for h
    LOOPED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_rows, gate_size, columns = offs_n, N, offs_n
    if gate_order_ptr is not None:
        gate_rows, gate_size = rows_of_u(offs_n, gate_pivots, N), N - gate_pivots
        gate_R = tl.where((tl.program_id(0) + 1) * BLOCK_N <= gate_pivots, 0, gate_R)  # no output has a row of U
        columns = places_of(gate_order_ptr, offs_n, gate_pivots, N)
    gate_u = load_tiles(gate_u_ptr, gate_u_ptr, gate_rows, gate_size, gate_R, gate_stride_un, 0, BLOCK_R, TILES)
    up_rows, up_size = columns, N
    if up_entries_ptr is None:
        up_u = load_tiles(up_u_ptr, up_u_ptr, up_rows, up_size, up_R, up_stride_un, 0, BLOCK_R, TILES)
    if DEPENDENT:
        wait_and_release()
    elif TILES > 0:
        tl.debug_barrier()  # otherwise the assembler moves the loads of U behind those of h
    if up_entries_ptr is not None:  # written by the shrink
        entries = tl.load(up_entries_ptr + columns, mask=columns < N, other=-1, cache_modifier=".cg")
        entries = within(entries, N)
        up_rows, up_size = rows_of_u(entries, up_pivots, N), N - up_pivots
        up_u = load_tiles(up_u_ptr, up_u_ptr, up_rows, up_size, up_R, up_stride_un, 0, BLOCK_R, TILES)
    gate = expand_tile(
        *(gate_u, gate_u_ptr, gate_u_ptr, gate_h_ptr, gate_s_ptr, gate_R, offs_m, gate_rows, M, gate_size, gate_R),
        *(gate_stride_un, gate_stride_hm, gate_stride_hs),
        *(BLOCK_M, BLOCK_N, BLOCK_R, SPLITS, SCALES % 2 == 1, STAGES, LOOPED, 0, y_ptr.dtype.element_ty),
    )
    up = expand_tile(
        *(up_u, up_u_ptr, up_u_ptr, up_h_ptr, up_s_ptr, up_R, offs_m, up_rows, M, up_size, up_R),
        *(up_stride_un, up_stride_hm, up_stride_hs),
        *(BLOCK_M, BLOCK_N, BLOCK_R, SPLITS, SCALES >= 2, STAGES, LOOPED, 0, y_ptr.dtype.element_ty),
    )
    if gate_order_ptr is not None:
        gate = with_pivots(
            *(gate, tl.program_id(0) * BLOCK_N, gate_h_ptr, offs_m, offs_n, M),
            *(gate_pivots, gate_stride_hm, gate_stride_hs, SPLITS),
        )
    if up_entries_ptr is not None:
        up = with_pivots(up, 0, up_h_ptr, offs_m, entries, M, up_pivots, up_stride_hm, up_stride_hs, SPLITS)
    gate += load_bias(gate_bias_ptr, N, columns, BIASES % 2 == 1)
    up += load_bias(up_bias_ptr, N, columns, BIASES >= 2)
    store_rows(y_ptr, _activate(gate, ACTIVATION) * up, offs_m, columns, M, N, N)


@triton.jit
def _invert_kernel(order_ptr, entries_ptr, N, BLOCK: tl.constexpr):
    """``entries[order] = arange(N)``."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = tl.load(order_ptr + entries, mask=entries < N, other=-1)
    tl.store(entries_ptr + places, entries, mask=(places >= 0) & (places < N))


# --- launchers --------------------------------------------------------------------------------------------------------


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, activation: str) -> Tensor:
    """``act(gate(x)) * up(x)``; x is (M, K). Arguments and result as in ``reference.lowrank_glu``.

    Quantised factors have no dual expand: their outputs are computed first, then the activation.
    """
    if gate.quantized or up.quantized:
        gate_y, up_y = lowrank_linear_grouped(x, [gate, up])
        return ACTIVATIONS[activation].forward(gate_y).mul_(up_y)
    gate, up = factors = [widened(group, pivoted=True) if group.order is not None else group for group in (gate, up)]
    description, addresses = describe(x, factors, None)
    key = ("lowrank_glu", activation, description)
    pair = PREPARED.get(key)
    if pair is not None and (replayed := pair.replay(x, addresses, None)) is not None:
        return replayed[0]
    config = choose("lowrank_glu", gpu_of(x.device), launch_key(x, factors))
    output, launches, binaries = _run(x, gate, up, activation, config)
    if config.path == "pair" and launches:
        prepare(key, addresses, [output], launches, binaries)
    return output


def run(x: Tensor, gate: Factors, up: Factors, activation: str, config: Config) -> Tensor:
    """Run a call with a given configuration: shrink by kernel (``pair``) or matrix product (``gemms``); dual expand."""
    return _run(x, gate, up, activation, config)[0]


def _run(
    x: Tensor, gate: Factors, up: Factors, activation: str, config: Config
) -> tuple[Tensor, list[Launch], list[Any]]:
    """The output of a call, its launches, and their binaries."""
    Vhs = [gate.Vh, up.Vh]
    output = x.new_empty(x.shape[0], gate.out_features)
    if output.numel() == 0:
        return output, [], []
    if config.path == "gemms" and x.dtype == torch.float32:  # no tensor cores: the vendor's products are faster
        gate_y, up_y = (expand_gemm(h, group) for h, group in zip(hidden_gemm(x, Vhs), (gate, up), strict=True))
        return ACTIVATIONS[activation].forward(gate_y).mul_(up_y), [], []
    if config.path == "gemms":
        hidden = [h.unsqueeze(0) for h in hidden_gemm(x, Vhs)]
        gate, up = row_major(gate), row_major(up)
        entries = _new_entries(up)
        launches = [expand_launch(gate, up, hidden, entries, output, activation, config, dependent=False)]
        if entries is not None:
            launches.insert(0, invert_launch(up, entries))
    else:
        launches = plan(x, gate, up, activation, output, config, gpu_of(x.device))
    return output, launches, run_all(launches, x.device)


def plan(
    x: Tensor, gate: Factors, up: Factors, activation: str, output: Tensor, config: Config, gpu: Gpu
) -> list[Launch]:
    """The two launches of a call, in order; ``output`` is contiguous (M, N)."""
    x, gate, up = unit_stride(x), row_major(gate), row_major(up)
    hidden = new_hidden(x, [gate, up], config)
    read = hidden
    if config.reduce:
        read = hidden[-1:] if x.shape[0] <= 2 else hidden[-1:].view(x.dtype)
    column = triton.cdiv(gate.U.shape[1], RANK_MULTIPLE) * RANK_MULTIPLE
    halves = [read[:, :, :column], read[:, :, column:]]
    entries = _new_entries(up)
    return [
        shrink_launch(x, [gate, up], hidden, config, gpu, up.order, entries),
        expand_launch(gate, up, halves, entries, output, activation, config, dependent=gpu.dependent_launch),
    ]


def _new_entries(up: Factors) -> Tensor | None:
    """Memory for the inverse of the order of up, (N,) int32; ``None`` if it is not pivoted."""
    return None if up.order is None else torch.empty_like(up.order)


def invert_launch(up: Factors, entries: Tensor) -> Launch:
    """``entries[order] = arange(N)``."""
    arguments = {"order_ptr": up.order, "entries_ptr": entries, "N": len(entries), "BLOCK": INVERT_BLOCK}
    return Launch(_invert_kernel, (triton.cdiv(len(entries), INVERT_BLOCK),), arguments, {"num_warps": 4})


def expand_launch(
    gate: Factors,
    up: Factors,
    hidden: Sequence[Tensor],
    entries: Tensor | None,
    output: Tensor,
    activation: str,
    config: Config,
    *,
    dependent: bool,
) -> Launch:
    """The dual expand: ``hidden`` is h of gate and of up, (splits, M, at least R), fp32 or the dtype of the output.

    ``entries`` has the inverse of the order of up when the launch starts or, with ``dependent``, has waited.
    With ``dependent`` it starts before the previous launch ends, loads U and waits.
    """
    if gate.order is not None or up.order is not None:
        config = replace(config, expand_block_n=min(config.expand_block_n, PIVOTED_BLOCK_N))
    rows, width = output.shape
    block_m = row_block(rows, config)
    arguments: dict[str, Any] = {}
    for name, group, h in (("gate", gate, hidden[0]), ("up", up, hidden[1])):
        U, s, _, bias, order, *_ = group
        arguments |= {
            f"{name}_u_ptr": U,
            f"{name}_s_ptr": U if s is None else s,  # a placeholder that is not read
            f"{name}_bias_ptr": U if bias is None else bias,
            f"{name}_h_ptr": h,
            f"{name}_R": U.shape[1],
            f"{name}_pivots": None if order is None else group.pivots,
            f"{name}_stride_un": U.stride(0),
            f"{name}_stride_hm": h.stride(1),
            f"{name}_stride_hs": h.stride(0) if len(h) > 1 else 0,  # Triton compiles for its divisibility
        }
    rank, stages = max_rank([gate, up]), expand_stages(rows, config)
    loaded = tiles_ahead(rows, [gate, up], config, count=2) if config.path == "pair" else 0
    return Launch(
        _lowrank_glu_expand_kernel,
        (triton.cdiv(width, config.expand_block_n), triton.cdiv(rows, block_m)),
        {
            **arguments,
            "y_ptr": output,
            "gate_order_ptr": gate.order,
            "up_entries_ptr": entries,
            "M": rows,
            "N": width,
            "BLOCK_M": block_m,
            "BLOCK_N": config.expand_block_n,
            "BLOCK_R": config.expand_block_r,
            "SPLITS": hidden[0].shape[0],
            "SCALES": (gate.s is not None) + 2 * (up.s is not None),
            "BIASES": (gate.bias is not None) + 2 * (up.bias is not None),
            "STAGES": stages,
            "TILES": loaded,
            "LOOPED": rank > loaded * config.expand_block_r,
            "DEPENDENT": dependent,
            "ACTIVATION": activation,
        },
        launch_options(config.expand_warps, stages, dependent),
    )
