"""The time of a recorded workload: the median times of its calls, weighted by their counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grasp.bench.recorded import WorkloadResult
from grasp.bench.records import OpResult

AUTO, UNFUSED, DENSE = "auto", "unfused", "dense"


def totals(cases: Sequence[Sequence[OpResult]], workload: str) -> Iterator[WorkloadResult]:
    """The totals of ``auto`` and of every provider that was timed for all calls.

    Args:
        cases: the results of each different call; ``calls`` of a result is its weight.
        workload: name of the file.
    """
    by_provider = [
        {name: result for result in results for name in (AUTO, result.provider) if name != AUTO or result.chosen}
        for results in cases
    ]
    common = [name for name in by_provider[0] if all(name in results for results in by_provider)] if cases else []
    lines = {name: [results[name] for results in by_provider] for name in common}
    ms = {name: _weighted([line.median_us for line in lines[name]], lines[name]) for name in common}
    for name in common:
        floors = [line.floor_us for line in lines[name] if line.floor_us is not None]
        floor = _weighted(floors, lines[name]) if len(floors) == len(cases) else None
        yield WorkloadResult(
            workload=workload,
            provider=name,
            calls=sum(line.calls or 0 for line in lines[name]),
            different=len(cases),
            total_ms=ms[name],
            floor_ms=floor,
            share_of_floor=None if floor is None else floor / ms[name],
            speedup_over_unfused=ms[UNFUSED] / ms[name],
            speedup_over_dense=ms[DENSE] / ms[name],
            conditions=lines[name][-1].conditions,
        )


def _weighted(us: Sequence[float], lines: Sequence[OpResult]) -> float:
    """Sum of the times of all calls, ms."""
    return sum(time * (line.calls or 0) for time, line in zip(us, lines, strict=True)) / 1e3
