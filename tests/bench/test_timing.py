from __future__ import annotations

import pytest

from grasp.bench.timing import Sample, interleave


class Clock:
    """A batch whose times are given, and which notes when it is asked for one."""

    calls = 1

    def __init__(self, name: str, times: list[float], order: list[str]) -> None:
        self._name, self._times, self._order = name, iter(times), order

    def seconds(self) -> float:
        """The next of the given times."""
        self._order.append(self._name)
        return next(self._times)


def test_providers_take_turns_and_each_begins_in_turn() -> None:
    order: list[str] = []
    clocks = {name: Clock(name, [1.0, 2.0, 3.0], order) for name in "abc"}
    samples = interleave(clocks, 3)
    assert "".join(order) == "abcbcacab"
    assert samples["a"] == Sample((1.0, 2.0, 3.0))


def test_median_and_spread() -> None:
    sample = Sample((1.0, 2.0, 3.0, 4.0, 50.0))
    assert sample.median == 3
    assert sample.spread == pytest.approx((4 - 2) / 3)
    assert Sample((1.0,)).spread == 0


def test_a_slow_spell_of_the_machine_cancels_in_the_speedup() -> None:
    ours, theirs = Sample((1.0, 10.0, 1.0)), Sample((2.0, 20.0, 2.0))
    assert ours.speedup_over(theirs) == 2
    assert theirs.speedup_over(ours) == 0.5
