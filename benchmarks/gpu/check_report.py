"""The report of ``benchmarks.gpu.check``: its JSON file, the targets, the printed summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.launch_costs import LaunchCosts
from grasp.bench.conditions import Conditions
from grasp_kernels.dispatch import BACKENDS


@dataclass(frozen=True)
class ProviderTime:
    """One provider's time in one case."""

    case: str
    shapes: str  # KxNrR of each linear, ranks before padding
    rows: int
    dtype: str
    provider: str
    median_us: float
    spread: float  # distance between the quartiles, fraction of the median
    floor_us: float  # least time at the bandwidth and FLOP/s measured in this run, without launches
    flops_share: float  # fraction of the FLOP/s measured in this run
    speedup_over_unfused: float
    speedup_over_stacked: float | None
    speedup_over_dense: float | None
    calls: int  # in one graph


@dataclass(frozen=True)
class LeftOut:
    """A provider that was not timed, and the reason."""

    case: str
    rows: int
    provider: str
    reason: str
    wrong: bool = False  # it ran and its result was wrong


@dataclass(frozen=True)
class PytestRun:
    """The outcome of pytest."""

    arguments: Sequence[str]
    passed: bool
    summary: str


@dataclass(frozen=True)
class SpeedTarget:
    """A target with its worst measured case; ``None`` if no case was measured."""

    name: str
    wanted: float
    got: float | None
    where: str | None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached."""
        return None if self.got is None else self.got >= self.wanted


@dataclass
class Report:
    """All results of a run."""

    conditions: Conditions
    configurations: dict[str, str]  # by kernel: number of configurations measured for this GPU, or why none is used
    seconds: float = 0.0
    tests: PytestRun | None = None
    launches: LaunchCosts | None = None
    results: list[ProviderTime] = field(default_factory=list)
    not_measured: list[LeftOut] = field(default_factory=list)
    targets: list[SpeedTarget] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return asdict(self) | {"targets": [asdict(target) | {"met": target.met} for target in self.targets]}

    def sound(self) -> bool:
        """Whether tests passed and no result was wrong; a missed target is not a failure."""
        return (self.tests is None or self.tests.passed) and not any(line.wrong for line in self.not_measured)


def chosen(report: Report) -> list[ProviderTime]:
    """The result of each case's first backend in the dispatch table, which ``"auto"`` runs."""
    order = [row.name for row in BACKENDS]
    backends = [result for result in report.results if result.provider in order]
    first: dict[tuple[str, str, int], ProviderTime] = {}
    for result in sorted(backends, key=lambda result: order.index(result.provider)):
        first.setdefault((result.case, result.shapes, result.rows), result)
    return list(first.values())


def targets(report: Report) -> list[SpeedTarget]:
    """The targets for an H100, each with its worst measured case."""
    results = chosen(report)
    linear = [result for result in results if result.case == "lowrank_linear"]
    layer = [result for result in results if result.case == "layer"]
    long = [result for result in results if result.case == "singular_value_grad" and result.rows >= 2048]
    full = [result for result in long if result.shapes.endswith("r4096")]
    low = [result for result in long if result not in full]

    def worst(
        name: str, wanted: float, results: Sequence[ProviderTime], value: str = "speedup_over_unfused"
    ) -> SpeedTarget:
        numbers = [(number, result) for result in results if (number := getattr(result, value)) is not None]
        if not numbers:
            return SpeedTarget(name, wanted, None, None)
        number, result = min(numbers, key=lambda pair: pair[0])
        return SpeedTarget(name, wanted, number, f"{result.shapes}, {result.rows} rows")

    return [
        worst("one linear, M <= 16, over two matmuls", 1.4, [result for result in linear if result.rows <= 16]),
        worst("a layer's seven linears, M = 1, over 14 matmuls", 1.7, [r for r in layer if r.rows == 1]),
        worst("the same over 8 launches", 1.1, [r for r in layer if r.rows == 1], "speedup_over_stacked"),
        worst("low-rank linears at any M, over two matmuls", 0.97, [*linear, *layer]),
        worst("gradient at R = 4096, T >= 2048, share of a matmul's FLOP/s", 0.7, full, "flops_share"),
        worst("gradient at R <= 512, T >= 2048, over two matmuls and a sum", 0.95, low),
    ]


def dense_wins(report: Report) -> list[ProviderTime]:
    """Results of ``chosen`` that are slower than the dense linears."""
    return [
        result for result in chosen(report) if result.speedup_over_dense is not None and result.speedup_over_dense < 1
    ]


def print_case(results: Sequence[ProviderTime], console: Console) -> None:
    """One line per provider of a case."""
    first = results[0]
    table = Table(title=f"{first.case} {first.shapes}, M = {first.rows}", title_justify="left")
    for heading in ("provider", "median µs", "spread", "floor µs", "× unfused", "× dense"):
        table.add_column(heading)
    for result in results:
        dense = "" if result.speedup_over_dense is None else f"{result.speedup_over_dense:.2f}"
        numbers = (f"{result.median_us:.2f}", f"{result.spread:.0%}", f"{result.floor_us:.2f}")
        table.add_row(result.provider, *numbers, f"{result.speedup_over_unfused:.2f}", dense)
    console.print(table)


def print_summary(report: Report, console: Console) -> None:
    """Print failures, what was not measured, where dense linears are faster, and the targets."""
    for line in report.not_measured:
        word = "WRONG" if line.wrong else "not measured"
        console.print(f"{word}: {line.provider} {line.case}, M = {line.rows}: {line.reason}", highlight=False)
    for result in dense_wins(report):
        where = f"{result.case} {result.shapes}, M = {result.rows}"
        console.print(f"dense is faster: {where}: low-rank at {result.speedup_over_dense:.2f} of it", highlight=False)
    for target in report.targets:
        word = {True: "met", False: "missed", None: "not measured"}[target.met]
        got = "" if target.got is None else f" {target.got:.2f} at {target.where}"
        console.print(f"{word}: {target.name}:{got}, wanted {target.wanted}", highlight=False)
