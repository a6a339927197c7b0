from __future__ import annotations

import itertools

import pytest

from speedgate import pairs
from speedgate.pairs import Pairing, turn
from speedgate.timing import Rotation


class Clock:
    """A batch whose turns take the given times, over and over."""

    def __init__(self, name: str, times: list[float], order: list[str]) -> None:
        self.calls = 2
        self._name, self._times, self._order = name, itertools.cycle(times), order

    def seconds(self) -> float:
        self._order.append(self._name)
        return next(self._times)


def pairing(candidate: list[float], yardstick: list[float]) -> tuple[Pairing, list[str]]:
    order: list[str] = []
    paired = Pairing(Clock("c", candidate, order), Clock("y", yardstick, order))
    order.clear()
    return paired, order


def test_turns_alternate_and_each_round_has_as_many() -> None:
    paired, order = pairing([1e-3], [2e-3])
    paired.more()
    assert "".join(order) == "yc" * (pairs.ROUNDS * paired.turns)
    assert paired.times == ((1e-3,) * pairs.ROUNDS, (2e-3,) * pairs.ROUNDS)
    paired.more()
    assert paired.times == ((1e-3,) * 2 * pairs.ROUNDS, (2e-3,) * 2 * pairs.ROUNDS)


def test_interrupted_turns_drop_out_of_their_round_though_they_be_most() -> None:
    paired, _ = pairing([1e-3, 50e-3, 50e-3], [2e-3])
    paired.more()
    assert set(paired.times[0]) == {1e-3}


@pytest.mark.parametrize(("seconds", "turns"), [(1e-6, 31), (1e-3, 15), (1.0, 3)])
def test_slow_calls_take_fewer_turns(seconds: float, turns: int) -> None:
    assert pairing([seconds], [seconds])[0].turns == turns


def test_a_turn_makes_as_many_calls_as_fit_into_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call(_: object) -> None:
        now[0] += 1e-4

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timed = turn("cpu", call, Rotation([None]))
    assert timed.calls == 10
    assert timed.seconds() == pytest.approx(1e-4)
