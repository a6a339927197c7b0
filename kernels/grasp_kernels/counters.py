"""Counters of the kernels that wait for one another: they start at zero, and every launch leaves them ready."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_STREAM_COUNTERS = 4096  # int32 of a (device, stream)
_CAPTURE_COUNTERS = 1 << 18  # int32 of a device, for all launches captured in CUDA graphs
_CAPTURE_ALIGNMENT = 32  # int32: two launches never share a cache line


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one for a while; nothing where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


_of_stream: dict[tuple[int, int], Tensor] = {}
_reserve: dict[int, list[Tensor]] = {}  # device → what is left of its counters for captured launches


def counters(device: torch.device, count: int) -> Tensor:
    """Counters for one launch on the current stream, (at least ``count``,) int32.

    The first is the grid barrier's: its low bits are 0. The others are 0. A launch must leave them so. Launches on one
    stream follow one another and share theirs. A captured launch may be replayed on any stream, so it gets counters of
    its own, from a reserve that is made and zeroed outside any capture, at the first call on the device. Without that
    call, or with the reserve used up, zeroing them becomes a node of the graph.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with on_device(device):
        stream = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            return _captured(device, stream.device_index, count)
        key = (stream.device_index, stream.cuda_stream)
        held = _of_stream.get(key)
        if held is None or held.numel() < count:
            if stream.device_index not in _reserve:
                _reserve[stream.device_index] = [torch.zeros(_CAPTURE_COUNTERS, dtype=torch.int32, device=device)]
                stream.synchronize()
            held = _of_stream[key] = torch.zeros(max(count, _STREAM_COUNTERS), dtype=torch.int32, device=device)
        return held


def _captured(device: torch.device, index: int, count: int) -> Tensor:
    size = -(-count // _CAPTURE_ALIGNMENT) * _CAPTURE_ALIGNMENT
    left = _reserve.get(index)
    if left is None or left[0].numel() < size:
        return torch.zeros(count, dtype=torch.int32, device=device)
    taken, left[0] = left[0][:size], left[0][size:]
    return taken
