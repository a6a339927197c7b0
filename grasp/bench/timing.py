"""Batches of calls timed in turns; ``speedgate.timing`` has the timing loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

from speedgate.timing import Batch

Name = TypeVar("Name")


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
