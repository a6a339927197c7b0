"""The report of ``benchmarks.gpu.check``: read from its file, compared with the targets, printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.check_runner import Line
from benchmarks.gpu.launch_costs import LaunchCosts
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.roofline import Card


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
    floor_us: float | None  # least time at the bandwidth and FLOP/s measured in this run, without launches
    flops_share: float | None  # fraction of the FLOP/s measured in this run
    speedup_over_unfused: float | None
    speedup_over_stacked: float | None
    speedup_over_dense: float | None
    calls: int  # in one graph, or one after the other
    host_us: float | None = None  # of the median, in calls from Python: the part before the host waits


@dataclass(frozen=True)
class LeftOut:
    """A provider that was not timed, and the reason."""

    case: str
    rows: int
    provider: str
    reason: str
    wrong: bool = False  # it ran and its result was wrong


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
    """All results in a file. Lines without a class of their own are as they were written."""

    card: Card | None = None
    conditions: dict[str, Any] | None = None
    configurations: dict[str, str] = field(default_factory=dict)
    launches: LaunchCosts | None = None
    barrier_us: float | None = None
    results: list[ProviderTime] = field(default_factory=list)
    not_measured: list[LeftOut] = field(default_factory=list)
    models: list[Line] = field(default_factory=list)
    tests: list[Line] = field(default_factory=list)  # one per file
    failed_tests: list[Line] = field(default_factory=list)
    faults: list[Line] = field(default_factory=list)  # processes that crashed or hung
    states: list[Line] = field(default_factory=list)  # seconds of each process, clocks and power while it ran
    failed: list[Line] = field(default_factory=list)  # tasks without all of their results

    def sound(self) -> bool:
        """Whether nothing failed, hung or was wrong; a missed target is not a failure."""
        wrong = any(line.wrong for line in self.not_measured)
        return not (wrong or self.failed_tests or self.faults or self.failed)


def read_report(lines: Iterable[Line]) -> Report:
    """The report in the lines of ``check_runner.read_lines``."""
    report = Report()
    lists = {"model": report.models, "tests": report.tests, "failed_test": report.failed_tests, "fault": report.faults}
    lists["state"] = report.states
    for line in lines:
        kind = line["kind"]
        values = {name: value for name, value in line.items() if name not in ("kind", "task")}
        if kind == "card":
            report.card, report.conditions = Card(**values["card"]), values["conditions"]
        elif kind == "configurations":
            report.configurations = values["configurations"]
        elif kind == "launches":
            report.launches = LaunchCosts(**values)
        elif kind == "barrier":
            report.barrier_us = values["barrier_us"]
        elif kind == "time":
            report.results.append(ProviderTime(**values))
        elif kind == "left_out":
            report.not_measured.append(LeftOut(**values))
        elif kind == "end" and line["status"] == "failed":
            report.failed.append(line)
        elif kind in lists:
            lists[kind].append(line)
    return report


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


def print_report(report: Report, console: Console) -> None:
    """Print all times, what failed and what was not measured, where dense linears are faster, and the targets."""
    groups: dict[tuple[str, str, int], list[ProviderTime]] = {}
    for result in report.results:
        groups.setdefault((result.case, result.shapes, result.rows), []).append(result)
    for results in groups.values():
        _print_case(results, console)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if report.launches is not None:
        say(f"launches: {report.launches}, barrier: {report.barrier_us} µs")
    for line in report.models:
        say(f"model, {line['provider']}: {line['tokens_per_s']:.1f} tokens/s")
    for line in report.tests:
        say(f"tests {' '.join(line['arguments'])}: {line['passed_tests']} passed, {line['failed_tests']} failed")
    for line in report.failed_tests:
        say(f"FAILED: {line['test']}: {line['reason']}")
    for line in report.faults:
        say(f"{line['how'].upper()}: {line['provider'] or 'no provider'} in {line['task']}: {line['reason']}")
    for line in report.failed:
        say(f"not completed: {line['task']}: {line['reason']}")
    for line in report.states:
        if line["gpu"] is not None and set(line["gpu"]["throttle_reasons"]) - {"idle", "application clocks"}:
            say(f"throttled: {line['task']}: {', '.join(line['gpu']['throttle_reasons'])}")
    for left in report.not_measured:
        say(f"{'WRONG' if left.wrong else 'not measured'}: {left.provider} {left.case}, M = {left.rows}: {left.reason}")
    for result in dense_wins(report):
        where = f"{result.case} {result.shapes}, M = {result.rows}"
        say(f"dense is faster: {where}: low-rank at {result.speedup_over_dense:.2f} of it")
    for target in targets(report):
        word = {True: "met", False: "missed", None: "not measured"}[target.met]
        got = "" if target.got is None else f" {target.got:.2f} at {target.where}"
        say(f"{word}: {target.name}:{got}, wanted {target.wanted}")


def _print_case(results: Sequence[ProviderTime], console: Console) -> None:
    """One line per provider of a case."""
    first = results[0]
    table = Table(title=f"{first.case} {first.shapes}, M = {first.rows}", title_justify="left")
    for heading in ("provider", "median µs", "host µs", "spread", "floor µs", "× unfused", "× dense"):
        table.add_column(heading)
    for result in results:
        numbers = (result.median_us, result.host_us, None, result.floor_us)
        cells = ["" if number is None else f"{number:.2f}" for number in numbers]
        cells[2] = f"{result.spread:.0%}"
        ratios = (result.speedup_over_unfused, result.speedup_over_dense)
        table.add_row(result.provider, *cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
