"""The fixture ``gate``: times a call in turns with a yardstick."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import pytest

from speedgate.baselines import KEY
from speedgate.checkouts import OtherVersionError
from speedgate.measures import Measure
from speedgate.other_version import OtherVersion
from speedgate.pairs import ROUNDS, Pairing, turn
from speedgate.selftest import Slowed, Trial
from speedgate.server import Server
from speedgate.timing import Batch, Rotation, using_threads
from speedgate.verdicts import MEASURES, Change, Document, Entry, Where, compare_entries

Operands = TypeVar("Operands")

MEASURED = 5  # calls per measure of the user
EXTENSIONS = 3  # most times that rounds are added while the threshold is within the noise

UNUSABLE = 2  # exit code: nothing to judge

Before = Callable[[Entry], Entry | None]  # what an entry is compared with


@dataclass
class Run:
    """What the plugin knows about a run of pytest."""

    where: Where
    baseline: Document
    entries: dict[str, Entry] = field(default_factory=dict)  # by test
    trials: list[Trial] = field(default_factory=list)
    report: list[str] = field(default_factory=list)  # lines to print
    finished: bool = False  # whether all selected tests were run
    other: OtherVersion | None = None
    server: Server | None = None


RUN = pytest.StashKey[Run]()


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
        return self._config.stash[RUN].where.kind

    def __call__(
        self,
        candidate: Callable[[Operands], object],
        yardstick: Callable[[Operands], object],
        operands: Sequence[Operands],
        *,
        label: str | None = None,
        against: str = "the yardstick",
        measures: Mapping[str, Measure] | None = None,
    ) -> None:
        """Time ``candidate`` in turns with ``yardstick``; with timing disabled, call both once.

        Args:
            candidate: the guarded call.
            yardstick: a call that does not change, takes about as long, and uses the same parts of the machine.
            operands: the calls get one of them each, in a cycle. Copies in different memory, together larger than the
                caches, make every call read memory; a single one stays in a cache.
            label: name in reports; ``None`` for the test's name.
            against: name of the yardstick in reports. A baseline with another yardstick is refused.
            measures: what to judge beside time, such as ``{"peak bytes": speedgate.measures.python_peak_bytes}``. Each
                gets a function without arguments that calls ``candidate``, and returns a number; smaller is better.

        Raises:
            ValueError: if there are no operands, or a measure has a reserved name or returns no such number.
        """
        if not operands:
            raise ValueError("expected at least one operand for candidate and yardstick, got none")
        measures = measures or {}
        if reserved := [name for names in MEASURES.values() for name in names if name in measures]:
            raise ValueError(f"the gate itself measures {reserved[0]!r}; choose another name for the measure")
        if not self._benchmark.enabled:
            yardstick(operands[0])
            self._benchmark(candidate, operands[0])
            return
        run = self._config.stash[RUN]
        with using_threads(run.where.threads):
            rotation = Rotation(operands)
            ours, theirs = (partial(turn, self.device, call, rotation) for call in (candidate, yardstick))
            turns = ours()  # warms up: the first call may fill caches
            values = {name: _values(name, measure, candidate, operands[0]) for name, measure in measures.items()}
            if run.server:
                self._benchmark.pedantic(run.server.lend, args=(turns, values))
                return
            entry = Entry(label or self._name, against, (), (), values)
            if run.other:
                entry = self._time_with_other(run.other, entry, turns)
            else:
                before = run.baseline.entries.get(self._benchmark.fullname)
                entry = self._time(Pairing(turns, theirs()), entry, lambda _: before)
                if percent := self._config.option.gate_selftest:
                    again = [self._time_again(ours, theirs, entry, fraction) for fraction in (0.0, percent / 100)]
                    run.trials.append(Trial(entry.label, *again))
        self._benchmark.extra_info.update({KEY: asdict(entry), "calls_per_round": turns.calls})
        run.entries[self._benchmark.fullname] = entry

    def _time(self, pairing: Pairing, entry: Entry, before: Before) -> Entry:
        """The entry with the times of a pairing, recorded with pytest-benchmark."""
        self._benchmark.pedantic(pairing.candidate, setup=pairing.yardstick, rounds=ROUNDS * pairing.turns)
        pairing.keep(ROUNDS)  # pytest-benchmark may make more turns: --benchmark-cprofile profiles some
        return self._settled(pairing, entry, before)

    def _time_with_other(self, other: OtherVersion, entry: Entry, turns: Batch) -> Entry:
        """The entry with times in turns with the candidate of another version, whose ratio to itself was 1."""
        name = self._benchmark.fullname
        try:
            with other.test(name) as theirs:

                def before(entry: Entry) -> Entry:
                    """The entry that this one would be if nothing had changed."""
                    return replace(entry, seconds=entry.yardstick_seconds, measures=theirs.measures)

                entry = self._time(Pairing(turns, theirs), replace(entry, against=other.name), before)
                other.entries[name] = before(entry)
        except OtherVersionError as error:
            pytest.exit(str(error), returncode=UNUSABLE)
        return entry

    def _time_again(
        self, ours: Callable[[], Batch], theirs: Callable[[], Batch], entry: Entry, fraction: float
    ) -> Change:
        """The change of the ratio when the call is measured once more, slowed down by a fraction."""
        pairing = Pairing(Slowed(ours(), fraction), theirs())
        pairing.more()
        return self._changes(entry, self._settled(pairing, entry, lambda _: entry))[0]

    def _settled(self, pairing: Pairing, entry: Entry, before: Before) -> Entry:
        """The entry with the times of a pairing, which gets more rounds until they settle the verdict."""
        for extension in range(EXTENSIONS + 1):
            seconds, yardstick_seconds = pairing.times
            entry = replace(entry, seconds=seconds, yardstick_seconds=yardstick_seconds)
            reference = before(entry)
            if reference is None or all(change.settled for change in self._changes(reference, entry)):
                break
            if extension < EXTENSIONS:
                pairing.more()
        return entry

    def _changes(self, before: Entry, entry: Entry) -> list[Change]:
        """The changes of times, the ratio first."""
        changes = compare_entries(before, entry, self.device, self._config.option.gate_threshold)
        return [change for change in changes if change.measure in MEASURES[self.device]]


def _values(
    name: str, measure: Measure, candidate: Callable[[Operands], object], operand: Operands
) -> tuple[float, ...]:
    """Values of a user's measure."""
    values = tuple(float(measure(lambda: candidate(operand))) for _ in range(MEASURED))
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"the measure {name!r} returned {values}, expected finite numbers that are not negative")
    return values
