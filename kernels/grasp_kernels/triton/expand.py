"""Device functions of the second phase: tiles of ``y = (h * s) @ U.mT + bias``.

Outputs of pivoted factors are computed in the order of ``cat([h, U @ h])``: an output below the pivots is one of h, any
other one has a row of U. ``order`` has the place of each of them in y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    INTERPRETED,
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
)


@triton.jit
def load_scale(s_ptr, s_length, offs_r, SCALED: tl.constexpr):
    """[BLOCK_R] of s in fp32, ones from index ``s_length``: R, or 0 for a member without s."""
    scale = tl.full(offs_r.shape, 1.0, tl.float32)
    if SCALED:
        scale = tl.load(s_ptr + offs_r, mask=offs_r < s_length, other=1.0).to(tl.float32)
    return scale


@triton.jit
def hidden_rows(h_ptr, offs_m, offs_r, M, R, stride_hm, stride_hs, SPLITS: tl.constexpr):
    """[BLOCK_M, BLOCK_R] of h, the sum of its splits."""
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm + offs_r[None, :]
    return sum_partials(h_ptrs, (offs_m < M)[:, None] & (offs_r < R)[None, :], stride_hs, SPLITS)


@triton.jit
def expand_dot(acc, u, h, s_ptr, s_length, offs_r, SCALED: tl.constexpr):
    """``acc + (h * s) @ u.mT``; h is rounded once, to the dtype of u. In fp16 s scales u, because h could overflow."""
    h = h.to(tl.float32)
    if SCALED:
        scale = load_scale(s_ptr, s_length, offs_r, SCALED)[None, :]
        if u.dtype == tl.float16:
            u = round_to(u.to(tl.float32) * scale, tl.float16)
        else:
            h = h * scale
    return dot(round_to(h, u.dtype), tl.trans(u), acc)


@triton.jit
def hidden_row(h_ptr, row, offs_r, R, stride_hm, stride_hs, SPLITS: tl.constexpr):
    """[BLOCK_R] of one row of h, the sum of its splits."""
    return sum_partials(h_ptr + row * stride_hm + offs_r, offs_r < R, stride_hs, SPLITS)


@triton.jit
def expand_row(u, h, s_ptr, s_length, offs_r, SCALED: tl.constexpr):
    """``u * (h * s)``, [BLOCK_N, BLOCK_R] in fp32, not yet summed over the rank; h is one row."""
    return u * (h.to(tl.float32) * load_scale(s_ptr, s_length, offs_r, SCALED))[None, :]


@triton.jit
def hold(tiles):
    """The same tiles. All their loads are issued before the first of them is used; Triton would use each at once."""
    held: tl.tuple = ()
    for index in tl.static_range(len(tiles)):
        tile = tiles[index]
        if not INTERPRETED:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=False, pack=32 // tile.dtype.primitive_bitwidth
            )
        held += (tile,)
    return held


@triton.jit
def load_tiles(
    u_ptr,
    scales_ptr,
    offs_n,
    N,
    R,
    stride_un,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
):
    """The first tiles of U, [BLOCK_N, BLOCK_R] each, as a tuple: they can be in registers before h is read."""
    tiles: tl.tuple = ()
    for index in tl.static_range(TILES):
        tiles += (load_factor(u_ptr, scales_ptr, offs_n, index * BLOCK_R, N, R, stride_un, GROUP, BLOCK_R),)
    held: tl.tuple = ()
    for index in tl.static_range(TILES):
        held += (hold(tiles[index]),)
    return held


@triton.jit
def expand_tile(
    tiles,  # of U, from load_tiles
    u_ptr,
    scales_ptr,
    h_ptr,
    s_ptr,
    s_length,
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    M,
    N,
    R,
    stride_un,
    stride_hm,
    stride_hs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    LOOPED: tl.constexpr,  # the rank may exceed the loaded tiles
    GROUP: tl.constexpr,
    dtype: tl.constexpr,  # of the dot's operands
):
    """[BLOCK_M, BLOCK_N] of ``(h * s) @ U.mT``, fp32; h is the sum of its splits."""
    offs_r = tl.arange(0, BLOCK_R)
    first: tl.constexpr = len(tiles) * BLOCK_R
    h0: tl.tuple = ()
    h1: tl.tuple = ()
    for index in tl.static_range(len(tiles)):
        offs = index * BLOCK_R + offs_r
        if BLOCK_M < 16:
            h0 += (hidden_row(h_ptr, 0, offs, R, stride_hm, stride_hs, SPLITS),)
            if BLOCK_M == 2:
                h1 += (hidden_row(h_ptr, 1, offs, R, stride_hm, stride_hs, SPLITS),)
        else:
            h0 += (hidden_rows(h_ptr, offs_m, offs, M, R, stride_hm, stride_hs, SPLITS),)
    h0 = hold(h0)
    h1 = hold(h1)
    if BLOCK_M < 16:
        acc0 = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        acc1 = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for index in tl.static_range(len(tiles)):
            offs = index * BLOCK_R + offs_r
            ahead = dequantized(tiles[index], tl.float32)
            acc0 += expand_row(ahead, h0[index], s_ptr, s_length, offs, SCALED)
            if BLOCK_M == 2:
                acc1 += expand_row(ahead, h1[index], s_ptr, s_length, offs, SCALED)
        if LOOPED:
            for r in tl.range(first, R, BLOCK_R, num_stages=STAGES):
                offs = r + offs_r
                u = load_factor(u_ptr, scales_ptr, offs_n, r, N, R, stride_un, GROUP, BLOCK_R)
                u = dequantized(u, tl.float32)
                h = hidden_row(h_ptr, 0, offs, R, stride_hm, stride_hs, SPLITS)
                acc0 += expand_row(u, h, s_ptr, s_length, offs, SCALED)
                if BLOCK_M == 2:
                    h = hidden_row(h_ptr, 1, offs, R, stride_hm, stride_hs, SPLITS)
                    acc1 += expand_row(u, h, s_ptr, s_length, offs, SCALED)
        y = stack_rows(tl.sum(acc0, 1), tl.sum(acc1, 1), BLOCK_M)
    else:
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.static_range(len(tiles)):
            ahead = dequantized(tiles[index], dtype)
            y = expand_dot(y, ahead, h0[index], s_ptr, s_length, index * BLOCK_R + offs_r, SCALED)
        if LOOPED:
            for r in range(first, R, BLOCK_R):
                offs = r + offs_r
                u = load_factor(u_ptr, scales_ptr, offs_n, r, N, R, stride_un, GROUP, BLOCK_R)
                h = hidden_rows(h_ptr, offs_m, offs, M, R, stride_hm, stride_hs, SPLITS)
                y = expand_dot(y, dequantized(u, dtype), h, s_ptr, s_length, offs, SCALED)
    return y


@triton.jit
def load_bias(bias_ptr, bias_length, offs_n, BIASED: tl.constexpr):
    """[1, BLOCK_N] of the bias in fp32, zeros from index ``bias_length``: N, or 0 for a member without a bias."""
    bias = tl.zeros(offs_n.shape, tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < bias_length, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit
def store_rows(y_ptr, y, offs_m, offs_n, M, N, stride_ym):
    """Store [BLOCK_M, BLOCK_N] into an (M, N) output."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def within(entries, N):
    """Indices below N; N in place of the others, which no mask lets through."""
    return tl.where((entries >= 0) & (entries < N), entries, N)


