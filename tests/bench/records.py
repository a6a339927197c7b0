"""Records of the benchmarks for tests that measure nothing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from grasp.bench.conditions import Conditions
from grasp.bench.results import KINDS, Percentiles, Record, StudySetting

CONDITIONS = Conditions(
    device="a processor",
    threads=2,
    read_bandwidth=1e10,
    flops=1e12,
    torch="2.13.0",
    triton=None,
    python="3.11.7",
    commit="0" * 40,
    dirty=False,
    started="2026-01-01T00:00:00Z",
    instruction_sets=("portable",),
)
_PLAIN: dict[str, Any] = {"str": "a", "int": 3, "float": 0.5, "bool": True, "Conditions": CONDITIONS}
_OWN: dict[str, Any] = {
    "Mapping[str, float]": {"a": 0.5},
    "tuple[int, ...]": (1, 2),
    "Mapping[str, int]": {"a": 1},
    "Percentiles": Percentiles(1.0, 2.0, 3.0),
    "StudySetting": StudySetting("a", "b", "c", 1, 2, 3, 4, None, "float32"),
}


def record(kind: str, **values: Any) -> Record:
    """A record of a kind with all of its fields filled, some of them as given."""
    filled = {field.name: {**_PLAIN, **_OWN}[str(field.type).removesuffix(" | None")] for field in fields(KINDS[kind])}
    return KINDS[kind](**{**filled, **values})
