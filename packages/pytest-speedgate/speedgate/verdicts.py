"""Compare two recorded runs, to find calls that have become slower.

The gate judges the ratio of a call's time to the time of a yardstick, timed in turns with it: a median over rounds. On
a GPU it also judges the time itself. A change is a regression if it exceeds the threshold even from the slow end of the
baseline's confidence interval to the fast end of the new one.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

THRESHOLD = 0.15  # on a logarithmic scale halfway between no change and 30 % more time
CONFIDENCE = 0.99  # of a median's interval
# Judged measures by kind of device. On a shared CPU a time means nothing, but a ratio does.
MEASURES = {"cpu": ("ratio",), "cuda": ("ratio", "time")}
NOTHING_TIMED = "nothing was timed: the tests failed, were skipped or deselected, or do not call gate"
VERDICTS = ("regression", "unclear", "better", "same")


def threshold(text: str) -> float:
    """The value of an option: a fraction above 0. NaN would let everything pass."""
    if not 0 < (fraction := float(text)) < math.inf:
        raise ArgumentTypeError(f"expected a fraction above 0, such as {THRESHOLD}, got {text}")
    return fraction


class BaselineError(ValueError):
    """The baseline is missing, damaged, or not comparable with this run."""


@dataclass(frozen=True)
class Where:
    """Device and threads of a run; two runs are comparable if they are equal."""

    kind: str  # cpu or cuda
    device: str
    threads: int

    def __str__(self) -> str:
        """``'AMD EPYC' (cpu, threads: 1)``."""
        return f"{self.device!r} ({self.kind}, threads: {self.threads})"


@dataclass(frozen=True)
class Entry:
    """One gated call."""

    label: str  # to print
    against: str  # name of the yardstick
    seconds: tuple[float, ...]  # of one call, one per round
    yardstick_seconds: tuple[float, ...]
    measures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # the user's own, one value per call

    def values(self, measure: str) -> tuple[float, ...]:
        """Values of a measure from ``MEASURES``, one per round."""
        if measure == "time":
            return self.seconds
        return tuple(ours / theirs for ours, theirs in zip(self.seconds, self.yardstick_seconds, strict=True))

    def interval(self, measure: str) -> Interval:
        """Median and confidence interval of a measure from ``MEASURES``; median and range of a measure of the user."""
        if measure in self.measures:
            values = self.measures[measure]
            return Interval(min(values), median(values), max(values))
        return median_interval(self.values(measure))


@dataclass(frozen=True)
class Document:
    """A recorded run: its entries, by pytest's node id."""

    where: Where
    entries: Mapping[str, Entry]
    recorded: str = ""  # date, commit and versions, to print


@dataclass(frozen=True)
class Interval:
    """A median and its confidence interval."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Change:
    """Change of one measure of one entry, as a fraction of the baseline."""

    label: str
    against: str
    measure: str
    before: float
    now: float
    change: float
    least: float  # from the slow end of the baseline to the fast end of the new time
    most: float  # from the fast end of the baseline to the slow end of the new time
    threshold: float
    times: tuple[float, float]  # median seconds of the call and of its yardstick, now

    @property
    def verdict(self) -> str:
        """``regression``, ``unclear`` (above the threshold, but not its whole interval), ``better`` or ``same``."""
        if self.least > self.threshold:
            return "regression"
        if self.change > self.threshold:
            return "unclear"
        return "better" if self.most < 1 / (1 + self.threshold) - 1 else "same"

    def line(self) -> str:
        """One line to print."""
        return (
            f"{self.verdict}: {self.label}: {self.what} was {self.show(self.before)}, is {self.show(self.now)}: "
            f"{self.change:+.0%} ({self.range}), threshold {self.threshold:+.0%}"
        )

    @property
    def what(self) -> str:
        """The measured quantity, to print."""
        return f"time over {self.against}" if self.measure == "ratio" else self.measure

    @property
    def range(self) -> str:
        """The bounds of the change, to print."""
        return f"{self.least:+.0%} to {self.most:+.0%}"

    def show(self, value: float) -> str:
        """A value of the measure, to print."""
        return {"ratio": "{:.3f}".format, "time": microseconds}.get(self.measure, "{:,.6g}".format)(value)

    @property
    def settled(self) -> bool:
        """Whether the threshold is outside the interval of the change; if not, more rounds may settle it."""
        return not self.least <= self.threshold <= self.most


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two documents."""

    changes: Sequence[Change]
    lost: Sequence[str] = ()  # labels in the baseline only
    new: Sequence[str] = ()  # labels not in the baseline

    @property
    def failed(self) -> bool:
        """Whether an entry is slower, or no longer measured."""
        return bool(self.lost) or any(change.verdict == "regression" for change in self.changes)

    @property
    def worst_first(self) -> list[Change]:
        """The changes by verdict and size."""
        return sorted(self.changes, key=lambda change: (VERDICTS.index(change.verdict), -change.change))

    def lines(self) -> Iterator[str]:
        """One line per difference, the worst first, and a tally."""
        yield from (change.line() for change in self.worst_first if change.verdict != "same")
        yield from (f"lost: {label}: in the baseline, not measured in this run" for label in self.lost)
        yield from (f"new: {label}: measured in this run, not in the baseline" for label in self.new)
        yield self.tally

    @property
    def tally(self) -> str:
        """How many changes have each verdict."""
        counts = {verdict: sum(change.verdict == verdict for change in self.changes) for verdict in VERDICTS}
        tally = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return f"{len(self.changes)} compared: {tally}; {len(self.lost)} lost, {len(self.new)} new"


