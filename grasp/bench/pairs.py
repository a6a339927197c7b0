"""A call timed in turns with a yardstick, so that what slows the machine slows both; what they take, round by round."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from grasp.bench.timing import Batch, Rotation, batch

Operands = TypeVar("Operands")

TURN = 0.001  # seconds of a CPU that one turn aims at: less than the scheduler lets a process run at a stretch
ROUNDS = 20
ROUND = 0.06  # seconds that one round aims at
TURNS = (3, 31)  # in a round
PROBES = 20  # calls, or turns, of which the fastest sets how long turns and rounds are, whatever else the machine does


class Pair(NamedTuple):
    """Seconds of one call, one element per round: the lower quartile of its turns, for an interruption only adds."""

    candidate: tuple[float, ...]
    yardstick: tuple[float, ...]


class Pairing:
    """A candidate and its yardstick, whose turns alternate; ``rounds`` of ``turns`` each are to be taken."""

    def __init__(self, candidate: Batch, yardstick: Batch) -> None:
        self._batches = {"candidate": candidate, "yardstick": yardstick}
        self._times: dict[str, list[float]] = {name: [] for name in self._batches}
        both = sum(_probe(each) * each.calls for each in self._batches.values())
        self.turns = max(TURNS[0], min(TURNS[1], round(ROUND / both)))

    def candidate(self) -> None:
        """Let the candidate take its turn."""
        self._turn("candidate")

    def yardstick(self) -> None:
        """Let the yardstick take its turn."""
        self._turn("yardstick")

    def _turn(self, name: str) -> None:
        self._times[name].append(self._batches[name].seconds())

    def more(self) -> None:
        """Take another ``ROUNDS`` rounds."""
        for _ in range(ROUNDS * self.turns):
            self.yardstick()
            self.candidate()

    def result(self) -> Pair:
        """What was timed until now."""
        return Pair(*(self._rounds(self._times[name]) for name in ("candidate", "yardstick")))

    def _rounds(self, times: list[float]) -> tuple[float, ...]:
        rounds = (sorted(times[start : start + self.turns]) for start in range(0, len(times), self.turns))
        return tuple(turns[len(turns) // 4] for turns in rounds)


def turn(device: torch.device, function: Callable[[Operands], object], rotation: Rotation[Operands]) -> Batch:
    """Calls that make up one turn, warmed up."""
    if device.type != "cpu":
        return batch(device, function, rotation)
    timed = batch(device, function, rotation, calls=1)
    timed.calls = max(1, round(TURN / _probe(timed)))
    return timed


def _probe(timed: Batch) -> float:
    return min(timed.seconds() for _ in range(PROBES))
