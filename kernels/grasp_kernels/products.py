"""Products over many tokens, summed in fp32 (fp64 for fp64)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Columns of a symmetric sum per matmul; blocks below the diagonal are not computed. On a CPU, matmuls of smaller panels
# are slower, and larger panels compute more of the lower half. A GPU needs larger matmuls.
PANEL = {"cpu": 256, "cuda": 1024}

_LOCK = threading.RLock()


@contextmanager
def exact_bf16(*tensors: Tensor) -> Iterator[None]:
    """Let matmuls of these tensors, widened to fp32, use the bf16 units of a CPU that has them.

    oneDNN may round fp32 operands to bf16 inside the block. Operands that came from bf16 do not change, their products
    are exact in fp32, and the sums are fp32: nothing is lost. No-op unless all tensors are bf16 on a CPU. The setting
    is global to the process, so one thread at a time is inside the block.
    """
    if not all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors):
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _LOCK:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


def widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as an operand of a product summed in ``dtype``; CUDA sums 16-bit operands in fp32 without a copy."""
    if tensor.is_cuda and dtype == torch.float32 and tensor.element_size() == 2:
        return tensor
    return tensor.to(dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a @ b`` in the dtype of ``total``; the operands come from ``widen``."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    return total.add_(torch.mm(a, b, out_dtype=total.dtype))


def accumulate_gram_(gram: Tensor, x: Tensor) -> Tensor:
    """``gram += x.mT @ x`` on and above the diagonal, in about half the FLOPs; ``mirror_`` fills the rest, once.

    Args:
        gram: (K, K) in fp32 (fp64 for fp64), changed in place and returned. Elements below the diagonal are undefined.
        x: (T, K).
    """
    with exact_bf16(x):
        x = widen(x, gram.dtype)
        for start, stop in _panels(gram):
            add_product_(gram[start:stop, start:], x[:, start:stop].mT, x[:, start:])
    return gram


def project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight``, (T, N) and (N, K) → (T, K) in ``dtype``; few columns of the weight are widened at a time."""
    with exact_bf16(x, weight):
        alike = x.dtype == weight.dtype
        x = widen(x, dtype) if alike else x.to(dtype)
        result = x.new_zeros(len(x), weight.shape[1], dtype=dtype)
        for start, stop in _panels(weight.mT):
            columns = weight[:, start:stop]
            add_product_(result[:, start:stop], x, widen(columns, dtype) if alike else columns.to(dtype))
    return result


def mirror_(gram: Tensor) -> Tensor:
    """Copy the elements above the diagonal to below it: (K, K), changed in place and returned."""
    for start, stop in _panels(gram):
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
        gram[stop:, start:stop] = gram[start:stop, stop:].mT
    return gram


def panel(device: torch.device) -> int:
    """The columns of a panel on a device."""
    return PANEL["cpu" if device.type == "cpu" else "cuda"]


def _panels(matrix: Tensor) -> Iterator[tuple[int, int]]:
    size = panel(matrix.device)
    return ((start, min(start + size, len(matrix))) for start in range(0, len(matrix), size))
