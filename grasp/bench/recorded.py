"""A recorded workload, and its times in ``grasp bench ops --workload``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.bench.conditions import Conditions
from grasp.bench.schema import Record
from grasp.formatting import Column, share

_significant, _ratio = "{:.4g}".format, "{:.2f}".format


@dataclass(frozen=True)
class RecordedCall:
    """The calls of one op that have the same properties.

    Attributes:
        op: key of ``grasp.bench.workloads.OPS``. ``lowrank_linear_merged`` counts as the op of its low-rank members,
            ``lowrank_linear_grouped`` or ``lowrank_linear``, whose kernels it runs.
        shape: K inputs, N outputs and rank R of each linear as ``KxNrR``. ``+`` joins linears of one call. On a GPU
            ranks are those that the kernels read, which may be padded.
        form: ``factored``, ``pivoted``, or the form of each linear, joined by ``+``.
        rows: tokens per call, M.
        dtype: of inputs and factors, such as ``bfloat16``.
        device: type of the device, such as ``cpu``.
        captured: whether the calls were captured into a CUDA graph. Its replays are not counted.
        count: number of calls.
        weights: how the factors are quantised, as ``grasp.method.storage.parse_storages`` reads it; ``None`` if not.

    Example:
        >>> RecordedCall("lowrank_linear", "576x1536r41", "pivoted", 1, "bfloat16", "cpu", False, 270).count
        270
    """

    op: str
    shape: str
    form: str
    rows: int
    dtype: str
    device: str
    captured: bool
    count: int
    weights: str | None = None


@dataclass(frozen=True)
class Recording(Record):
    """The file of ``grasp bench record``: the calls of ops in a run.

    Attributes:
        processes: number of processes that called ops.
        calls: the calls, the most frequent first.

    Example:
        >>> Recording(processes=1, calls=()).to_dict()
        {'kind': 'workload', 'schema_version': 1, 'processes': 1, 'calls': ()}
    """

    processes: int
    calls: tuple[RecordedCall, ...]

    kind: ClassVar[str] = "workload"


@dataclass(frozen=True)
class WorkloadResult(Record):
    """The time of one provider for all calls of a recorded workload: the median of each call times its count, summed.

    Attributes:
        workload: name of the file.
        provider: as in ``OpResult``, or ``auto``: for each call the backend that ``auto`` chooses.
        calls: number of calls.
        different: number of different calls that were timed.
        total_ms: time of all calls, ms.
        floor_ms: least time of all calls, ms; ``None`` if one has no floor.
        share_of_floor: ``floor_ms`` over ``total_ms``.
        speedup_over_unfused: total of ``unfused`` over the total of this provider.
        speedup_over_dense: the same over ``dense``.
        conditions: when and where.

    Example:
        >>> [column.heading for column in WorkloadResult.columns[:2]]
        ['provider', 'total ms']
    """

    workload: str
    provider: str
    calls: int
    different: int
    total_ms: float
    floor_ms: float | None
    share_of_floor: float | None
    speedup_over_unfused: float
    speedup_over_dense: float
    conditions: Conditions

    kind: ClassVar[str] = "workload_total"
    title: ClassVar[str] = "A recorded workload"
    case: ClassVar[tuple[Column, ...]] = (
        Column("workload", "workload"),
        Column("calls", "calls"),
        Column("different calls", "different"),
        Column("threads", "conditions.threads"),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("provider", "provider"),
        Column("total ms", "total_ms", _significant),
        Column("floor ms", "floor_ms", _significant),
        Column("of floor", "share_of_floor", share),
        Column("× unfused", "speedup_over_unfused", _ratio),
        Column("× dense", "speedup_over_dense", _ratio),
    )
    legend: ClassVar[str] = (
        "A total is the sum over all calls of the median time; auto takes for each call the backend that auto chooses. "
        "A provider that was not timed for one of the calls has no total."
    )
