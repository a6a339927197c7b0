"""Percentiles of measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from speedgate.verdicts import median_interval

FEWEST = 6  # times for an interval of their median with a confidence of 95 %


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the times of one thing, interpolated. With fewer than 100 times p99 is a guess.

    ``float()`` gives the median, ``str()`` p50, p95 and p99.

    Attributes:
        p50: median.
        p95: 95th percentile.
        p99: 99th percentile.
        p90: 90th percentile; ``None`` in earlier results.
        p50_interval: 95 % confidence interval of the median; ``None`` for fewer than six times.

    Example:
        >>> str(Percentiles(9.12, 9.5, 120.3))
        '9.1 9.5 120'
    """

    p50: float
    p95: float
    p99: float
    p90: float | None = None
    p50_interval: tuple[float, ...] | None = None

    def __float__(self) -> float:
        return self.p50

    def __str__(self) -> str:
        return " ".join(f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in (self.p50, self.p95, self.p99))

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """The percentiles, in ms, of times in seconds."""
        cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [*seconds] * 99
        p50, p90, p95, p99 = (1e3 * cuts[percent - 1] for percent in (50, 90, 95, 99))
        interval = median_interval(seconds, confidence=0.95) if len(seconds) >= FEWEST else None
        return cls(p50, p95, p99, p90, None if interval is None else (1e3 * interval.low, 1e3 * interval.high))
