"""Device functions of both phases of the low-rank kernels: members of a group, loads, dots, waits, a grid barrier.

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
def load_factor(
    ptr,
    scales_ptr,  # not read without groups
    offs_row,
    start,
    rows,
    columns,
    stride,
    GROUP: tl.constexpr,  # columns per scale; 0: a row has one or none
    BLOCK: tl.constexpr,
):
    """A tile of U or Vh from column ``start``, a multiple of BLOCK, as it is stored; zeros outside.

    The tuple has its values, [rows, BLOCK] or of int4 the pairs, [rows, BLOCK / 2]; if the rows have groups, also their
    scales, [rows, groups]. Both are read once, so the cache evicts them first.
    """
    offs_col, stored = start + tl.arange(0, BLOCK), columns
    if ptr.dtype.element_ty == tl.uint8:  # int4: no gaps between the rows
        offs_col, stored = start // BLOCK * (BLOCK // 2) + tl.arange(0, BLOCK // 2), stride
    tile: tl.tuple = (_load_once(ptr, offs_row, offs_col, rows, stored, stride),)
    if GROUP > 0:
        offs_group = start // GROUP + tl.arange(0, max(1, BLOCK // GROUP))
        groups = tl.cdiv(columns, GROUP)
        tile += (_load_once(scales_ptr, offs_row, offs_group, rows, groups, groups),)
    return tile


@triton.jit
def _load_once(ptr, offs_row, offs_col, rows, columns, stride):
    mask = (offs_row < rows)[:, None] & (offs_col < columns)[None, :]
    return tl.load(
        ptr + offs_row[:, None] * stride + offs_col[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def load_row_scales(ptr, offs_row, rows):
    """[rows] of the scales of rows that have one each, in fp32."""
    return tl.load(ptr + offs_row, mask=offs_row < rows, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def dequantized(tile, dtype: tl.constexpr):
    """The numbers of a tile from ``load_factor`` in ``dtype``, [rows, BLOCK]; without the scale of a whole row."""
    values = tile[0]
    if values.dtype == tl.uint8:
        values = tl.interleave(values & 15, values >> 4).to(tl.int8) - 8
    if values.dtype.is_int():
        values = values.to(tl.float32)
    if len(tile) > 1:
        scales = tile[1].to(tl.float32)[:, :, None]
        groups: tl.constexpr = scales.shape[1]
        grouped = values.to(tl.float32).reshape(values.shape[0], groups, values.shape[1] // groups) * scales
        values = round_to(grouped.reshape(values.shape), dtype)
    return values.to(dtype)


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
def stack_rows(row0, row1, ROWS: tl.constexpr):
    """[ROWS, BLOCK] of one or two rows."""
    stacked = row0[None, :]
    if ROWS == 2:
        stacked = tl.where((tl.arange(0, 2) == 0)[:, None], stacked, row1[None, :])
    return stacked


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
def wait_and_release():
    """Wait for the end of the previous launch and for its stores; then let the next launch start, see lowrank_linear.

    The order matters. Where shrink releases first, expand could load a U that a kernel before shrink still writes.
    """
    gdc_wait()
    gdc_launch_dependents()


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
