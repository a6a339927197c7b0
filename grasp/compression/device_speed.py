"""Measure how fast a device runs the main operations of a compression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grasp.evaluation.generation import now
from grasp.method.blocks import fp64_device
from grasp.method.ranks import Shape

PROBE_SECONDS = 0.2  # per rate
_LARGEST_SVD = 512  # rows and columns of the decomposed matrix, at most; larger ones take seconds


@dataclass(frozen=True)
class Rates:
    """FLOPs per second."""

    sweeps: float  # matrix products in the dtype of the sweeps
    statistics: float  # matrix products in the dtype of the sums
    svd: float  # decompositions in the dtype of the sums


def measure_rates(shape: Shape, tokens: int, *, dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure matrix products and a decomposition on a device, in about half a second.

    Args:
        shape: (N, K) of a typical matrix.
        tokens: tokens per forward pass.
        dtype: dtype of the sweeps; sums are in fp32 (fp64 for fp64).
        device: the device to measure.
    """
    n, k = shape
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = torch.randn(tokens, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    x_wide, grad = x.to(wide), torch.randn(tokens, n, device=device, dtype=wide)
    matrix = torch.randn(min(n, _LARGEST_SVD), min(k, _LARGEST_SVD), device=device, dtype=wide)
    product = 2 * tokens * n * k
    return Rates(
        sweeps=product / _seconds(lambda: x @ weight.mT, device),
        statistics=product / _seconds(lambda: grad.mT @ x_wide, device),
        svd=svd_flops((matrix.shape[0], matrix.shape[1])) / _seconds(lambda: torch.linalg.svd(matrix), device),
    )


def svd_flops(shape: Shape) -> int:
    """FLOPs of a thin SVD, ``6 m n² + 20 n³`` for m ≥ n. Source: Golub and Van Loan, Matrix Computations, 8.6."""
    n, m = sorted(shape)
    return 6 * m * n**2 + 20 * n**3


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Mean time of a call over ``PROBE_SECONDS``, after one warm-up call."""
    work()
    start, calls = now(device), 0
    while (elapsed := now(device) - start) < PROBE_SECONDS or not calls:
        work()
        calls += 1
    return elapsed / calls


def decomposition_notice(device: torch.device) -> str | None:
    """The line to print before weights of a device are decomposed elsewhere; ``None`` if they are decomposed there."""
    if fp64_device(device) == device:
        return None
    return f"{device.type} has no fp64: weights are decomposed on the CPU"
