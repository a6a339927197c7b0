"""Triton: ``colsum((grad_y @ U) * (x @ Vh.mT))``, summed or per sample, with second moments, in one pass.

Each program computes both products for one tile of tokens and ranks, multiplies them and sums over its tokens. No
matrix of T or N rows is written to memory. One kernel holds both products of a tile in registers. The other has wider
tiles, which read less from the L2 cache and leave registers for one product: the first waits in a buffer, one tile per
program. It loads through TMA descriptors, on GPUs that have them. A last kernel adds the sums of the tiles in a fixed
order, so two runs agree bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grasp_kernels.gradient_configs import Tile, choose_tile
from grasp_kernels.triton.launch import Launch, gpu_of, run_all
from grasp_kernels.triton.tiles import dot
from grasp_kernels.versions import PerVersion

ALIGNMENT = 16  # elements; a stride must be a known multiple of it for loads of 16 bytes
REDUCE_TILES, REDUCE_RANKS = 16, 64
SECOND = {"none": 0, "token": 1, "sample": 2}


def loadable(factor: Tensor, rank_axis: int) -> Tensor:
    """U (N, R), whose ``rank_axis`` is 1, or Vh (R, K), whose is 0; a copy if its layout prevents loads of 16 bytes.

    The copy is made once per tensor and version and freed with the tensor. While a CUDA graph is captured, it is made
    in the graph, which then follows changes of the factor.
    """
    along_length = factor.stride(1 - rank_axis) == 1 and factor.stride(rank_axis) % ALIGNMENT == 0
    along_rank = factor.stride(rank_axis) == 1 and factor.stride(1 - rank_axis) % ALIGNMENT == 0
    aligned_rank = factor.shape[rank_axis] % ALIGNMENT == 0
    if factor.data_ptr() % ALIGNMENT == 0 and (along_length or (along_rank and aligned_rank)):
        return factor
    if factor.is_cuda and torch.cuda.is_current_stream_capturing():
        return _copy_along_length(factor, rank_axis)
    return _COPIES[rank_axis](factor)


def _copy_along_length(factor: Tensor, rank_axis: int) -> Tensor:
    """A copy whose unit stride is along the length N or K, the other a multiple of ``ALIGNMENT``."""
    rows = factor if rank_axis == 0 else factor.mT
    rank, length = rows.shape
    padded = rows.new_empty(rank, triton.cdiv(length, ALIGNMENT) * ALIGNMENT)
    copy = padded[:, :length].copy_(rows)
    return copy if rank_axis == 0 else copy.mT


_COPIES = tuple(PerVersion(functools.partial(_copy_along_length, rank_axis=axis)) for axis in (0, 1))


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


def singular_value_grad(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    cu_seqlens: Tensor | None,
    per_sample: bool,
    second_moment: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``colsum((grad_y @ U) * (x @ Vh.mT))`` and the sum of squared unit gradients; x is (T, K), grad_y is (T, N).

    The arguments and results are those of ``reference.singular_value_grad``; fp32, fp16 or bf16, accumulated in fp32.
    Allocates (T / 128 + B, R) in fp32, and once per factor the copy that ``loadable`` makes. Wide tiles take another
    128 KB per processor of the GPU.
    """
    described = describable(x) and describable(grad_y)
    tile = choose_tile(gpu_of(x.device), x.shape[0], U.shape[1], x.dtype, described=described)
    return run(x, grad_y, U, Vh, cu_seqlens, per_sample, second_moment, mask, tile)


