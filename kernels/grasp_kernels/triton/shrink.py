"""Device functions of the first phase: tiles of ``h = x @ Vh.mT``, as partial sums over splits of K."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    dequantized,
    dot,
    hidden_column,
    load_factor,
    load_row_scales,
    member,
    pick,
    reduced_hidden,
    round_to,
    stack_rows,
    sum_partials,
    wait_and_release,
)

PREFETCHERS = tl.constexpr(128)  # threads over which the rows of a tile of Vh are spread: those of four warps


@triton.jit
def shrink_tile(
    x_ptr,
    vh_ptr,
    scales_ptr,
    offs_m,  # [BLOCK_M]
    offs_r,  # [BLOCK_R]
    M,
    K,
    R,
    stride_xm,
    stride_vr,
    start,
    stop,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] of ``x[:, start:stop] @ Vh[:, start:stop].mT``, fp32."""
    if BLOCK_M < 16:
        acc0 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        acc1 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
            offs_k = k + tl.arange(0, BLOCK_K)
            vh = load_factor(vh_ptr, scales_ptr, offs_r, k, R, K, stride_vr, GROUP, BLOCK_K)
            vh = dequantized(vh, tl.float32)  # [BLOCK_R, BLOCK_K]
            # x is loaded as a vector: a tile of it in the layout of Vh would be copied as often as Vh has rows.
            acc0 += tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :] * vh
            if BLOCK_M == 2:
                acc1 += tl.load(x_ptr + stride_xm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :] * vh
        h = stack_rows(tl.sum(acc0, 1), tl.sum(acc1, 1), BLOCK_M)
    else:
        h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
        for k in range(start, stop, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + offs_k[None, :], mask=(offs_m < M)[:, None] & (offs_k < K)[None, :], other=0.0)
            vh = load_factor(vh_ptr, scales_ptr, offs_r, k, R, K, stride_vr, GROUP, BLOCK_K)
            h = dot(x, tl.trans(dequantized(vh, x.dtype)), h)
    return h


@triton.jit
def prefetch_ranges(vh_ptr, offs_r, R, stride_vr, start, stop, LANES: tl.constexpr):
    """Addresses and sizes in bytes, [BLOCK_R, LANES] each, of ``Vh[offs_r, start:stop]``: one range for each row.

    Of the threads of a row, the first has the range and the others have the size 0: a warp issues one after the other.
    The hardware prefetches multiples of 16 bytes at multiples of 16, so both ends are rounded down. That leaves no page
    of Vh: no address of another allocation can fault.
    """
    size: tl.constexpr = vh_ptr.dtype.element_ty.primitive_bitwidth // 8
    if vh_ptr.dtype.element_ty == tl.uint8:  # two int4
        start, stop = start // 2, stop // 2
    rows = (vh_ptr + offs_r[:, None] * stride_vr).to(tl.int64)  # [BLOCK_R, 1]
    begin = (rows + start * size) & -16
    end = (rows + stop * size) & -16
    used = (offs_r < R)[:, None] & (tl.arange(0, LANES) == 0)[None, :] & (start < stop)
    return tl.broadcast_to(begin, used.shape), tl.where(used, end - begin, 0).to(tl.int32)


@triton.jit
def prefetch(begin, size):
    """Ask for copies of memory in the second-level cache, without waiting for them; no thread reads them here."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}",
        "=r,l,r",
        [begin, size],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def reduce_hidden(
    h_ptr, h_ptrs, counter, columns, offs_m, mask, M, stride_hm, dtype: tl.constexpr, SPLITS: tl.constexpr
):
    """Count a stored split of a tile of h; after the last, store their sum, [BLOCK_M, BLOCK_R]; reset the counter."""
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        reduced, stride = reduced_hidden(h_ptr, M, stride_hm, dtype, offs_m.shape[0], SPLITS)
        total = sum_partials(h_ptrs, mask, M * stride_hm, SPLITS)
        reduced_ptrs = reduced + offs_m[:, None] * stride + columns
        tl.store(reduced_ptrs, round_to(total, reduced.dtype.element_ty), mask=mask)
        tl.store(counter, 0)


@triton.jit
def shrink(
    x_ptr,
    vh_ptrs,
    h_ptr,
    counter_ptr,
    order_ptr,  # None, or [N] of a gated linear unit's up
    entries_ptr,  # [N]
    scales_ptrs,  # of the rows of Vh, or of groups of them; None without scales
    ranks,
    vh_strides,
    tile,
    split,
    pid_m,
    rank_tiles,
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
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store one split of one tile of a group's h. With REDUCE, the last program of a tile stores the reduced h.

    With DEPENDENT, prefetch the tile of Vh, then wait for the previous launch. With an order, also invert a part of it.
    """
    index, local = member(tile, ranks, BLOCK_R)
    R = pick(ranks, index)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = local * BLOCK_R + tl.arange(0, BLOCK_R)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    start = split * length
    stop = tl.minimum(start + length, K)
    vh_ptr = pick(vh_ptrs, index)
    stride_vr = pick(vh_strides, index)
    if DEPENDENT:
        LANES: tl.constexpr = max(1, PREFETCHERS // BLOCK_R)
        rows = tl.where(pid_m == 0, R, 0)  # other programs read the same tile
        prefetch(*prefetch_ranges(vh_ptr, offs_r, rows, stride_vr, start, stop, LANES))
        wait_and_release()
    if order_ptr is not None:  # loaded before the long loop, and stored after it
        entries = (split * rank_tiles + tile) * ENTRIES + tl.arange(0, ENTRIES)
        places = tl.load(order_ptr + entries, mask=entries < tl.where(pid_m == 0, N, 0), other=-1)
    scales_ptr = vh_ptr  # a placeholder
    if scales_ptrs is not None:
        scales_ptr = pick(scales_ptrs, index)
    if scales_ptrs is not None and GROUP == 0:
        scales = load_row_scales(scales_ptr, offs_r, R)
    partial = shrink_tile(
        *(x_ptr, vh_ptr, scales_ptr, offs_m, offs_r, M, K, R, stride_xm, stride_vr, start, stop),
        *(BLOCK_M, BLOCK_R, BLOCK_K, STAGES, GROUP),
    )
    if scales_ptrs is not None and GROUP == 0:
        partial *= scales[None, :]
    columns = hidden_column(ranks, index) + offs_r[None, :]
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + columns
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(h_ptrs + split * (M * stride_hm), partial, mask=mask)
    if order_ptr is not None:
        tl.store(entries_ptr + places, entries, mask=(places >= 0) & (places < N))
    if REDUCE:
        counter = counter_ptr + pid_m * rank_tiles + tile
        dtype: tl.constexpr = x_ptr.dtype.element_ty
        reduce_hidden(h_ptr, h_ptrs, counter, columns, offs_m, mask, M, stride_hm, dtype, SPLITS)
