from __future__ import annotations

import pytest

from grasp import progress
from grasp.progress import Clock


def test_a_clock_gives_each_step_its_time_and_goes_on_from_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] = 1.0  # before the first step: nobody's
    clock.enter("a")
    now[0] = 3.0
    assert clock.seconds == {"a": 2.0}
    now[0] = 4.0
    clock.enter("b")
    clock.add({"a": 10.0, "c": 5.0})
    now[0] = 4.5
    clock.enter("a")
    now[0] = 5.0
    assert clock.seconds == {"a": 13.5, "b": 0.5, "c": 5.0}
