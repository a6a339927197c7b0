"""Records of the benchmarks for tests that measure nothing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from benchmarks.study.records import StudySetting
from grasp.bench.conditions import Conditions
from grasp.bench.percentiles import Percentiles
from grasp.bench.records import OpResult
from grasp.bench.schema import Record

RecordT = TypeVar("RecordT", bound=Record)

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
_VALUES: dict[str, Any] = {
    "str": "a",
    "int": 3,
    "float": 0.5,
    "bool": True,
    "Conditions": CONDITIONS,
    "Mapping[str, float]": {"a": 0.5},
    "Mapping[str, int]": {"a": 1},
    "tuple[int, ...]": (1, 2),
    "tuple[float, ...]": (0.5,),
    "tuple[Mapping[str, float], ...]": ({"a": 0.5},),
    "Percentiles": Percentiles(1.0, 2.0, 3.0, p50_interval=(0.9, 1.2)),
    "StudySetting": StudySetting("a", "b", "c", 1, 2, 3, 4, None, "float32"),
}


def record(record_class: type[RecordT], **values: Any) -> RecordT:
    """A record with all fields filled, some of them as given."""
    filled = {field.name: _VALUES[str(field.type).removesuffix(" | None")] for field in fields(record_class)}
    of_class = {"form": "factored", "weights": None, "calls": None} if record_class is OpResult else {}
    return record_class(**{**filled, **of_class, **values})
