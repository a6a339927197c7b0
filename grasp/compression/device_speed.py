"""How fast a device runs the main operations of a compression: measured, or by the peak rates of a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grasp.evaluation.generation import now
from grasp.method.basis import Basis
from grasp.method.blocks import fp64_device
from grasp.method.ranks import Shape
from grasp.method.svd import decompose_in, decomposition_flops
from grasp_kernels.roofline import Card

PROBE_SECONDS = 0.2  # per rate
_LARGEST_SVD = 512  # rows and columns of the decomposed matrix, at most; larger ones take seconds


@dataclass(frozen=True)
class Rates:
    """FLOPs per second."""

    sweeps: float  # matrix products in the dtype of the sweeps
    statistics: float  # matrix products in the dtype of the sums
    svd: float  # decompositions


def measure_rates(shape: Shape, tokens: int, *, dtype: torch.dtype, device: torch.device, basis: Basis) -> Rates:
    """Measure matrix products and a decomposition on a device, in about half a second.

    Args:
        shape: (N, K) of a typical matrix.
        tokens: tokens per forward pass.
        dtype: dtype of the sweeps; sums are in fp32 (fp64 for fp64).
        device: the device to measure.
        basis: in which matrices are decomposed.
    """
    n, k = shape
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = torch.randn(tokens, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    x_wide, grad = x.to(wide), torch.randn(tokens, n, device=device, dtype=wide)
    rows, columns = min(n, _LARGEST_SVD), min(k, _LARGEST_SVD)
    matrix = torch.randn(rows, columns, device=device, dtype=wide)
    inputs = matrix.mT @ matrix if basis.inputs else None
    outputs = matrix @ matrix.mT if basis.outputs else None
    flops = decomposition_flops((rows, columns), inputs=basis.inputs, outputs=basis.outputs)
    product = 2 * tokens * n * k
    return Rates(
        sweeps=product / _seconds(lambda: x @ weight.mT, device),
        statistics=product / _seconds(lambda: grad.mT @ x_wide, device),
        svd=flops / _seconds(lambda: decompose_in(matrix, inputs, outputs), device),
    )


def card_rates(card: Card, tokens: int, *, dtype: torch.dtype, basis: Basis) -> Rates:
    """The peak rates of a card, which no program reaches: a bound on the time, not a forecast.

    Args:
        card: a row of ``grasp_kernels.roofline.CARDS``.
        tokens: tokens per forward pass; with few of them, reading the weights takes longer than the products.
        dtype: dtype of the sweeps.
        basis: in which matrices are decomposed: by covariances in fp64, otherwise in fp32.
    """
    narrow = {2: card.flops, 4: card.fp32, 8: card.fp64}[dtype.itemsize]
    reading = 2 * tokens * card.bandwidth / dtype.itemsize
    return Rates(sweeps=min(narrow, reading), statistics=narrow, svd=card.fp64 if basis.inputs else card.fp32)


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
