"""How long steps report their progress and their duration."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

Notify = Callable[[str], None]  # takes one line of text
Progress = Callable[[str, int, int], None]  # (step, done, total)


def no_progress(step: str, done: int, total: int) -> None:
    """Report nothing."""


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
