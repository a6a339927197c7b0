from __future__ import annotations

import pytest

from grasp.bench.timing import Sample, StopRule, interleave


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


@pytest.mark.parametrize(
    ("turns", "seconds", "precision", "reason"),
    [
        (4, 9.0, 0.0, None),  # fewer turns than asked
        (5, 1.9, 0.0, None),  # less time than asked
        (5, 2.0, 0.01, "precision"),
        (5, 2.0, 0.02, None),
        (5, 7.0, 0.02, "max-seconds"),
    ],
)
def test_turns_end_at_the_precision_or_after_the_longest_time(
    turns: int, seconds: float, precision: float, reason: str | None
) -> None:
    rule = StopRule(repeats=5, min_seconds=2.0, precision=0.01, max_seconds=7.0)
    assert rule.reason(turns, seconds, lambda: precision) == reason


def test_without_a_precision_turns_and_seconds_decide() -> None:
    def unknown() -> float:
        raise AssertionError

    assert StopRule(3).reason(3, 0.0, unknown) == "repeats"
    assert StopRule(3, min_seconds=1.0).reason(3, 0.5, unknown) is None
    assert StopRule(3, min_seconds=1.0).reason(9, 1.5, unknown) == "min-seconds"
    assert StopRule(3, min_seconds=1.0).reason(3, 1.5, unknown) == "repeats"
