"""The Triton kernels of ``singular_value_grad``, and the functions that they share."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot


@triton.jit
def _bound(cu_seqlens_ptr, index, T):
    """A bound of the samples, kept within the tokens: nobody checks bounds that a CUDA graph replays."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + index).to(tl.int32), 0), T)


@triton.jit
def _first_slot(start, sample, BLOCK_T: tl.constexpr):
    """The first slot of a sample in the sums of tiles. It leaves room for all earlier samples without a scan."""
    return start // BLOCK_T + sample


@triton.jit
def _sample_of_slot(cu_seqlens_ptr, slot, T, samples, BLOCK_T: tl.constexpr):
    """The last sample whose first slot is not after ``slot``, by binary search."""
    low = samples * 0
    high = samples
    while high - low > 1:
        middle = (low + high) // 2
        behind = _first_slot(_bound(cu_seqlens_ptr, middle, T), middle, BLOCK_T) > slot
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle)
    return low


@triton.jit
def _tokens_of_slot(cu_seqlens_ptr, slot, T, samples, BLOCK_T: tl.constexpr):
    """The first token of a slot and the end of its sample. The slot is empty if the first is not before the end."""
    sample = _sample_of_slot(cu_seqlens_ptr, slot, T, samples, BLOCK_T)
    start, end = _bound(cu_seqlens_ptr, sample, T), _bound(cu_seqlens_ptr, sample + 1, T)
    return start + (slot - _first_slot(start, sample, BLOCK_T)) * BLOCK_T, end


@triton.jit
def _place(tile, slots, R, BLOCK_R: tl.constexpr, GROUP_T: tl.constexpr):
    """Slot and rank tile of a tile. Neighbours share token tiles and factors, in groups that fit the L2 cache."""
    rank_tiles = tl.cdiv(R, BLOCK_R)
    group = tile // (GROUP_T * rank_tiles)
    group_size = min(slots - group * GROUP_T, GROUP_T)
    slot = group * GROUP_T + tile % group_size
    rank_tile = (tile % (GROUP_T * rank_tiles)) // group_size
    return slot, rank_tile


