"""Counters of kernels whose programs wait for one another: they start at 0, and each launch leaves them ready."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

STREAM_COUNTERS = 4096  # int32, of the launches on one stream
RESERVE = 1 << 18  # int32 that are allocated at once, for streams and captured launches
CAPTURE = RESERVE // 2  # int32 that are unused after a call outside a capture: enough for 4096 small launches
ALIGNMENT = 32  # int32: two launches never share a cache line

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], Tensor] = {}  # (device, stream) → the counters of its launches
_reserve: dict[int, Tensor] = {}  # device → zeros that no launch has yet


def is_current(device: torch.device) -> bool:
    """Whether a launch on the device needs no other current device; true of devices that are not CUDA's."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one inside the block; no-op if it already is, or for other devices."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)


def counters(device: torch.device, count: int) -> Tensor:
    """Counters for one launch on the current stream, (at least ``count``,) int32.

    The first counter is the grid barrier's: its low bits are 0. The others are 0. A launch must leave them like this.
    Launches on one stream run one after the other and share counters. A captured launch may be replayed on any stream,
    so it gets counters of its own, which are never given back: 128 bytes for a small launch. They come from a reserve
    that calls outside a capture fill. If it is empty, a node of the graph zeroes them, and a warning says so.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with on_device(device), _lock:
        stream = torch.cuda.current_stream()
        index = stream.device_index
        if torch.cuda.is_current_stream_capturing():
            return _captured(device, index, count)
        if index not in _reserve or _reserve[index].numel() < CAPTURE:
            _reserve[index] = _zeros(index, RESERVE)
        shared = _of_stream.get((index, stream.cuda_stream))
        if shared is None or shared.numel() < count:
            size = max(count, STREAM_COUNTERS)
            shared = _take(index, size) if size <= CAPTURE else _zeros(index, size)
            _of_stream[index, stream.cuda_stream] = shared
        return shared


def _captured(device: torch.device, index: int, count: int) -> Tensor:
    size = -(-count // ALIGNMENT) * ALIGNMENT
    if index in _reserve and size <= _reserve[index].numel():
        return _take(index, size)
    warnings.warn(
        f"a CUDA graph is captured with an extra node for a low-rank launch, because {device} has no {size} unused "
        "counters: run the model once outside the capture before each graph",
        RuntimeWarning,
        stacklevel=2,
    )
    return torch.zeros(count, dtype=torch.int32, device=device)


def _take(index: int, size: int) -> Tensor:
    taken, _reserve[index] = _reserve[index][:size], _reserve[index][size:]
    return taken


def _zeros(index: int, size: int) -> Tensor:
    """Zeros that may outlive any memory pool.

    The warm-up of ``torch.compile(mode="reduce-overhead")`` and ``torch.cuda.use_mem_pool`` redirect the allocations of
    the current thread to a pool, and the former refuses a tensor that stays there. Another thread allocates these.
    """

    def allocate() -> Tensor:
        zeros = torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.current_stream(index).synchronize()  # other streams use them
        return zeros

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(allocate).result()
