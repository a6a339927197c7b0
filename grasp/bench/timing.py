"""How long a call takes, on a CPU or on a GPU: batches that rotate through memory, interleaved, medians and spread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Generic, Protocol, TypeVar

import torch

Operands = TypeVar("Operands")

WARM_UP = 0.2  # seconds
CPU_BATCH = 0.02  # seconds that one batch aims at
CUDA_BATCH = 20  # calls in a graph, at least


class Rotation(Generic[Operands]):
    """Operands that differ in the memory they lie in.

    Whoever times with them takes the next ones: what another has just read, and a cache may hold, comes last.
    """

    def __init__(self, copies: Sequence[Operands]) -> None:
        self.copies = copies
        self._cycle = itertools.cycle(copies)

    def take(self, count: int) -> list[Operands]:
        """The next ``count`` operands."""
        return list(itertools.islice(self._cycle, count))


class Batch(Protocol):
    """Some calls that are timed together."""

    calls: int

    def run(self) -> None:
        """Make the calls and wait for them."""

    def seconds(self) -> float:
        """Make the calls; the time of one of them."""


class CpuBatch:
    """Calls made one after the other."""

    def __init__(
        self, function: Callable[[Operands], object], rotation: Rotation[Operands], calls: int | None = None
    ) -> None:
        self._function, self._rotation = function, rotation
        self.calls = 1
        start, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < WARM_UP:
            self.run()
            done += 1
        self.calls = calls or max(1, min(len(rotation.copies), round(CPU_BATCH * done / elapsed)))

    def run(self) -> None:
        """Make the calls."""
        self.seconds()

    def seconds(self) -> float:
        """Make the calls; the time of one of them."""
        operands = self._rotation.take(self.calls)
        function = self._function
        start = time.perf_counter()
        for each in operands:
            function(each)
        return (time.perf_counter() - start) / self.calls


class CudaBatch:
    """Calls captured into one CUDA graph, so that launching them costs the host nothing."""

    def __init__(
        self, function: Callable[[Operands], object], rotation: Rotation[Operands], calls: int | None = None
    ) -> None:
        self.calls = calls or max(len(rotation.copies), CUDA_BATCH)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # what compiles or allocates once does so before the capture
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
            self.run()

    def run(self) -> None:
        """Replay the graph and wait for it."""
        self._graph.replay()
        torch.cuda.synchronize()

    def seconds(self) -> float:
        """Replay the graph; the time of one of its calls, by the GPU's clock."""
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
    """A batch of calls of ``function``, warmed up; as many as suit the device where ``calls`` is left out."""
    return (CudaBatch if device.type == "cuda" else CpuBatch)(function, rotation, calls)


@dataclass(frozen=True)
class Sample:
    """Times of one call, in seconds, one per repetition."""

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
        """How many times faster than ``other``, repetition by repetition, so that a slow spell cancels; the median."""
        return median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


def interleave(batches: Mapping[str, Batch], repetitions: int) -> dict[str, Sample]:
    """Time all batches in turn, over and over, each time starting with another one."""
    names = list(batches)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(batches[name].seconds())
    return {name: Sample(tuple(seconds)) for name, seconds in times.items()}