@triton.jit
def _project(
    tokens_ptrs,  # [BLOCK_T, BLOCK_K]
    factor_ptrs,  # [BLOCK_K, BLOCK_R]
    length,
    tokens_step,
    factor_step,
    rank_mask,  # [1, BLOCK_R]
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``tokens @ factor``, [BLOCK_T, BLOCK_R] in fp32; ``length`` is the contracted dimension."""
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    for start in range(0, length, BLOCK_K):
        if EVEN:
            tokens = tl.load(tokens_ptrs)
            factor = tl.load(factor_ptrs, mask=rank_mask, other=0.0)
        else:
            inside = offs_k < length - start
            tokens = tl.load(tokens_ptrs, mask=inside[None, :], other=0.0)
            factor = tl.load(factor_ptrs, mask=inside[:, None] & rank_mask, other=0.0)
        acc = dot(tokens, factor, acc)
        tokens_ptrs += BLOCK_K * tokens_step
        factor_ptrs += BLOCK_K * factor_step
    return acc


@triton.jit
def _store_sums(first_ptr, second_ptr, d_U, x_V, inside, slot, offs_r, R, TOKEN_SQUARES: tl.constexpr):
    """Sum a tile's products over its tokens, and their squares."""
    token = tl.where(inside[:, None], d_U * x_V, 0.0)  # [BLOCK_T, BLOCK_R]
    out = slot.to(tl.int64) * R + offs_r
    tl.store(first_ptr + out, tl.sum(token, axis=0), mask=offs_r < R)
    if TOKEN_SQUARES:
        tl.store(second_ptr + out, tl.sum(token * token, axis=0), mask=offs_r < R)


@triton.jit(do_not_specialize=["T", "samples"])
def _singular_value_grad_kernel(
    x_ptr,  # [T, K]
    grad_y_ptr,  # [T, N]
    U_ptr,  # [N, R]
    Vh_ptr,  # [R, K]
    cu_seqlens_ptr,  # [samples + 1]
    mask_ptr,  # [T] bytes
    first_ptr,  # [slots, R] fp32
    second_ptr,  # [slots, R] fp32
    T,
    N,
    K,
    R,
    samples,
    stride_xt,
    stride_xk,
    stride_yt,
    stride_yn,
    stride_un,
    stride_ur,
    stride_vr,
    stride_vk,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
    TOKEN_SQUARES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    slots = tl.num_programs(0) // tl.cdiv(R, BLOCK_R)
    slot, rank_tile = _place(tl.program_id(0), slots, R, BLOCK_R, GROUP_T)
    begin, end = slot * BLOCK_T, T
    if RAGGED:
        begin, end = _tokens_of_slot(cu_seqlens_ptr, slot, T, samples, BLOCK_T)
        if begin >= end:
            return
    offs_t = begin + tl.arange(0, BLOCK_T)
    inside = offs_t < end
    rows = tl.minimum(offs_t, T - 1).to(tl.int64)[:, None]
    offs_r, offs_k = rank_tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    rank_mask = (offs_r < R)[None, :]
    d_U = _project(
        grad_y_ptr + rows * stride_yt + offs_k[None, :] * stride_yn,
        U_ptr + offs_k[:, None] * stride_un + offs_r[None, :] * stride_ur,
        *(N, stride_yn, stride_un, rank_mask, EVEN_N, BLOCK_T, BLOCK_R, BLOCK_K),
    )
    x_V = _project(
        x_ptr + rows * stride_xt + offs_k[None, :] * stride_xk,
        Vh_ptr + offs_k[:, None] * stride_vk + offs_r[None, :] * stride_vr,
        *(K, stride_xk, stride_vk, rank_mask, EVEN_K, BLOCK_T, BLOCK_R, BLOCK_K),
    )
    if MASKED:
        inside = inside & (tl.load(mask_ptr + offs_t, mask=inside, other=0) != 0)
    _store_sums(first_ptr, second_ptr, d_U, x_V, inside, slot, offs_r, R, TOKEN_SQUARES)


@triton.jit
def _project_described(
    tokens,  # descriptor of [T, length]
    factor,  # descriptor of [length, R], or of [R, length] if ALONG_LENGTH
    row,
    rank,
    length,
    ALONG_LENGTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``tokens @ factor``, [BLOCK_T, BLOCK_R] in fp32; descriptors read zeros outside a matrix."""
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for k in range(0, length, BLOCK_K):
        piece = factor.load([rank, k]).T if ALONG_LENGTH else factor.load([k, rank])
        acc = dot(tokens.load([row, k]), piece, acc)
    return acc


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns. Threads keep their elements."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["T", "samples", "slots"])
def _singular_value_grad_wide_kernel(
    x,  # descriptor of [T, K]
    grad_y,  # descriptor of [T, N]
    U,  # descriptor of [N, R] or [R, N]
    Vh,  # descriptor of [R, K] or [K, R]
    parked_ptr,  # [programs, 2, BLOCK_T, BLOCK_R / 2] fp32
    cu_seqlens_ptr,  # [samples + 1]
    mask_ptr,  # [T] bytes
    first_ptr,  # [slots, R] fp32
    second_ptr,  # [slots, R] fp32
    T,
    N,
    K,
    R,
    samples,
    slots,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
    TOKEN_SQUARES: tl.constexpr,
    U_ALONG_N: tl.constexpr,
    VH_ALONG_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """Tiles too wide for both products in registers: ``grad_y @ U`` waits in the L2 cache, in halves, for the other."""
    WIDTH: tl.constexpr = BLOCK_R // 2
    for tile in range(tl.program_id(0), slots * tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        slot, rank_tile = _place(tile, slots, R, BLOCK_R, GROUP_T)
        begin, end = slot * BLOCK_T, T
        if RAGGED:
            begin, end = _tokens_of_slot(cu_seqlens_ptr, slot, T, samples, BLOCK_T)
        if begin < end:
            rank = rank_tile * BLOCK_R
            d_U = _project_described(grad_y, U, begin, rank, N, U_ALONG_N, BLOCK_T, BLOCK_R, BLOCK_K)
            offs = tl.arange(0, BLOCK_T)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            parked_ptrs = parked_ptr + tl.program_id(0).to(tl.int64) * BLOCK_T * BLOCK_R + offs
            pieces = _halves(d_U)
            for i in tl.static_range(2):
                tl.store(parked_ptrs + i * BLOCK_T * WIDTH, pieces[i])
            x_V = _project_described(x, Vh, begin, rank, K, VH_ALONG_K, BLOCK_T, BLOCK_R, BLOCK_K)
            offs_t = begin + tl.arange(0, BLOCK_T)
            inside = offs_t < end
            if MASKED:
                inside = inside & (tl.load(mask_ptr + offs_t, mask=inside, other=0) != 0)
            tl.debug_barrier()
            pieces = _halves(x_V)
            for i in tl.static_range(2):
                d_U = tl.load(parked_ptrs + i * BLOCK_T * WIDTH)
                offs_r = rank + i * WIDTH + tl.arange(0, WIDTH)
                _store_sums(first_ptr, second_ptr, d_U, pieces[i], inside, slot, offs_r, R, TOKEN_SQUARES)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "samples"])
def _singular_value_grad_reduce_kernel(
    tile_first_ptr,  # [slots, R]
    tile_second_ptr,  # [slots, R]
    cu_seqlens_ptr,  # [samples + 1]
    first_ptr,  # [R] or [samples, R]
    second_ptr,  # [R] or [samples, R]
    T,
    R,
    samples,
    RAGGED: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    SECOND: tl.constexpr,  # 0: none, 1: squares of tokens, 2: squares of samples
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_tile = tl.arange(0, BLOCK_TILES)
    in_rank = offs_r < R
    row = tl.program_id(1)
    from_sample = row if PER_SAMPLE else 0
    to_sample = row + 1 if PER_SAMPLE else samples
    first = tl.zeros((BLOCK_R,), dtype=tl.float32)
    second = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for sample in range(from_sample, to_sample):
        slot = 0
        tokens = T
        if RAGGED:
            start = _bound(cu_seqlens_ptr, sample, T)
            tokens = _bound(cu_seqlens_ptr, sample + 1, T) - start
            slot = _first_slot(start, sample, BLOCK_T)
        tiles = tl.cdiv(tokens, BLOCK_T)
        total = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for tile in range(0, tiles, BLOCK_TILES):
            offs = tile + offs_tile
            ptrs = (slot + offs).to(tl.int64)[:, None] * R + offs_r[None, :]  # [BLOCK_TILES, BLOCK_R]
            present = (offs < tiles)[:, None] & in_rank[None, :]
            total += tl.sum(tl.load(tile_first_ptr + ptrs, mask=present, other=0.0), axis=0)
            if SECOND == 1:
                second += tl.sum(tl.load(tile_second_ptr + ptrs, mask=present, other=0.0), axis=0)
        first += total
        if SECOND == 2:
            second += total * total
    out = row.to(tl.int64) * R + offs_r
    tl.store(first_ptr + out, first, mask=in_rank)
    if SECOND != 0:
        tl.store(second_ptr + out, second, mask=in_rank)
