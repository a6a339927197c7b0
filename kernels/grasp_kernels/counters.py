"""Counters of kernels whose programs wait for one another: they start at 0, and each launch leaves them ready."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_STREAM_COUNTERS = 4096  # int32 per (device, stream)
_CAPTURE_COUNTERS = 1 << 18  # int32 per device, for all launches captured in CUDA graphs
_CAPTURE_ALIGNMENT = 32  # int32: two launches never share a cache line


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one inside the block; no-op if it already is, or for other devices."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_of_stream: dict[tuple[int, int], Tensor] = {}
_reserve: dict[int, list[Tensor]] = {}  # device → one tensor, its unused counters for captured launches


def counters(device: torch.device, count: int) -> Tensor:
    """Counters for one launch on the current stream, (at least ``count``,) int32.

    The first counter is the grid barrier's: its low bits are 0. The others are 0. A launch must leave them like this.
    Launches on one stream run one after the other and share counters. A captured launch may be replayed on any stream,
    so it gets counters of its own. They come from a reserve, which the first call on the device allocates and zeroes
    outside any capture. Without that call, or once the reserve is used up, the graph contains a node that zeroes them.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with on_device(device):
        stream = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            return _captured(device, stream.device_index, count)
        key = (stream.device_index, stream.cuda_stream)
        cached = _of_stream.get(key)
        if cached is None or cached.numel() < count:
            if stream.device_index not in _reserve:
                _reserve[stream.device_index] = [torch.zeros(_CAPTURE_COUNTERS, dtype=torch.int32, device=device)]
                stream.synchronize()
            cached = _of_stream[key] = torch.zeros(max(count, _STREAM_COUNTERS), dtype=torch.int32, device=device)
        return cached


def _captured(device: torch.device, index: int, count: int) -> Tensor:
    size = -(-count // _CAPTURE_ALIGNMENT) * _CAPTURE_ALIGNMENT
    reserve = _reserve.get(index)
    if reserve is None or reserve[0].numel() < size:
        return torch.zeros(count, dtype=torch.int32, device=device)
    taken, reserve[0] = reserve[0][:size], reserve[0][size:]
    return taken
