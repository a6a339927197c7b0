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
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gradient_configs import Tile, choose_tile
from ..versions import PerVersion
from .launch import Launch, gpu_of, run_all
from .singular_value_grad_kernels import (
    _singular_value_grad_kernel,
    _singular_value_grad_reduce_kernel,
    _singular_value_grad_wide_kernel,
)

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
