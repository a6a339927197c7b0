"""The gate's sensitivity: benchmarks that are slowed down on purpose, and how many of them it catches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from speedgate.timing import Batch
from speedgate.verdicts import Change


class Slowed:
    """A batch that takes a fraction more time: each turn ends with a busy loop, proportional to its measured time."""

    def __init__(self, batch: Batch, fraction: float) -> None:
        self._batch, self._fraction = batch, fraction
        self.calls = batch.calls

    def seconds(self) -> float:
        """Make the calls, then keep busy; the seconds of one call."""
        seconds = self._batch.seconds()
        start = time.perf_counter()
        until = start + self._fraction * seconds * self.calls
        while (now := time.perf_counter()) < until:
            pass
        return seconds + (now - start) / self.calls


@dataclass(frozen=True)
class Trial:
    """Verdicts on one benchmark, measured again as it is, and slowed down."""

    label: str
    unchanged: Change
    slowed: Change

    @property
    def missed(self) -> bool:
        """Whether the slowdown was not found."""
        return self.slowed.verdict != "regression"

    @property
    def false_alarm(self) -> bool:
        """Whether the unchanged benchmark was called slower."""
        return self.unchanged.verdict == "regression"

    @property
    def verdict(self) -> str:
        """``caught``, ``missed`` or ``false alarm``."""
        return "false alarm" if self.false_alarm else "missed" if self.missed else "caught"


@dataclass(frozen=True)
class SelfTest:
    """All trials of a run."""

    trials: Sequence[Trial]
    fraction: float  # by which the benchmarks were slowed down

    @property
    def failed(self) -> bool:
        """Whether a trial has another verdict than ``caught``."""
        return any(trial.verdict != "caught" for trial in self.trials)

    @property
    def tally(self) -> str:
        """How many slowdowns were caught, and how many false alarms there were."""
        count, caught = len(self.trials), sum(not trial.missed for trial in self.trials)
        false = sum(trial.false_alarm for trial in self.trials)
        return f"slowed by {self.fraction:.0%}: {caught} of {count} caught; unchanged: {false} of {count} called slower"

    def lines(self) -> Iterator[str]:
        """One line per trial, and a tally."""
        for trial in self.trials:
            yield (
                f"{trial.verdict}: {trial.label}: slowed {trial.slowed.change:+.0%} ({trial.slowed.range}), "
                f"unchanged {trial.unchanged.change:+.0%} ({trial.unchanged.range})"
            )
        yield self.tally
