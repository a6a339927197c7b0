"""The timing loop: batches of calls that rotate through memory, on a CPU or as a CUDA graph."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

Operands = TypeVar("Operands")

WARM_UP = 0.2  # seconds
CPU_BATCH = 0.02  # seconds that one batch aims at
CUDA_BATCH = 20  # calls in a graph, at least


class Rotation(Generic[Operands]):
    """Copies of the same operands in different memory, handed out in a cycle.

    Batches that share a rotation never read the copies that the batch before has just read, and a cache may hold.
    """

    def __init__(self, copies: Sequence[Operands]) -> None:
        self.copies = copies
        self._cycle = itertools.cycle(copies)

    def take(self, count: int) -> list[Operands]:
        """The next ``count`` operands."""
        return list(itertools.islice(self._cycle, count))


class Batch(Protocol):
    """Calls that are timed together."""

    calls: int

    def seconds(self) -> float:
        """Make the calls; the seconds of one call."""


class CpuBatch:
    """Calls made one after the other."""

    def __init__(
        self, function: Callable[[Operands], object], rotation: Rotation[Operands], calls: int | None = None
    ) -> None:
        self._function, self._rotation = function, rotation
        self.calls = 1
        start, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < WARM_UP:
            self.seconds()
            done += 1
        self.calls = calls or max(1, min(len(rotation.copies), round(CPU_BATCH * done / elapsed)))

    def seconds(self) -> float:
        """Make the calls; the seconds of one call."""
        copies = self._rotation.take(self.calls)
        function = self._function
        start = time.perf_counter()
        for operands in copies:
            function(operands)
        return (time.perf_counter() - start) / self.calls


class CudaBatch:
    """Calls captured into one CUDA graph, so that the host spends no time on launches."""

    def __init__(
        self, function: Callable[[Operands], object], rotation: Rotation[Operands], calls: int | None = None
    ) -> None:
        import torch

        self.calls = calls or max(len(rotation.copies), CUDA_BATCH)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compilations and first allocations must happen before the capture
            for operands in rotation.take(3):
                function(operands)
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for operands in rotation.take(self.calls):
                function(operands)
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP:
            self.seconds()

    def seconds(self) -> float:
        """Replay the graph; the seconds of one call, by the GPU's clock."""
        self._start.record()
        self._graph.replay()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3 / self.calls


def batch(
    kind: str,
    function: Callable[[Operands], object],
    rotation: Rotation[Operands],
    calls: int | None = None,
) -> Batch:
    """A warmed-up batch of calls of ``function``.

    Args:
        kind: kind of device, ``"cpu"`` or ``"cuda"``.
        function: gets one operand at a time.
        rotation: the operands.
        calls: number of calls in the batch; ``None`` for one that suits the device.
    """
    return (CudaBatch if kind == "cuda" else CpuBatch)(function, rotation, calls)


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use ``count`` CPU threads during the block; nothing changes for ``None`` or without PyTorch.

    Only a process that has imported PyTorch runs its calls, so it is not imported here.
    """
    torch = sys.modules.get("torch")
    if torch is None or count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
