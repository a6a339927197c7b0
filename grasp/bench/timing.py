"""Calls timed in turns, and when turns end; ``speedgate.timing`` has the timing loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

from speedgate.timing import Batch

Name = TypeVar("Name")
STOPS = REPEATS, MIN_SECONDS, PRECISION, MAX_SECONDS = ("repeats", "min-seconds", "precision", "max-seconds")


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


@dataclass(frozen=True)
class StopRule:
    """When turns end.

    Raises:
        ValueError: if a number is out of range.
    """

    repeats: int = 5  # fewest turns
    min_seconds: float = 0.0  # fewest seconds of all turns
    # turns go on until all medians are known this well: largest distance from an end of the 95 % interval, as a
    # fraction of the median. ``None`` asks for no precision.
    precision: float | None = None
    # seconds after which turns end at any precision, 120 for ``None``; only with a precision
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if not self.min_seconds >= 0:
            raise ValueError(f"min_seconds must be at least 0, got {self.min_seconds:g}")
        if self.precision is not None and not 0 < self.precision < 1:
            raise ValueError(f"precision must be between 0 and 1, such as 0.02; got {self.precision:g}")
        if self.precision is None and self.max_seconds is not None:
            raise ValueError(
                f"max_seconds ends turns that wait for a precision, got {self.max_seconds:g} and no precision; "
                "give one, such as 0.02"
            )
        if self.precision is not None and not self._most >= self.min_seconds:
            raise ValueError(f"max_seconds must be at least min_seconds, got {self._most:g} and {self.min_seconds:g}")

    @property
    def _most(self) -> float:
        return 120.0 if self.max_seconds is None else self.max_seconds

    def reason(self, turns: int, seconds: float, precision: Callable[[], float]) -> str | None:
        """Why turns end now: a name of ``STOPS``; ``None`` to go on.

        Args:
            turns: finished turns.
            seconds: that they took.
            precision: the precision of the median that is known least well.
        """
        if turns < self.repeats or seconds < self.min_seconds:
            return None
        if self.precision is None:
            return REPEATS if turns == self.repeats else MIN_SECONDS
        if precision() <= self.precision:
            return PRECISION
        return MAX_SECONDS if seconds >= self._most else None


def rounds(names: Sequence[Name]) -> Iterator[tuple[Name, ...]]:
    """All names in turn, without end; each round starts with the next one."""
    for first in itertools.cycle(range(len(names))):
        yield (*names[first:], *names[:first])


def turns(names: Sequence[Name], repetitions: int) -> Iterator[tuple[int, Name]]:
    """Repetition and name of every turn of so many ``rounds``."""
    for repetition, order in enumerate(itertools.islice(rounds(names), repetitions)):
        for name in order:
            yield repetition, name


def interleave(batches: Mapping[Name, Batch], repetitions: int) -> dict[Name, Sample]:
    """Time all batches in turns."""
    times: dict[Name, list[float]] = {name: [] for name in batches}
    for _, name in turns(list(batches), repetitions):
        times[name].append(batches[name].seconds())
    return {name: Sample(tuple(seconds)) for name, seconds in times.items()}
