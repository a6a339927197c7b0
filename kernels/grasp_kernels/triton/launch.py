"""What the Triton launchers share: a launch as a value, facts of the card, and counters that start and end at zero."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grasp_kernels.triton.tiles import INTERPRETED

_STREAM_COUNTERS = 4096  # int32 of a (device, stream)
_CAPTURE_COUNTERS = 1 << 18  # int32 of a device, for all launches captured in CUDA graphs
_CAPTURE_ALIGNMENT = 32  # int32: two launches never share a cache line


class Launch(NamedTuple):
    """One kernel launch: what a plan consists of, to be run, compiled ahead of time, or looked at."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by parameter name, constexprs among them
    options: Mapping[str, Any]  # num_warps, num_stages, launch_pdl, ...

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, **self.options)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Launch one after the other on the device's current stream, with nothing between them."""
    with _on_device(device):
        for launch in launches:
            launch.run()


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one for a while; nothing where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Card(NamedTuple):
    """What a plan depends on besides the problem."""

    name: str
    processors: int  # streaming multiprocessors
    capability: int  # 10 * major + minor

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start under the end of the one before it (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def warpgroup_dots(self) -> bool:
        """Whether a large dot keeps its operands or its sum out of the registers: sm_90 and the sm_100 family."""
        return 90 <= self.capability < 120


@functools.cache
def card(device: torch.device) -> Card:
    """The card behind a device, or Triton's interpreter."""
    if device.type != "cuda" or INTERPRETED.value:
        return Card("interpreter", processors=8, capability=0)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor)


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
    with _on_device(device):
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
