"""Device functions of the low-rank kernels: one tile of ``x @ Vh.mT``, one tile of ``(h * s) @ U.mT``, a grid barrier.

M rows of x, K in_features, R rank, N out_features; factors are row-major with a unit inner stride. Tiles of one or two
rows use scalar multiply-adds that are reduced once at the end; tiles of 16 and more use tensor-core dots. Both give
fp32. Triton copies ahead only in loops with a dot, so the loops of scalar tiles ask for it, with ``STAGES``. The
members of a group are passed as tuples; the number of a tile determines its member.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
RANK_ALIGNMENT = tl.constexpr(16)  # elements; the columns of a member in h start at a multiple of it
PREFETCHERS = tl.constexpr(128)  # threads over which the rows of a tile of Vh are spread: those of four warps
_FLIP = tl.constexpr(1 << 30)  # the bit of the barrier's word that each crossing flips


@triton.jit
def member(tile, sizes, BLOCK: tl.constexpr):
    """The index of the member that a tile belongs to, and the tile's number within the member."""
    index = 0
    local = tile
    first = 0
    for g in tl.static_range(1, len(sizes)):
        first += tl.cdiv(sizes[g - 1], BLOCK)
        inside = tile >= first
        index = tl.where(inside, g, index)
        local = tl.where(inside, tile - first, local)
    return index, local


@triton.jit
def pick(values, index):
    """``values[index]`` for an index known only at run time."""
    value = values[0]
    for g in tl.static_range(1, len(values)):
        value = tl.where(index == g, values[g], value)
    return value


@triton.jit
def hidden_column(ranks, index):
    """The first column of a member in h, where each member's rank is rounded up to ``RANK_ALIGNMENT``."""
    column = 0
    for g in tl.static_range(1, len(ranks)):
        width = tl.cdiv(ranks[g - 1], RANK_ALIGNMENT) * RANK_ALIGNMENT
        column += tl.where(index >= g, width, 0)
    return column


