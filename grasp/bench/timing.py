"""The timing loop of every benchmark: batches of calls that rotate through memory, timed in turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Generic, Protocol, TypeVar

import torch

Operands = TypeVar("Operands")
Name = TypeVar("Name")

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
    device: torch.device,
    function: Callable[[Operands], object],
    rotation: Rotation[Operands],
    calls: int | None = None,
) -> Batch:
    """A warmed-up batch of calls of ``function``; the number of calls suits the device if ``calls`` is ``None``."""
    return (CudaBatch if device.type == "cuda" else CpuBatch)(function, rotation, calls)


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, one per repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median time, in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def speedup_over(self, other: Sample) -> float:
        """Median over repetitions of the other time over this one: a slow moment of the machine cancels."""
        return median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use ``count`` CPU threads during the block; ``None`` changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def turns(names: Sequence[Name], repetitions: int) -> Iterator[tuple[int, Name]]:
    """Repetition and name of every turn: all names in each repetition, each repetition starting with the next one."""
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in (*names[first:], *names[:first]):
            yield repetition, name


def interleave(batches: Mapping[str, Batch], repetitions: int) -> dict[str, Sample]:
    """Time all batches in turns."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _, name in turns(list(batches), repetitions):
        times[name].append(batches[name].seconds())
    return {name: Sample(tuple(seconds)) for name, seconds in times.items()}