def microseconds(seconds: float) -> str:
    """``"12.34 µs"``."""
    return f"{seconds * 1e6:.2f} µs"


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Median and its ``quantile_interval``.

    Raises:
        ValueError: if there are too few values.
    """
    ends = quantile_interval(values, 0.5, confidence)
    if ends is None:
        raise ValueError(
            f"{len(values)} values are too few for a {confidence:.0%} interval of their median; take more rounds"
        )
    low, high = ends
    return Interval(low, median(values), high)


def quantile_interval(values: Sequence[float], fraction: float, confidence: float) -> tuple[float, float] | None:
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
        >>> quantile_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], 0.5, 0.95)
        (1.0, 6.0)
    """
    n, ordered, tail = len(values), sorted(values), (1 - confidence) / 2
    choices = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1))
    logs = (log + k * math.log(fraction) + (n - k) * math.log1p(-fraction) for k, log in enumerate(choices))
    at_most = list(accumulate(map(math.exp, logs)))  # P(B <= k)
    low, high = sum(p <= tail for p in at_most), 1 + sum(1 - p > tail for p in at_most)
    return (ordered[low - 1], ordered[high - 1]) if low >= 1 and high <= n else None


def compare_entries(before: Entry, now: Entry, kind: str, threshold: float = THRESHOLD) -> Iterator[Change]:
    """Changes of an entry in the measures of a kind of device, and in the user's measures that both have."""
    for measure in (*MEASURES[kind], *(name for name in now.measures if name in before.measures)):
        old, new = before.interval(measure), now.interval(measure)
        yield Change(
            now.label,
            now.against,
            measure,
            before=old.median,
            now=new.median,
            change=_relative(new.median, old.median),
            least=_relative(new.low, old.high),
            most=_relative(new.high, old.low),
            threshold=threshold,
            times=(median(now.seconds), median(now.yardstick_seconds)),
        )


def _relative(now: float, before: float) -> float:
    """``now / before - 1``; a measure of the user may be 0."""
    return now / before - 1 if before else (math.inf if now else 0.0)


def compare(baseline: Document, now: Document, threshold: float = THRESHOLD) -> Comparison:
    """Compare the common entries of two documents.

    Raises:
        BaselineError: if nothing was timed, devices, threads or yardsticks differ, or there are no common entries.
    """
    if not now.entries:
        raise BaselineError(NOTHING_TIMED)
    check_where(baseline.where, now.where)
    common = [name for name in now.entries if name in baseline.entries]
    if not common:
        raise BaselineError(
            f"nothing to compare: no entry of this run ({len(now.entries)}) has the name of one of the baseline "
            f"({len(baseline.entries)}); record a new baseline"
        )
    changes: list[Change] = []
    lost = [entry.label for name, entry in baseline.entries.items() if name not in now.entries]
    new = [entry.label for name, entry in now.entries.items() if name not in baseline.entries]
    for name in common:
        before, after = baseline.entries[name], now.entries[name]
        if before.against != after.against:
            raise BaselineError(
                f"{after.label}: measured against {after.against}, in the baseline against {before.against}; "
                "record a new baseline"
            )
        changes += compare_entries(before, after, now.where.kind, threshold)
        lost += [f"{after.label}: {measure}" for measure in before.measures if measure not in after.measures]
        new += [f"{after.label}: {measure}" for measure in after.measures if measure not in before.measures]
    return Comparison(changes, lost, new)


def check_where(baseline: Where, now: Where) -> None:
    """Check that the baseline was measured on this device with as many threads.

    Raises:
        BaselineError: if not.
    """
    if baseline != now:
        raise BaselineError(f"the baseline was measured on {baseline}, this run on {now}; record a baseline here")
