"""The fixture ``gate``: times a call in turns with a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import pytest

from speedgate.baselines import KEY
from speedgate.pairs import ROUNDS, Pairing, turn
from speedgate.timing import Rotation, using_threads
from speedgate.verdicts import Document, Entry, Where, compare_entries

Operands = TypeVar("Operands")

EXTENSIONS = 3  # most times that rounds are added while the threshold is within the noise

WHERE = pytest.StashKey[Where]()
ENTRIES = pytest.StashKey[dict[str, Entry]]()
BASELINE = pytest.StashKey[Document]()


class Gate:
    """The fixture ``gate``: call it once in a test.

    Example:
        >>> def test_sorted(gate):
        ...     operands = [[(i * step) % 997 for i in range(997)] for step in range(1, 9)]
        ...     gate(sorted, lambda numbers: sorted(numbers, key=float), operands, against="sorting by a key")
    """

    def __init__(self, benchmark: Any, config: pytest.Config, name: str) -> None:
        self._benchmark, self._config, self._name = benchmark, config, name

    @property
    def device(self) -> str:
        """The kind of device to run the calls on: ``"cpu"`` or ``"cuda"``."""
        return self._config.stash[WHERE].kind

    def __call__(
        self,
        candidate: Callable[[Operands], object],
        yardstick: Callable[[Operands], object],
        operands: Sequence[Operands],
        *,
        label: str | None = None,
        against: str = "the yardstick",
    ) -> None:
        """Time ``candidate`` in turns with ``yardstick``; with timing disabled, call both once.

        Args:
            candidate: the guarded call.
            yardstick: a call that does not change, takes about as long, and uses the same parts of the machine.
            operands: the calls get one of them each, in a cycle. Copies in different memory, together larger than the
                caches, make every call read memory; a single one stays in a cache.
            label: name in reports; ``None`` for the test's name.
            against: name of the yardstick in reports. A baseline with another yardstick is refused.

        Raises:
            ValueError: if there are no operands.
        """
        if not operands:
            raise ValueError("expected at least one operand for candidate and yardstick, got none")
        if not self._benchmark.enabled:
            yardstick(operands[0])
            self._benchmark(candidate, operands[0])
            return
        rotation = Rotation(operands)
        with using_threads(self._config.stash[WHERE].threads):
            turns = turn(self.device, candidate, rotation)
            pairing = Pairing(turns, turn(self.device, yardstick, rotation))
            self._benchmark.pedantic(pairing.candidate, setup=pairing.yardstick, rounds=ROUNDS * pairing.turns)
            for extension in range(EXTENSIONS + 1):
                entry = Entry(label or self._name, against, pairing.result("candidate"), pairing.result("yardstick"))
                if extension == EXTENSIONS or self._settled(entry):
                    break
                pairing.more()
        self._benchmark.extra_info.update({KEY: asdict(entry), "calls_per_round": turns.calls})
        self._config.stash.setdefault(ENTRIES, {})[self._benchmark.fullname] = entry

    def _settled(self, entry: Entry) -> bool:
        """Whether more rounds are not needed for a verdict."""
        baseline = self._config.stash.get(BASELINE, None)
        before = baseline and baseline.entries.get(self._benchmark.fullname)
        if not before:
            return True
        threshold = self._config.option.gate_threshold
        return all(change.settled for change in compare_entries(before, entry, self.device, threshold))
