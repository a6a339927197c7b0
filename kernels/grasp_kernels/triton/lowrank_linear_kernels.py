"""Triton kernels of the low-rank linear: the two phases as launches of their own, or in one with a grid barrier.

``lowrank_linear.py`` says why a dependent launch is right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import expand, first_u
from .shrink import shrink
from .tiles import arrive, wait, wait_and_release

BOTH_PHASES, SHRINK_ONLY, EXPAND_ONLY = 0, 1, 2  # of the fused kernel; the last two are for its tests
_SHRINK_ONLY, _EXPAND_ONLY = tl.constexpr(SHRINK_ONLY), tl.constexpr(EXPAND_ONLY)


@triton.jit(do_not_specialize=["M"])
def _lowrank_shrink_kernel(
    x_ptr,  # [M, K]
    vh_ptrs,  # of each member: [R, K]
    h_ptr,  # [SPLITS + REDUCE, M, columns] fp32
    counter_ptr,  # [1 + row tiles * rank tiles] int32, used with REDUCE
    order_ptr,  # None, or [N] int32 of the up of a gated linear unit
    entries_ptr,  # [N] int32: its inverse, which this kernel stores
    vh_scales_ptrs,  # of each member: [R, groups]; None without scales
    ranks,
    vh_strides,
    M,
    K,
    N,
    stride_xm,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    REDUCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ENTRIES: tl.constexpr,  # that a program stores
    VH_GROUP: tl.constexpr,  # columns per scale; 0: a row has one or none
):
    if REDUCE:
        counter_ptr += 1
    shrink(
        *(x_ptr, vh_ptrs, h_ptr, counter_ptr, order_ptr, entries_ptr, vh_scales_ptrs, ranks, vh_strides),
        *(tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), M, K, N, stride_xm, stride_hm),
        *(BLOCK_M, BLOCK_R, BLOCK_K, SPLITS, STAGES, REDUCE, DEPENDENT, ENTRIES, VH_GROUP),
    )


@triton.jit(do_not_specialize=["M"])
def _lowrank_expand_kernel(
    u_ptrs,  # of each member: [N - pivots, R]
    s_ptrs,  # [R]
    bias_ptrs,  # [N]
    y_ptrs,  # [M, N]
    h_ptr,  # [SPLITS + REDUCE, M, columns] fp32
    order_ptrs,  # [N] int32; None if no member is pivoted
    u_scales_ptrs,  # [N - pivots, groups]; None without scales
    widths,
    ranks,
    pivots,  # 0 for a member that is not pivoted; None if no member is
    u_strides,
    y_strides,
    M,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    REDUCE: tl.constexpr,
    SCALES: tl.constexpr,
    BIASES: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,  # of U, loaded before the wait for h
    LOOPED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    U_GROUP: tl.constexpr,  # columns per scale; 0: a row has one or none
):
    tile = tl.program_id(0)
    u = first_u(u_ptrs, u_scales_ptrs, widths, ranks, u_strides, pivots, tile, BLOCK_N, BLOCK_R, TILES, U_GROUP)
    if DEPENDENT:
        wait_and_release()
    elif TILES > 0:
        tl.debug_barrier()  # otherwise the assembler moves the loads of U behind those of h
    expand(
        *(u, (u_ptrs, u_scales_ptrs, s_ptrs, bias_ptrs, y_ptrs), h_ptr, order_ptrs),
        *((widths, ranks, u_strides, y_strides), pivots, tile, tl.program_id(1), M, stride_hm),
        *(BLOCK_M, BLOCK_N, BLOCK_R, SPLITS, REDUCE, SCALES, BIASES, STAGES, LOOPED, U_GROUP),
    )


@triton.jit(do_not_specialize=["M"])
def _lowrank_fused_kernel(
    x_ptr,  # [M, K]
    vh_ptrs,  # of each member: [R, K]
    u_ptrs,  # [N - pivots, R]
    s_ptrs,  # [R]
    bias_ptrs,  # [N]
    y_ptrs,  # [M, N]
    h_ptr,  # [SPLITS + REDUCE, M, columns] fp32
    order_ptrs,  # [N] int32; None if no member is pivoted
    counter_ptr,  # [1 + rank tiles] int32: the barrier's word, then one per tile
    widths,
    ranks,
    pivots,  # 0 for a member that is not pivoted; None if no member is
    vh_strides,
    u_strides,
    y_strides,
    rank_tiles,
    width_tiles,
    M,
    K,
    stride_xm,
    stride_hm,
    BLOCK_M: tl.constexpr,
    SHRINK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # the whole rank of each member
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    REDUCE: tl.constexpr,
    SCALES: tl.constexpr,
    BIASES: tl.constexpr,
    PHASE: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if PHASE != _EXPAND_ONLY:
        for task in range(pid, rank_tiles * SPLITS, programs):
            shrink(
                *(x_ptr, vh_ptrs, h_ptr, counter_ptr + 1, None, None, None, ranks, vh_strides),
                *(task % rank_tiles, task // rank_tiles, 0, rank_tiles),
                *(M, K, None, stride_xm, stride_hm, BLOCK_M, SHRINK_R, BLOCK_K, SPLITS, STAGES, REDUCE, False, 0, 0),
            )
    if PHASE != _SHRINK_ONLY:
        # Arrive first, then load U while other programs finish: an earlier load of U would delay the shrink.
        if PHASE != _EXPAND_ONLY:
            ticket = arrive(counter_ptr)
        u = first_u(u_ptrs, None, widths, ranks, u_strides, pivots, pid, BLOCK_N, BLOCK_R, 1, 0)
        if PHASE != _EXPAND_ONLY:
            wait(counter_ptr, ticket)
        for tile in range(pid, width_tiles, programs):
            expand(
                *(
                    u,
                    (u_ptrs, None, s_ptrs, bias_ptrs, y_ptrs),
                    h_ptr,
                    order_ptrs,
                    (widths, ranks, u_strides, y_strides),
                    pivots,
                ),
                *(tile, 0, M, stride_hm),
                *(BLOCK_M, BLOCK_N, BLOCK_R, SPLITS, REDUCE, SCALES, BIASES, STAGES, False, 0),
            )
            u = first_u(u_ptrs, None, widths, ranks, u_strides, pivots, tile + programs, BLOCK_N, BLOCK_R, 1, 0)
