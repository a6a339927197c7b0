"""Measures beside time for ``gate(..., measures={...})``: each makes a call and returns a number, smaller is better."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable

Measure = Callable[[Callable[[], object]], float]


def python_peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that Python's allocators hold during the call, above those before; NumPy's arrays are among them.

    Example:
        >>> python_peak_bytes(lambda: bytearray(10**6)) // 10**6
        1
    """
    if tracing := tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    else:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


def python_blocks(call: Callable[[], object]) -> int:
    """Number of small memory blocks that Python holds for the call's result, and for what the call leaves behind.

    Example:
        >>> python_blocks(lambda: [object() for _ in range(1000)]) >= 1000
        True
    """
    before = sys.getallocatedblocks()
    result = call()
    blocks = sys.getallocatedblocks() - before
    del result
    return max(0, blocks)


def cuda_peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors on the GPU during the call, above those before."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def cuda_allocations(call: Callable[[], object]) -> int:
    """Number of allocations by PyTorch on the GPU during the call."""
    import torch

    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before
