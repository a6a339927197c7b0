"""Channels of an MLP: which of them its output needs least, and how the others make up for them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.method.blocks import fp64_device, row_blocks, to_double
from grasp.method.ranks import Shape
from grasp.method.svd import cholesky_factor, shrinkage

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of an MLP's channels that may go
MULTIPLE = 64  # of which widths are, so that kernels and groups of 64 columns divide them
_STEPS = 128  # removals between two updates of whole matrices


class Narrowed(NamedTuple):
    """What is left of a linear whose input has lost channels."""

    channels: Tensor  # (n,) int64, ascending, those that stay
    weight: Tensor  # (N, n), which makes up for the others
    loss: float  # ``‖B^½ ΔW A^½‖²`` of the removal, in the units of ``decompose_in``'s S²


def widths_of(channels: int) -> list[int]:
    """The widths to consider for an MLP, widest first, without that of all channels.

    Example:
        >>> widths_of(1536)
        [1408, 1344, 1152, 960, 768]
    """
    rounded = {round((1 - share) * channels / MULTIPLE) * MULTIPLE for share in SHARES}
    return sorted((width for width in rounded if 0 < width < channels), reverse=True)


@torch.no_grad()
def narrow(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    widths: Sequence[int],
    name: str = "weight",
    *,
    tokens: int | None = None,
) -> dict[int, Narrowed]:
    """Remove input channels of a linear one after the other, each the one that is missed least.

    The weight of the others is changed so that ``‖B^½ (W − Ŵ) A^½‖`` is least. With ``H = A⁻¹`` the removal of channel
    j costs ``W_jᵀ B W_j / H_jj`` and subtracts ``W_j H_j / H_jj`` from W (optimal brain surgeon; arXiv 2302.04089
    removes structures so). The losses add up. W and H are brought up to date once in ``_STEPS`` removals; in between
    only the columns that are needed are.

    Args:
        weight: (N, K).
        inputs: ``Σ x xᵀ``, (K, K) symmetric, of which the lower triangle is read.
        outputs: ``Σ d dᵀ``, (N, N), likewise.
        widths: numbers of channels to stop at, below K.
        name: of the weight, for messages.
        tokens: the covariances are sums over as many; ``None`` if they are exact means.

    Returns:
        By width. Weights in the dtype and on the device of ``weight``.

    Raises:
        NonFiniteError, ValueError: as ``decompose_in``.
    """
    device = fp64_device(weight.device)
    factor = cholesky_factor(inputs, tokens, device, name)
    H = torch.cholesky_inverse(factor, out=factor)
    B = _shrunk(outputs, tokens, device, name)
    W, size = to_double(weight, device, copy=True), weight.shape[1]
    costs = _quadratic_columns(B, W)  # W_jᵀ B W_j
    diagonal = H.diagonal().clone()
    present = torch.ones(size, dtype=torch.bool, device=device)
    rows, left = H.new_empty(_STEPS, size), W.new_empty(_STEPS, len(W))  # W = W₀ − leftᵀ rows, H = H₀ − rowsᵀ rows
    result: dict[int, Narrowed] = {}
    total, pending = 0.0, 0
    for remaining in range(size - 1, min(widths) - 1, -1):
        j = int((costs / diagonal).masked_fill_(~present, torch.inf).argmin())
        total += float(costs[j] / diagonal[j])
        row = (H[j] - rows[:pending, j] @ rows[:pending]) / diagonal[j].sqrt()
        column = (W[:, j] - rows[:pending, j] @ left[:pending]) / diagonal[j].sqrt()
        weighed = B @ column
        products = weighed @ W - (left[:pending] @ weighed) @ rows[:pending]  # W_iᵀ B column
        costs += row * (row * (column @ weighed) - 2 * products)
        diagonal -= row.square()
        rows[pending], left[pending] = row, column
        present[j] = False
        pending += 1
        if pending == _STEPS or remaining in widths:
            H.addmm_(rows[:pending].mT, rows[:pending], alpha=-1)
            W.addmm_(left[:pending].mT, rows[:pending], alpha=-1)
            pending = 0
        if remaining in widths:
            channels = present.nonzero().flatten()
            kept = W[:, channels].to(weight.device, weight.dtype)
            result[remaining] = Narrowed(channels.to(weight.device), kept, total)
    return result


def _shrunk(total: Tensor, tokens: int | None, device: torch.device, name: str) -> Tensor:
    """The shrunk covariance of a sum, whose lower triangle is read, in fp64."""
    more, count = shrinkage(total.diagonal(), tokens, device, name)
    C = to_double(total, device, copy=True).tril_()
    C += C.tril(-1).mT
    C.diagonal().add_(more)
    return C.div_(count)


def _quadratic_columns(B: Tensor, W: Tensor) -> Tensor:
    """``W_jᵀ B W_j`` of each column, in blocks of rows of B."""
    return torch.stack([((B[rows] @ W) * W[rows]).sum(0) for rows in row_blocks(len(B))]).sum(0)


def narrow_bytes(shape: Shape, itemsize: int = 4) -> int:
    """Peak memory of ``narrow`` for ``widths_of`` beyond the weight and the sums, in bytes; its result is counted.

    Args:
        shape: (N, K).
        itemsize: bytes of a number of the weight.
    """
    n, k = shape
    if not (widths := widths_of(k)):
        return 0
    return 8 * (3 * k * k // 2 + 2 * n * n + 2 * n * k + _STEPS * (n + k)) + itemsize * n * sum(widths)


def narrow_flops(shape: Shape) -> int:
    """FLOPs of ``narrow`` for ``widths_of``: an inverse, and for each channel a product with W and two updates."""
    n, k = shape
    removed = k - min(widths_of(k), default=k)
    return (k**3 + removed * (4 * n * k + 2 * n * n + 2 * k * k + _STEPS * (n + k))) if removed else 0
