"""The report of ``benchmarks.gpu.check``: read from its file, compared with the targets, printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.check_runner import Line
from grasp.formatting import Column
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
    floor_us: float | None  # least time at the bandwidth and FLOP/s measured in this run, without launches
    flops_share: float | None  # fraction of the FLOP/s measured in this run
    speedup_over_unfused: float | None
    speedup_over_stacked: float | None
    speedup_over_dense: float | None
    calls: int  # in one graph, or one after the other
    host_us: float | None = None  # of the median, in calls from Python: the part before the host waits

    @property
    def title(self) -> str:
        """What was computed; providers of one title compete."""
        return f"{self.case} {self.shapes}, M = {self.rows}"


@dataclass(frozen=True)
class LeftOut:
    """A provider that was not timed, and the reason."""

    case: str
    rows: int
    provider: str
    reason: str
    wrong: bool = False  # it ran and its result was wrong


@dataclass
class Report:
    """All results in a file."""

    results: list[ProviderTime] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)  # all others, as they were written

    def of_kind(self, kind: str) -> list[Line]:
        """The other lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def sound(self) -> bool:
        """Whether something was timed, and nothing failed, hung or was wrong; a missed target is not a failure."""
        failed = any(line["kind"] in ("failed_test", "fault") or line.get("status") == "failed" for line in self.lines)
        return bool(self.results) and not failed and not any(left.wrong for left in self.left_out)


class Target(NamedTuple):
    """The least value wanted of the backends that ``"auto"`` runs on an H100."""

    name: str
    wanted: float
    applies: Callable[[ProviderTime], bool]
    value: str = "speedup_over_unfused"  # an attribute of ProviderTime

    def worst(self, results: Iterable[ProviderTime]) -> tuple[float, str] | None:
        """The worst measured value and what was computed; ``None`` if nothing was measured."""
        values = [(getattr(result, self.value), result.title) for result in results if self.applies(result)]
        return min((pair for pair in values if pair[0] is not None), default=None)


def _gradient(result: ProviderTime, *, full_rank: bool) -> bool:
    return result.case == "singular_value_grad" and result.rows >= 2048 and result.shapes.endswith("r4096") == full_rank


TARGETS = (
    Target("one linear, M <= 16, over two matmuls", 1.4, lambda r: r.case == "lowrank_linear" and r.rows <= 16),
    Target("a layer's seven linears, M = 1, over 14 matmuls", 1.7, lambda r: r.case == "layer" and r.rows == 1),
    Target("the same over 8 launches", 1.1, lambda r: r.case == "layer" and r.rows == 1, "speedup_over_stacked"),
    Target("low-rank linears at any M, over two matmuls", 0.97, lambda r: r.case in ("lowrank_linear", "layer")),
    Target(
        "gradient at R = 4096, T >= 2048, share of a matmul's FLOP/s",
        0.7,
        partial(_gradient, full_rank=True),
        "flops_share",
    ),
    Target("gradient at R <= 512, T >= 2048, over two matmuls and a sum", 0.95, partial(_gradient, full_rank=False)),
)
COLUMNS = (
    Column("provider", "provider"),
    Column("median µs", "median_us", "{:.2f}".format),
    Column("host µs", "host_us", "{:.2f}".format),
    Column("spread", "spread", "{:.0%}".format),
    Column("floor µs", "floor_us", "{:.2f}".format),
    Column("× unfused", "speedup_over_unfused", "{:.2f}".format),
    Column("× dense", "speedup_over_dense", "{:.2f}".format),
)
TEXTS = {  # by the kind of a line
    "launches": "launches: gap {gap_us} µs, dependent {dependent_gap_us} µs, ramp {ramp_us} µs of {programs} programs",
    "barrier": "barrier: {barrier_us} µs",
    "model": "model, {provider}: {tokens_per_s:.1f} tokens/s",
    "tests": "tests {arguments}: {passed_tests} passed, {failed_tests} failed",
    "failed_test": "FAILED: {test}: {reason}",
    "fault": "{how}: {provider} in {task}: {reason}",
    "failed": "not completed: {task}: {reason}",
}


def read_report(lines: Iterable[Line]) -> Report:
    """The report in the lines of ``check_runner.read_lines``."""
    report = Report()
    for line in lines:
        values = {name: value for name, value in line.items() if name not in ("kind", "task")}
        if line["kind"] == "time":
            report.results.append(ProviderTime(**values))
        elif line["kind"] == "left_out":
            report.left_out.append(LeftOut(**values))
        else:
            report.lines.append(line)
    return report


def chosen(report: Report) -> list[ProviderTime]:
    """The result of each case's first backend in the dispatch table, which ``"auto"`` runs."""
    order = [row.name for row in BACKENDS]
    backends = [result for result in report.results if result.provider in order]
    first: dict[str, ProviderTime] = {}
    for result in sorted(backends, key=lambda result: order.index(result.provider)):
        first.setdefault(result.title, result)
    return list(first.values())


def print_report(report: Report, console: Console) -> None:
    """Print all times, what failed and what was not measured, where dense linears are faster, and the targets."""
    for title, results in groupby(report.results, lambda result: result.title):
        table = Table(*(column.heading for column in COLUMNS), title=title, title_justify="left")
        for result in results:
            table.add_row(*(column.text_of(result) for column in COLUMNS))
        console.print(table)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for line in report.lines:
        kind = line["status"] if line["kind"] == "end" else line["kind"]
        if kind in TEXTS:
            say(TEXTS[kind].format(**line))
    for line in report.of_kind("state"):
        if line["gpu"] is not None and set(line["gpu"]["throttle_reasons"]) - {"idle", "application clocks"}:
            say(f"throttled: {line['task']}: {', '.join(line['gpu']['throttle_reasons'])}")
    for left in report.left_out:
        say(f"{'WRONG' if left.wrong else 'not measured'}: {left.provider} {left.case}, M = {left.rows}: {left.reason}")
    compared = chosen(report)
    for result in compared:
        if result.speedup_over_dense is not None and result.speedup_over_dense < 1:
            say(f"dense is faster: {result.title}: low-rank at {result.speedup_over_dense:.2f} of it")
    for target in TARGETS:
        worst = target.worst(compared)
        verdict = "not measured" if worst is None else "met" if worst[0] >= target.wanted else "missed"
        got = "" if worst is None else f" {worst[0]:.2f} at {worst[1]}"
        say(f"{verdict}: {target.name}:{got}, wanted {target.wanted}")
