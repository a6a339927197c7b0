"""Percentiles of measured times, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median, quantiles

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
        return cls(p50, p95, p99, p90, *(quantile_interval(ms, percent / 100) for percent in PERCENTS))


def median_precision(values: Sequence[float]) -> float:
    """``Percentiles.precision`` of some times; infinite for fewer than 6."""
    interval, middle = quantile_interval(values, 0.5), median(values)
    return math.inf if interval is None else max(abs(end - middle) for end in interval) / middle


def quantile_interval(
    values: Sequence[float], fraction: float, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Confidence interval of a quantile between two order statistics, for independent values of any distribution.

    The number of values up to the quantile is ``B ~ Binomial(n, fraction)``. The interval is from the l-th to the u-th
    smallest value, with the largest l and the smallest u for which ``P(B < l)`` and ``P(B >= u)`` are at most
    ``(1 - confidence) / 2`` each (H. A. David, Order Statistics, section 7.1).

    Args:
        values: at least one.
        fraction: 0.5 for the median.
        confidence: probability that the quantile is inside.

    Returns:
        Both ends; ``None`` if there are too few values.

    Example:
        >>> quantile_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], 0.5)
        (1.0, 6.0)
    """
    n, ordered, tail = len(values), sorted(values), (1 - confidence) / 2
    choices = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1))
    logs = (log + k * math.log(fraction) + (n - k) * math.log1p(-fraction) for k, log in enumerate(choices))
    at_most = list(accumulate(map(math.exp, logs)))  # P(B <= k)
    low, high = sum(p <= tail for p in at_most), 1 + sum(1 - p > tail for p in at_most)
    return (ordered[low - 1], ordered[high - 1]) if low >= 1 and high <= n else None
