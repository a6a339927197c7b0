"""A call timed in turns with a yardstick, round by round: a slow moment of the machine slows both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from speedgate.timing import Batch, Rotation, batch

Operands = TypeVar("Operands")

TURN = 0.001  # seconds that one turn on a CPU aims at: shorter than a time slice of the scheduler
ROUNDS = 20
ROUND = 0.06  # seconds that one round aims at
TURNS = (3, 31)  # fewest and most turns in a round
PROBES = 20  # the fastest of so many calls or turns sets the length of turns and rounds


class Pairing:
    """A candidate and its yardstick in turns; a round has ``turns`` turns of each."""

    def __init__(self, candidate: Batch, yardstick: Batch) -> None:
        self._batches = {"candidate": candidate, "yardstick": yardstick}
        self._times: dict[str, list[float]] = {name: [] for name in self._batches}
        both = sum(_probe(timed) * timed.calls for timed in self._batches.values())
        self.turns = max(TURNS[0], min(TURNS[1], round(ROUND / both)))

    def candidate(self) -> None:
        """Time one turn of the candidate."""
        self._turn("candidate")

    def yardstick(self) -> None:
        """Time one turn of the yardstick."""
        self._turn("yardstick")

    def _turn(self, name: str) -> None:
        self._times[name].append(self._batches[name].seconds())

    def more(self) -> None:
        """Time another ``ROUNDS`` rounds."""
        for _ in range(ROUNDS * self.turns):  # in the order of pytest-benchmark, which times the rounds before
            self.yardstick()
            self.candidate()

    def keep(self, rounds: int) -> None:
        """Forget all turns after so many rounds."""
        for times in self._times.values():
            del times[rounds * self.turns :]

    @property
    def times(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds of one call of the candidate and of the yardstick, one per round.

        Each is the lower quartile of its turns, since interruptions only add.
        """
        return self._rounds("candidate"), self._rounds("yardstick")

    def _rounds(self, name: str) -> tuple[float, ...]:
        times = self._times[name]
        rounds = (sorted(times[start : start + self.turns]) for start in range(0, len(times), self.turns))
        return tuple(seconds[len(seconds) // 4] for seconds in rounds)


def turn(kind: str, function: Callable[[Operands], object], rotation: Rotation[Operands]) -> Batch:
    """The warmed-up calls of one turn on a ``kind`` of device, ``"cpu"`` or ``"cuda"``."""
    if kind != "cpu":
        return batch(kind, function, rotation)
    timed = batch(kind, function, rotation, calls=1)
    timed.calls = max(1, round(TURN / _probe(timed)))
    return timed


def _probe(timed: Batch) -> float:
    return min(timed.seconds() for _ in range(PROBES))
