"""What ``gpu.check`` found: lines of its JSON file, the targets, and how they are printed."""

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
class Result:
    """One provider's time in one case."""

    case: str
    shapes: str  # KxNrR of each linear, logical ranks
    rows: int
    dtype: str
    provider: str
    median_us: float
    spread: float  # distance between the quartiles, fraction of the median
    floor_us: float  # at the bandwidth and FLOP/s measured in this run; launches excluded
    flops_share: float  # of the FLOP/s measured in this run
    speedup_over_unfused: float
    speedup_over_stacked: float | None
    speedup_over_dense: float | None
    calls: int  # in one graph


@dataclass(frozen=True)
class NotMeasured:
    """What was left out, and why."""

    case: str
    rows: int
    provider: str
    reason: str
    wrong: bool = False  # it ran, and its result was not right


@dataclass(frozen=True)
class PytestRun:
    """What pytest said."""

    arguments: Sequence[str]
    passed: bool
    summary: str


@dataclass(frozen=True)
class Target:
    """A goal, and the worst case measured against it; ``None`` where none was."""

    name: str
    wanted: float
    got: float | None
    where: str | None

    @property
    def met(self) -> bool | None:
        """Whether it is reached."""
        return None if self.got is None else self.got >= self.wanted


@dataclass
class Report:
    """All of a run, as it is written."""

    conditions: Conditions
    configurations: dict[str, str]  # of the card: how many are measured, or why none is in use
    seconds: float = 0.0
    tests: PytestRun | None = None
    launches: LaunchCosts | None = None
    results: list[Result] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What is written: all of it, and whether each target is met."""
        return asdict(self) | {"targets": [asdict(target) | {"met": target.met} for target in self.targets]}

    def sound(self) -> bool:
        """Whether nothing failed: a target that is missed is a finding, not a failure."""
        return (self.tests is None or self.tests.passed) and not any(line.wrong for line in self.not_measured)


def chosen(report: Report) -> list[Result]:
    """For each case the backend that comes first in the dispatch table: what ``"auto"`` runs."""
    order = [row.name for row in BACKENDS]
    own = sorted(
        (each for each in report.results if each.provider in order), key=lambda each: order.index(each.provider)
    )
    first: dict[tuple[str, str, int], Result] = {}
    for result in own:
        first.setdefault((result.case, result.shapes, result.rows), result)
    return list(first.values())


def targets(report: Report) -> list[Target]:
    """What was aimed at on an H100, each with the worst case measured."""
    own = chosen(report)
    linear = [result for result in own if result.case == "lowrank_linear"]
    layer = [result for result in own if result.case == "layer"]
    long = [result for result in own if result.case == "singular_value_grad" and result.rows >= 2048]
    full = [result for result in long if result.shapes.endswith("r4096")]
    low = [result for result in long if result not in full]

    def worst(name: str, wanted: float, results: Sequence[Result], value: str = "speedup_over_unfused") -> Target:
        found = [(number, result) for result in results if (number := getattr(result, value)) is not None]
        if not found:
            return Target(name, wanted, None, None)
        number, result = min(found, key=lambda pair: pair[0])
        return Target(name, wanted, number, f"{result.shapes}, {result.rows} rows")

    return [
        worst("one linear, M <= 16, over two matmuls", 1.4, [result for result in linear if result.rows <= 16]),
        worst("a layer's seven linears, M = 1, over 14 matmuls", 1.7, [r for r in layer if r.rows == 1]),
        worst("the same over 8 launches", 1.1, [r for r in layer if r.rows == 1], "speedup_over_stacked"),
        worst("low-rank linears at any M, over two matmuls", 0.97, [*linear, *layer]),
        worst("gradient at R = 4096, T >= 2048, share of a matmul's FLOP/s", 0.7, full, "flops_share"),
        worst("gradient at R <= 512, T >= 2048, over two matmuls and a sum", 0.95, low),
    ]


def dense_wins(report: Report) -> list[Result]:
    """Where the package's own choice is slower than the dense linears."""
    return [
        result for result in chosen(report) if result.speedup_over_dense is not None and result.speedup_over_dense < 1
    ]


def print_case(results: Sequence[Result], console: Console) -> None:
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
    """What failed, what was left out, where dense linears are faster, and the targets."""
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