def run(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    cu_seqlens: Tensor | None,
    per_sample: bool,
    second_moment: str,
    mask: Tensor | None,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Run a call with a given tile."""
    shape = [U.shape[1]]
    if per_sample:
        assert cu_seqlens is not None
        shape = [len(cu_seqlens) - 1, *shape]
    first = x.new_empty(shape, dtype=torch.float32)
    second = x.new_empty(0 if second_moment == "none" else shape, dtype=torch.float32)
    by_sample = per_sample or second_moment == "sample"
    bounds = cu_seqlens.contiguous() if by_sample and cu_seqlens is not None else None
    run_all(plan(x, grad_y, U, Vh, bounds, second_moment, mask, (first, second), tile), x.device)
    return first, second


def plan(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    cu_seqlens: Tensor | None,
    second_moment: str,
    mask: Tensor | None,
    outputs: Sequence[Tensor],
    tile: Tile,
) -> list[Launch]:
    """The launches of a call, in order: the sums of tiles, unless there are no tokens, then the sum over tiles.

    ``cu_seqlens`` separates the samples. ``outputs`` are (R,) or (B, R) in fp32; the second is empty for the second
    moment ``"none"``.
    """
    tokens, R = x.shape[0], U.shape[1]
    samples = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    slots = triton.cdiv(tokens, tile.block_t) if cu_seqlens is None else tokens // tile.block_t + samples
    squares = second_moment == "token"
    tile_first = x.new_empty((slots, R), dtype=torch.float32)
    tile_second = x.new_empty((slots, R), dtype=torch.float32) if squares else None
    shared = {"cu_seqlens_ptr": cu_seqlens, "T": tokens, "R": R, "samples": samples, "RAGGED": cu_seqlens is not None}
    sums = {
        **shared,
        "mask_ptr": None if mask is None else mask.contiguous().view(torch.uint8),
        "first_ptr": tile_first,
        "second_ptr": tile_second,
        "MASKED": mask is not None,
        "TOKEN_SQUARES": squares,
        "BLOCK_T": tile.block_t,
        "BLOCK_R": tile.block_r,
        "BLOCK_K": tile.block_k,
        "GROUP_T": tile.group_t,
    }
    first, second = outputs
    per_sample = first.dim() == 2
    total = Launch(
        _singular_value_grad_reduce_kernel,
        (triton.cdiv(R, REDUCE_RANKS), samples if per_sample else 1),
        {
            **shared,
            "tile_first_ptr": tile_first,
            "tile_second_ptr": tile_second,
            "first_ptr": first,
            "second_ptr": second,
            "PER_SAMPLE": per_sample,
            "SECOND": SECOND[second_moment],
            "BLOCK_T": tile.block_t,
            "BLOCK_R": REDUCE_RANKS,
            "BLOCK_TILES": REDUCE_TILES,
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )
    if tokens == 0:
        return [total]
    operands = (x, grad_y, loadable(U, 1), loadable(Vh, 0))
    programs = slots * triton.cdiv(R, tile.block_r)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if not tile.descriptors:
        arguments = _pointers(*operands, tile) | sums
        return [Launch(_singular_value_grad_kernel, (programs,), arguments, options), total]
    programs = min(programs, gpu_of(x.device).processors)
    parked = x.new_empty(programs * tile.block_t * tile.block_r, dtype=torch.float32)
    arguments = _descriptors(*operands, tile) | sums | {"slots": slots, "parked_ptr": parked}
    return [Launch(_singular_value_grad_wide_kernel, (programs,), arguments, options), total]


def describable(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can describe a matrix: rows of unit stride, starts of rows aligned to 16 bytes."""
    rows, columns = tensor.stride()
    aligned = tensor.data_ptr() % 16 == 0 and rows * tensor.element_size() % 16 == 0
    return columns == 1 and rows >= tensor.shape[1] and aligned


def _descriptors(x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, tile: Tile) -> dict[str, Any]:
    """Arguments of the wide kernel: TMA descriptors of both products' operands."""
    u_along_n, vh_along_k = U.stride(0) == 1, Vh.stride(1) == 1
    along_length, along_rank = [tile.block_r, tile.block_k], [tile.block_k, tile.block_r]
    describe = TensorDescriptor.from_tensor
    return {
        "x": describe(x, [tile.block_t, tile.block_k]),
        "grad_y": describe(grad_y, [tile.block_t, tile.block_k]),
        "U": describe(U.mT, along_length) if u_along_n else describe(U, along_rank),
        "Vh": describe(Vh, along_length) if vh_along_k else describe(Vh.mT, along_rank),
        "N": U.shape[0],
        "K": x.shape[1],
        "U_ALONG_N": u_along_n,
        "VH_ALONG_K": vh_along_k,
    }


def _pointers(x: Tensor, grad_y: Tensor, U: Tensor, Vh: Tensor, tile: Tile) -> dict[str, Any]:
    """Arguments of the other kernel: both products' operands and their strides."""
    K, N = x.shape[1], U.shape[0]
    (stride_xt, stride_xk), (stride_yt, stride_yn) = x.stride(), grad_y.stride()
    (stride_un, stride_ur), (stride_vr, stride_vk) = U.stride(), Vh.stride()
    return {
        "x_ptr": x,
        "grad_y_ptr": grad_y,
        "U_ptr": U,
        "Vh_ptr": Vh,
        "N": N,
        "K": K,
        "stride_xt": stride_xt,
        "stride_xk": stride_xk,
        "stride_yt": stride_yt,
        "stride_yn": stride_yn,
        "stride_un": stride_un,
        "stride_ur": stride_ur,
        "stride_vr": stride_vr,
        "stride_vk": stride_vk,
        "EVEN_N": N % tile.block_k == 0,
        "EVEN_K": K % tile.block_k == 0,
    }