@triton.jit
def places_of(order_ptr, entries, pivots, N):
    """Columns of y for entries of ``cat([h, U @ h])``, N for those outside. Without pivots they are the entries."""
    length = tl.where(pivots > 0, N, 0)
    places = tl.load(order_ptr + entries, mask=entries < length, other=-1, eviction_policy="evict_first")
    return within(tl.where(pivots > 0, places, entries), N)


@triton.jit
def rows_of_u(entries, pivots, N):
    """Rows of U, which has N - pivots, for entries of ``cat([h, U @ h])``; N, a row that it lacks, for those of h."""
    return tl.where(entries < pivots, N, entries - pivots)


@triton.jit
def with_pivots(y, least, h_ptr, offs_m, entries, M, pivots, stride_hm, stride_hs, SPLITS: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of y, with h in place of the entries below ``pivots``; no entry is below ``least``."""
    if least < pivots:
        h = hidden_rows(h_ptr, offs_m, entries, M, pivots, stride_hm, stride_hs, SPLITS)
        y = tl.where((entries < pivots)[None, :], h.to(tl.float32), y)
    return y


@triton.jit
def first_u(
    u_ptrs,
    scales_ptrs,  # of the rows of U, or of groups of them; None without scales
    widths,
    ranks,
    u_strides,
    pivots,
    tile,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The first tiles of U for a tile of a group's outputs, see ``load_tiles``; zeros past the last tile.

    If the rows of U have one scale each, these follow, [BLOCK_N].
    """
    index, local = member(tile, widths, BLOCK_N)
    offs_u = local * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = pick(widths, index)
    if pivots is not None:
        offs_u = rows_of_u(offs_u, pick(pivots, index), rows)
        rows -= pick(pivots, index)
    u_ptr = pick(u_ptrs, index)
    scales_ptr = u_ptr  # a placeholder
    if scales_ptrs is not None:
        scales_ptr = pick(scales_ptrs, index)
    tiles = load_tiles(
        *(u_ptr, scales_ptr, offs_u, rows, pick(ranks, index), pick(u_strides, index)),
        *(GROUP, BLOCK_R, TILES),
    )
    scales: tl.tuple = ()
    if scales_ptrs is not None and GROUP == 0:
        scales = (load_row_scales(scales_ptr, offs_u, rows),)
    return tiles, scales


@triton.jit
def expand(
    u,  # tiles and scales, from first_u
    pointers,  # (u_ptrs, scales_ptrs, s_ptrs, bias_ptrs, y_ptrs)
    h_ptr,
    order_ptrs,  # None if no member is pivoted
    sizes,  # (widths, ranks, u_strides, y_strides)
    pivots,  # 0 for a member that is not pivoted
    tile,
    pid_m,
    M,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    REDUCE: tl.constexpr,  # the shrink stored the reduced h
    SCALES: tl.constexpr,  # bit g: member g has an s
    BIASES: tl.constexpr,  # bit g: member g has a bias
    STAGES: tl.constexpr,
    LOOPED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute and store one tile of a group's outputs."""
    tiles, scales = u
    u_ptrs, scales_ptrs, s_ptrs, bias_ptrs, y_ptrs = pointers
    dtype: tl.constexpr = y_ptrs[0].dtype.element_ty
    widths, ranks, u_strides, y_strides = sizes
    index, local = member(tile, widths, BLOCK_N)
    N = pick(widths, index)
    R = pick(ranks, index)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = local * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, offs_u, rows = offs_n, offs_n, N
    if pivots is not None:
        first = pick(pivots, index)
        columns = places_of(pick(order_ptrs, index), offs_n, first, N)
        offs_u, rows = rows_of_u(offs_n, first, N), N - first
        R = tl.where((local + 1) * BLOCK_N <= first, 0, R)  # no output of the tile has a row of U
    column = hidden_column(ranks, index)
    partials, stride = h_ptr + column, stride_hm
    u_ptr = pick(u_ptrs, index)
    scales_ptr = u_ptr  # a placeholder
    if scales_ptrs is not None:
        scales_ptr = pick(scales_ptrs, index)
    stride_hs = M * stride_hm
    if REDUCE:
        h_ptr, stride_hm = reduced_hidden(h_ptr, M, stride_hm, dtype, BLOCK_M, SPLITS)
    READ: tl.constexpr = 1 if REDUCE else SPLITS
    s_length = ((SCALES >> index) & 1) * R
    bias_length = ((BIASES >> index) & 1) * N
    y = expand_tile(
        *(tiles, u_ptr, scales_ptr, h_ptr + column, pick(s_ptrs, index), s_length),
        *(offs_m, offs_u, M, rows, R, pick(u_strides, index), stride_hm, stride_hs),
        *(BLOCK_M, BLOCK_N, BLOCK_R, READ, SCALES != 0, STAGES, LOOPED, GROUP, dtype),
    )
    if len(scales) > 0:
        y *= scales[0][None, :]
    if pivots is not None:
        least = local * BLOCK_N
        y = with_pivots(y, least, partials, offs_m, offs_n, M, first, stride, M * stride, SPLITS)
    y += load_bias(pick(bias_ptrs, index), bias_length, columns, BIASES != 0)
    store_rows(pick(y_ptrs, index), y, offs_m, columns, M, N, pick(y_strides, index))
