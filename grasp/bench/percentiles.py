"""Percentiles of measured times, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from speedgate.verdicts import quantile_interval

PERCENTS = (50, 90, 95, 99)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the times of one thing, interpolated. With fewer than 100 times p99 is a guess.

    ``float()`` gives the median, ``str()`` p50, p95 and p99. Intervals are those of ``quantile_interval``, with a
    confidence of 95 %; ``None`` for too few times, and in earlier results.

    Attributes:
        p50: median.
        p95: 95th percentile.
        p99: 99th percentile.
        p90: 90th percentile; ``None`` in earlier results.
        p50_interval: from 6 times on.
        p90_interval: from 36 times on.
        p95_interval: from 72 times on.
        p99_interval: from 368 times on.

    Example:
        >>> str(Percentiles(9.12, 9.5, 120.3))
        '9.1 9.5 120'
    """

    p50: float
    p95: float
    p99: float
    p90: float | None = None
    p50_interval: tuple[float, ...] | None = None
    p90_interval: tuple[float, ...] | None = None
    p95_interval: tuple[float, ...] | None = None
    p99_interval: tuple[float, ...] | None = None

    def __float__(self) -> float:
        return self.p50

    def __str__(self) -> str:
        return " ".join(f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in (self.p50, self.p95, self.p99))

    @property
    def precision(self) -> float | None:
        """Largest distance of the median from an end of its interval, as a fraction of it; ``None`` without one."""
        if self.p50_interval is None:
            return None
        return max(abs(end - self.p50) for end in self.p50_interval) / self.p50

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """The percentiles, in ms, of times in seconds."""
        ms = [1e3 * value for value in seconds]
        cuts = quantiles(ms, n=100, method="inclusive") if len(ms) > 1 else ms * 99
        p50, p90, p95, p99 = (cuts[percent - 1] for percent in PERCENTS)
        return cls(p50, p95, p99, p90, *(quantile_interval(ms, percent / 100, CONFIDENCE) for percent in PERCENTS))
