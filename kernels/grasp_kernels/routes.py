"""Two routes to the singular-value gradient without a kernel, and the FLOPs of all routes.

``chunked`` is two matmuls over a block of tokens and ranks at a time, on any device. The dense route accumulates the
gradient G of the weight over many calls and contracts it once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .products import add_product_, exact_bf16, widen
from .reference import accumulation_dtype

BLOCK_TOKENS, BLOCK_RANKS = 4096, 512  # in the chunked route on a CPU, whose two temporaries are 8 MB each
# Elements of a temporary on a GPU. Two of them, 16 MB each, fit in the L2 cache of 40 MB or more, where they are
# multiplied and summed; and a matmul of this size has 128 tiles of 128 x 256, about one for each processor of an H100.
BLOCK_ELEMENTS = 1 << 22
LEAST_TOKENS = 128  # of a block on a GPU: the smallest height of a matmul's tile
BLOCK_ROWS = 1024  # rows of G per matmul


def factored_flops(tokens: int, out_features: int, in_features: int, rank: int) -> int:
    """FLOPs of ``singular_value_grad``, by a kernel or by ``chunked``, which ``"auto"`` takes: ``2 T r (m + n)``."""
    return 2 * tokens * rank * (out_features + in_features)


def dense_flops(tokens: int, out_features: int, in_features: int, rank: int) -> int:
    """FLOPs of the dense route, which contracts G once for all ``tokens``: ``2 m n (T + r)``."""
    return 2 * out_features * in_features * (tokens + rank)


def chunked(
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

    The arguments and results are those of ``reference.singular_value_grad``. Runs on any device, with two temporaries
    of ``block_shape``. Deterministic; reads no value of ``cu_seqlens`` on the host.
    """
    dtype = accumulation_dtype(x.dtype)
    bounds = cu_seqlens if per_sample or second_moment == "sample" else None
    samples, rank = 1 if bounds is None else len(bounds) - 1, U.shape[1]
    # Two tensors, not two halves of one: the outputs of an op must not share memory.
    first, squares = (x.new_zeros(samples, rank, dtype=dtype) for _ in range(2))  # squares of tokens
    block_tokens, block_ranks = block_shape(x.device.type, rank)
    for tokens in _blocks(x.shape[0], block_tokens):
        d_rows, x_rows = grad_y[tokens], x[tokens]
        if not x.is_cuda:  # widen once for all ranks; on CUDA the matmul widens
            d_rows, x_rows = d_rows.to(dtype), x_rows.to(dtype)
        for ranks in _blocks(rank, block_ranks):
            token = _matmul(d_rows, U[:, ranks], dtype).mul_(_matmul(x_rows, Vh[ranks].mT, dtype))
            if mask is not None:
                token.masked_fill_(~mask[tokens, None], 0)
            first[:, ranks] += _sum_samples(token, bounds, tokens.start)
            if second_moment == "token":
                squares[:, ranks] += _sum_samples(token.square_(), bounds, tokens.start)
    second = squares if second_moment == "token" else first.square()
    if not per_sample:
        first, second = first.sum(0), second.sum(0)
    return first, second if second_moment != "none" else x.new_empty(0, dtype=dtype)


def block_shape(device_type: str, rank: int) -> tuple[int, int]:
    """Tokens and ranks of a block of the chunked route, on a type of device such as ``"cpu"``."""
    if device_type == "cpu":
        return BLOCK_TOKENS, BLOCK_RANKS
    ranks = min(rank, BLOCK_ELEMENTS // LEAST_TOKENS)
    return BLOCK_ELEMENTS // ranks // LEAST_TOKENS * LEAST_TOKENS, ranks


def accumulate_weight_grad_(weight_grad: Tensor, x: Tensor, grad_y: Tensor) -> Tensor:
    """``G += grad_y.mT @ x``, one step of the dense route: G is (N, K) in fp32 (fp64 for fp64), x is (T, K).

    Args:
        weight_grad: G, changed in place and returned.
        x: the linear's input, (T, K).
        grad_y: gradient of the loss in its output, (T, N), dtype of ``x``.
    """
    with exact_bf16(x, grad_y):
        x, grad_y = widen(x, weight_grad.dtype), widen(grad_y, weight_grad.dtype)
        for rows in _blocks(weight_grad.shape[0], BLOCK_ROWS):
            add_product_(weight_grad[rows], grad_y[:, rows].mT, x)
    return weight_grad


def contract_weight_grad(weight_grad: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """``diag(U.mT @ G @ Vh.mT)``, (R,) in the dtype of G: the last step of the dense route; G is (N, K)."""
    U, Vh = U.to(weight_grad.dtype), Vh.to(weight_grad.dtype)
    grad = weight_grad.new_empty(U.shape[1])
    for ranks in _blocks(U.shape[1], BLOCK_RANKS):
        grad[ranks] = ((weight_grad @ Vh[ranks].mT) * U[:, ranks]).sum(0)
    return grad


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _sum_samples(token: Tensor, bounds: Tensor | None, start: int) -> Tensor:
    """Sum the rows of each sample of a block, (T, R) → (B, R); without bounds they are one sample.

    ``start`` is the block's first token, counted as in ``bounds``. The rows of a sample are added in order, so the sums
    are the same in every run.
    """
    if bounds is None:
        return token.sum(0, keepdim=True)
    offsets = (bounds - start).clamp_(0, len(token))
    rows = torch.arange(len(token), device=token.device, dtype=offsets.dtype)
    return embedding_bag(rows, token, offsets, mode="sum", include_last_offset=True)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` accumulated and returned in ``dtype``; on CUDA without a copy of 16-bit operands."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
