from __future__ import annotations

from typing import Any

import pytest

from grasp.bench.ops import totals
from grasp.bench.records import OpResult
from tests.bench.records import record


def case(calls: int, **us: float) -> list[OpResult]:
    """Results of one call; ``auto`` chooses the first provider."""

    def result(provider: str, time: float) -> OpResult:
        values: dict[str, Any] = {
            "floor_us": None if provider == "dense" else 2.0,
            "chosen": provider == next(iter(us)),
        }
        return record(OpResult, provider=provider, median_us=time, calls=calls, **values)

    return [result(provider, time) for provider, time in us.items()]


def test_totals_are_weighted_by_the_number_of_calls() -> None:
    cases = [case(1000, cpu=4, unfused=6, dense=10), case(500, reference=8, cpu=10, unfused=8, dense=20)]
    results = {result.provider: result for result in totals(cases, "w.json")}
    assert {name: result.total_ms for name, result in results.items()} == {
        "auto": 4 + 4,
        "cpu": 4 + 5,
        "unfused": 6 + 4,
        "dense": 10 + 10,  # reference was not timed for all calls
    }
    auto = results["auto"]
    assert (auto.calls, auto.different, auto.floor_ms) == (1500, 2, 3)
    assert auto.share_of_floor == pytest.approx(3 / 8)
    assert (auto.speedup_over_unfused, auto.speedup_over_dense) == (10 / 8, 20 / 8)
    assert results["dense"].floor_ms is None


def test_without_a_timed_call_there_are_no_totals() -> None:
    assert list(totals([], "w.json")) == []
