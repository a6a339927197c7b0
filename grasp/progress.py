"""How long steps report their progress and their duration."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Notify = Callable[[str], None]  # takes one line of text
Progress = Callable[[str, int, int], None]  # (step, done, total)


def no_progress(step: str, done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def one_step(progress: Progress, step: str) -> Iterator[None]:
    """Report that a step begins, and that it is done if the block succeeds."""
    progress(step, 0, 1)
    yield
    progress(step, 1, 1)


def named(progress: Progress, name: str) -> Progress:
    """A ``Progress`` whose steps have a name at their end."""
    return lambda step, done, total: progress(f"{step} {name}", done, total)


def no_notify(text: str) -> None:
    """Drop the text."""


class Clock:
    """Seconds spent in each step; one step runs at a time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._step: str | None = None
        self._since = time.perf_counter()

    def enter(self, step: str) -> None:
        """End the running step and start ``step``, which may be the same one."""
        now = time.perf_counter()
        if self._step is not None:
            self._seconds[self._step] += now - self._since
        self._step, self._since = step, now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add times measured elsewhere."""
        for step, value in seconds.items():
            self._seconds[step] += value

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by step, the running step included."""
        if self._step is not None:
            self.enter(self._step)
        return dict(self._seconds)


class TimeLeft:
    """The seconds that a whole job has left, from what each kind of step was expected to take and what it took.

    A kind is the name of a step up to its first comma, or ``REST`` if nothing is expected of that one. If steps take
    longer than expected, so will the rest. What a resumed job has done before is counted as done, not as fast.

    Args:
        expected: kind → seconds of all steps of this kind.
        repeats: kind → how many steps of this kind the job has; 1 for the kinds that are left out.

    Example:
        >>> left = TimeLeft({"sums": 30.0, "refit": 10.0}, {"sums": 2})
        >>> left.after("sums, 3 layers", 1, 3, now=0.0)  # a sixth of 30 s
        35.0
        >>> left.after("sums, 3 layers", 3, 3, now=20.0)  # a third more took 20 s
        50.0
    """

    REST = "the rest"

    def __init__(self, expected: Mapping[str, float], repeats: Mapping[str, int] | None = None) -> None:
        self._expected, self._repeats = expected, repeats or {}
        self._done: dict[str, float] = defaultdict(float)  # kind → steps done
        self._first: tuple[float, float] | None = None  # time and expected seconds of the first report

    def after(self, step: str, done: int, total: int, now: float) -> float:
        """The seconds left when, at the time ``now`` in seconds, ``done`` of ``total`` units of a step are done."""
        kind = step.partition(",")[0]
        kind = kind if kind in self._expected else self.REST
        finished = int(self._done[kind] + 1e-9)
        self._done[kind] = finished + done / total if done < total else finished + 1
        past = sum(
            seconds * min(1.0, self._done[kind] / self._repeats.get(kind, 1))
            for kind, seconds in self._expected.items()
        )
        self._first = self._first or (now, past)
        since, before = self._first
        return (sum(self._expected.values()) - past) * ((now - since) / (past - before) if past > before else 1.0)