@triton.jit
def load_factor(ptr, offs_row, offs_col, rows, columns, stride):
    """A tile of U or Vh, zeros outside. It is read once, so the cache evicts it first."""
    mask = (offs_row < rows)[:, None] & (offs_col < columns)[None, :]
    return tl.load(
        ptr + offs_row[:, None] * stride + offs_col[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` in fp32. The interpreter's 16-bit dot is wrong, so interpreted operands are fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """``x``, fp32, rounded to nearest even. The interpreter's cast to bf16 truncates, so there the bits are rounded."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _stack_rows(row0, row1, ROWS: tl.constexpr):
    """[ROWS, BLOCK] of one or two rows."""
    stacked = row0[None, :]
    if ROWS == 2:
        stacked = tl.where((tl.arange(0, 2) == 0)[:, None], stacked, row1[None, :])
    return stacked


@triton.jit
def shrink_tile(
    x_ptr,
    vh_ptr,
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
):
    """[BLOCK_M, BLOCK_R] of ``x[:, start:stop] @ Vh[:, start:stop].mT``, fp32."""
    if BLOCK_M < 16:
        acc0 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        acc1 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
            offs_k = k + tl.arange(0, BLOCK_K)
            vh = load_factor(vh_ptr, offs_r, offs_k, R, K, stride_vr).to(tl.float32)  # [BLOCK_R, BLOCK_K]
            # x is loaded as a vector: a tile of it in the layout of Vh would be copied as often as Vh has rows.
            acc0 += tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :] * vh
            if BLOCK_M == 2:
                acc1 += tl.load(x_ptr + stride_xm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :] * vh
        h = _stack_rows(tl.sum(acc0, 1), tl.sum(acc1, 1), BLOCK_M)
    else:
        h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
        for k in range(start, stop, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + offs_k[None, :], mask=(offs_m < M)[:, None] & (offs_k < K)[None, :], other=0.0)
            vh = load_factor(vh_ptr, offs_r, offs_k, R, K, stride_vr)
            h = dot(x, tl.trans(vh), h)
    return h


@triton.jit
def sum_partials(h_ptrs, mask, stride_hs, SPLITS: tl.constexpr):
    """The sum over splits, in their order. Bypasses the first-level cache, because other programs wrote h."""
    total = tl.load(h_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h_ptrs + split * stride_hs, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def reduced_hidden(h_ptr, M, stride_hm, dtype: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """Pointer and row stride of the reduced h, which follows the splits; each of its rows has the bytes of theirs.

    Its dtype is that of the dot's operand, to which h is rounded anyway; fp32 for scalar arithmetic.
    """
    ptr = h_ptr + SPLITS * M * stride_hm
    stride = stride_hm
    if BLOCK_M >= 16:
        ptr = ptr.to(tl.pointer_type(dtype))
        stride *= 32 // dtype.primitive_bitwidth
    return ptr, stride


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
    return u.to(tl.float32) * (h.to(tl.float32) * load_scale(s_ptr, s_length, offs_r, SCALED))[None, :]


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
def load_tiles(u_ptr, offs_n, N, R, stride_un, BLOCK_R: tl.constexpr, TILES: tl.constexpr):
    """The first tiles of U, [BLOCK_N, BLOCK_R] each, as a tuple: they can be in registers before h is read."""
    tiles: tl.tuple = ()
    for index in tl.static_range(TILES):
        offs_r = index * BLOCK_R + tl.arange(0, BLOCK_R)
        tiles += (load_factor(u_ptr, offs_n, offs_r, N, R, stride_un),)
    return hold(tiles)


@triton.jit
def expand_tile(
    tiles,  # of U, from load_tiles
    u_ptr,
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
            acc0 += expand_row(tiles[index], h0[index], s_ptr, s_length, offs, SCALED)
            if BLOCK_M == 2:
                acc1 += expand_row(tiles[index], h1[index], s_ptr, s_length, offs, SCALED)
        if LOOPED:
            for r in tl.range(first, R, BLOCK_R, num_stages=STAGES):
                offs = r + offs_r
                u = load_factor(u_ptr, offs_n, offs, N, R, stride_un)
                h = hidden_row(h_ptr, 0, offs, R, stride_hm, stride_hs, SPLITS)
                acc0 += expand_row(u, h, s_ptr, s_length, offs, SCALED)
                if BLOCK_M == 2:
                    h = hidden_row(h_ptr, 1, offs, R, stride_hm, stride_hs, SPLITS)
                    acc1 += expand_row(u, h, s_ptr, s_length, offs, SCALED)
        y = _stack_rows(tl.sum(acc0, 1), tl.sum(acc1, 1), BLOCK_M)
    else:
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.static_range(len(tiles)):
            y = expand_dot(y, tiles[index], h0[index], s_ptr, s_length, index * BLOCK_R + offs_r, SCALED)
        if LOOPED:
            for r in range(first, R, BLOCK_R):
                offs = r + offs_r
                u = load_factor(u_ptr, offs_n, offs, N, R, stride_un)
                h = hidden_rows(h_ptr, offs_m, offs, M, R, stride_hm, stride_hs, SPLITS)
                y = expand_dot(y, u, h, s_ptr, s_length, offs, SCALED)
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
def prefetch_ranges(vh_ptr, offs_r, R, stride_vr, start, stop, LANES: tl.constexpr):
    """Addresses and sizes in bytes, [BLOCK_R, LANES] each, of ``Vh[offs_r, start:stop]``: one range for each row.

    Of the threads of a row, the first has the range and the others have the size 0: a warp issues one after the other.
    The hardware prefetches multiples of 16 bytes at multiples of 16, so both ends are rounded down. That leaves no page
    of Vh: no address of another allocation can fault.
    """
    size: tl.constexpr = vh_ptr.dtype.element_ty.primitive_bitwidth // 8
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
def wait_and_release():
    """Wait for the end of the previous launch and for its stores; then let the next launch start, see lowrank_linear.

    The order matters. Where shrink releases first, expand could load a U that a kernel before shrink still writes.
    """
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def shrink(
    x_ptr,
    vh_ptrs,
    h_ptr,
    counter_ptr,
    ranks,
    vh_strides,
    tile,
    split,
    pid_m,
    rank_tiles,
    M,
    K,
    stride_xm,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    REDUCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Store one split of one tile of a group's h. With REDUCE, the last program of a tile stores the reduced h.

    With DEPENDENT, prefetch the tile of Vh, then wait for the previous launch.
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
    partial = shrink_tile(
        x_ptr, vh_ptr, offs_m, offs_r, M, K, R, stride_xm, stride_vr, start, stop, BLOCK_M, BLOCK_R, BLOCK_K, STAGES
    )
    stride_hs = M * stride_hm
    columns = hidden_column(ranks, index) + offs_r[None, :]
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + columns
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(h_ptrs + split * stride_hs, partial, mask=mask)
    if REDUCE:
        counter = counter_ptr + pid_m * rank_tiles + tile
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            reduced, stride = reduced_hidden(h_ptr, M, stride_hm, dtype, BLOCK_M, SPLITS)
            total = sum_partials(h_ptrs, mask, stride_hs, SPLITS)
            reduced_ptrs = reduced + offs_m[:, None] * stride + columns
            tl.store(reduced_ptrs, round_to(total, reduced.dtype.element_ty), mask=mask)
            tl.store(counter, 0)


@triton.jit
def first_u(u_ptrs, widths, ranks, u_strides, tile, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, TILES: tl.constexpr):
    """The first tiles of U for a tile of a group's outputs, see ``load_tiles``; zeros past the last tile."""
    index, local = member(tile, widths, BLOCK_N)
    offs_n = local * BLOCK_N + tl.arange(0, BLOCK_N)
    N = pick(widths, index)
    return load_tiles(pick(u_ptrs, index), offs_n, N, pick(ranks, index), pick(u_strides, index), BLOCK_R, TILES)


@triton.jit
def expand(
    tiles,  # of U, from first_u
    pointers,  # (u_ptrs, s_ptrs, bias_ptrs, y_ptrs)
    h_ptr,
    sizes,  # (widths, ranks, u_strides, y_strides)
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
):
    """Compute and store one tile of a group's outputs."""
    u_ptrs, s_ptrs, bias_ptrs, y_ptrs = pointers
    widths, ranks, u_strides, y_strides = sizes
    index, local = member(tile, widths, BLOCK_N)
    N = pick(widths, index)
    R = pick(ranks, index)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = local * BLOCK_N + tl.arange(0, BLOCK_N)
    u_ptr = pick(u_ptrs, index)
    stride_hs = M * stride_hm
    if REDUCE:
        h_ptr, stride_hm = reduced_hidden(h_ptr, M, stride_hm, u_ptr.dtype.element_ty, BLOCK_M, SPLITS)
    READ: tl.constexpr = 1 if REDUCE else SPLITS
    h_ptr += hidden_column(ranks, index)
    s_ptr = pick(s_ptrs, index)
    s_length = ((SCALES >> index) & 1) * R
    bias_length = ((BIASES >> index) & 1) * N
    stride_un = pick(u_strides, index)
    y = expand_tile(
        *(tiles, u_ptr, h_ptr, s_ptr, s_length, offs_m, offs_n, M, N, R, stride_un, stride_hm, stride_hs),
        *(BLOCK_M, BLOCK_N, BLOCK_R, READ, SCALES != 0, STAGES, LOOPED),
    )
    y += load_bias(pick(bias_ptrs, index), bias_length, offs_n, BIASES != 0)
    store_rows(pick(y_ptrs, index), y, offs_m, offs_n, M, N, pick(y_strides, index))


@triton.jit
def arrive(barrier_ptr):
    """Tell the grid's barrier that this program's stores are done; returns the ticket that ``wait`` needs.

    Each program adds 1, and the first program adds the complement: the sum flips one high bit and leaves the low bits
    at 0. The next crossing, in this launch or a later one, starts from there, whatever the high bit is.
    """
    tl.debug_barrier()
    arrival = tl.where(tl.program_id(0) == 0, 1 - tl.num_programs(0) + _FLIP, 1)
    return tl.atomic_add(barrier_ptr, arrival, sem="release", scope="gpu")


@triton.jit
def wait(barrier_ptr, ticket):
    """Wait until every program of the grid has arrived. Their stores can be read afterwards."""
    word = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
    while ((word ^ ticket) & _FLIP) == 0:
        word = tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
