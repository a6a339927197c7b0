"""Check all kernels on a GPU in one run of minutes: tests, launch costs, times, targets.

``python -m benchmarks.gpu.check`` writes one JSON file. Cases run in order of importance; when time is up, the rest is
listed as not measured.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.check_cases import CaseProvider, GpuCase, Operands, compiled, complaint, make_operands, providers
from benchmarks.gpu.check_report import LeftOut, ProviderTime, PytestRun, Report, print_case, print_summary, targets
from benchmarks.gpu.launch_costs import measure_launches
from grasp.bench.conditions import ROOT, conditions, measure_card
from grasp.bench.timing import Batch, batch, interleave
from grasp.bench.workloads import ATTENTION, DOWN, GATE_UP, GROUPED_QUERY, GROUPED_QUERY_QKV, MLP, QKV, WIDE_MLP
from grasp_kernels import launch_configs, roofline
from grasp_kernels.roofline import Card
from grasp_kernels.shapes import parse_shape
from grasp_kernels.triton.launch import gpu_of

ROWS = (1, 16, 64, 4, 256, 2048, 8192)  # in order of importance
LINEARS = (ATTENTION, MLP, GROUPED_QUERY, WIDE_MLP)
LAYER = (
    ("lowrank_linear_grouped", QKV),
    ("lowrank_linear", ATTENTION),
    ("lowrank_linear_grouped", GATE_UP),
    ("lowrank_linear", DOWN),
)
GRADIENTS = (ATTENTION, "4096x4096r512", "4096x4096r4096")
GRADIENT_ROWS = (2048, 8192, 512)
COMPILED_ROWS = (1, 16, 64)
TESTS_SHARE = 0.4  # largest fraction of the time that tests may take
NO_ROOM = "the GPU has too little shared memory for its configuration"


@dataclass(frozen=True)
class CheckPlan:
    """Cases and limits of one run."""

    cases: Sequence[GpuCase]
    compiled: Sequence[GpuCase]  # timed again with torch.compile, after all other cases
    tests: Sequence[str]  # pytest's arguments; no tests if empty
    seconds: float  # no case starts later
    rotate_bytes: int = 256 << 20  # more than any L2 cache
    repetitions: int = 20
    launches: int = 200  # launches in one graph, when launch costs are measured


def full_plan(seconds: float) -> CheckPlan:
    """The cases of the project's targets, the most important first."""

    def single(op: str, text: str, rows: int) -> GpuCase:
        return GpuCase(op, ((op, parse_shape(text)),), rows)

    layers = {rows: GpuCase("layer", tuple((op, parse_shape(text)) for op, text in LAYER), rows) for rows in ROWS}
    cases: list[GpuCase] = []
    for rows in ROWS:
        cases.append(layers[rows])
        cases += [single("lowrank_linear", text, rows) for text in LINEARS]
        cases += [single("lowrank_linear_grouped", GROUPED_QUERY_QKV, rows), single("lowrank_glu", GATE_UP, rows)]
        if rows == COMPILED_ROWS[-1]:
            cases += [single("singular_value_grad", text, T) for T in GRADIENT_ROWS for text in GRADIENTS]
    pairs = [case for rows in COMPILED_ROWS for case in (layers[rows], single("lowrank_linear", ATTENTION, rows))]
    return CheckPlan(cases, pairs, tests=("-m", "gpu", "tests"), seconds=seconds)


def check(plan: CheckPlan, device: torch.device, console: Console) -> Report:
    """Run a plan."""
    start = time.monotonic()
    dtype = plan.cases[0].dtype
    card = measure_card(device, dtype)
    gpu = gpu_of(device)
    report = Report(
        conditions(card, device),
        {kernel: launch_configs.status(kernel, gpu) for kernel in sorted(launch_configs.SOURCES)},
    )
    if plan.tests:
        report.tests = run_tests(plan.tests, TESTS_SHARE * plan.seconds)
        console.print(f"tests: {report.tests.summary}")
    report.launches = measure_launches(device, calls=plan.launches, repetitions=plan.repetitions)
    console.print(report.launches)
    for case, with_compiled in [*((case, False) for case in plan.cases), *((case, True) for case in plan.compiled)]:
        if time.monotonic() - start > plan.seconds:
            name = "torch.compile" if with_compiled else "*"
            report.not_measured.append(LeftOut(case.name, case.rows, name, "no time left"))
            continue
        lines = list(measure(case, device, card, plan, with_compiled=with_compiled))
        report.results += (results := [line for line in lines if isinstance(line, ProviderTime)])
        report.not_measured += [line for line in lines if isinstance(line, LeftOut)]
        if results:
            print_case(results, console)
    report.targets = targets(report)
    report.seconds = time.monotonic() - start
    return report


@torch.inference_mode()
def measure(
    case: GpuCase, device: torch.device, card: Card, plan: CheckPlan, *, with_compiled: bool
) -> Iterator[ProviderTime | LeftOut]:
    """Check and time one case; ``with_compiled`` compares ``torch.compile`` with the unfused form and the backends."""
    candidates, reasons = providers(case, device)
    if with_compiled:
        candidates = {
            name: provider
            for name, provider in candidates.items()
            if not name.startswith("triton ") and name != "dense"
        }
        candidates["torch.compile"] = compiled(case)
    else:
        for name, reason in reasons.items():
            yield LeftOut(case.name, case.rows, name, reason)
    operands = make_operands(case, device, plan.rotate_bytes)
    batches: dict[str, Batch] = {}
    for name, provider in candidates.items():
        prepared = _prepare(case, provider, operands, device)
        if isinstance(prepared, str):
            wrong = not prepared.startswith(NO_ROOM)
            yield LeftOut(case.name, case.rows, name, prepared, wrong)
        else:
            batches[name] = prepared
    yield from _time(case, batches, card, plan.repetitions)


def _prepare(case: GpuCase, provider: CaseProvider, operands: Operands, device: torch.device) -> Batch | str:
    """A batch to be timed, or the reason why it is not: wrong results are not timed."""
    try:
        error = complaint(case, provider, operands) if provider.of_package else None
        return error or batch(device, provider.calls(case), operands.rotation(provider.reads))
    except OutOfResources as shortage:
        return f"{NO_ROOM}: {shortage}"


def _time(case: GpuCase, batches: dict[str, Batch], card: Card, repetitions: int) -> Iterator[ProviderTime]:
    samples = interleave(batches, repetitions)
    flops = sum(cost.flops for cost in case.costs())
    for name, sample in samples.items():
        speedups = {
            other: sample.speedup_over(samples[other]) if other in samples else None
            for other in ("unfused", "stacked", "dense")
        }
        assert speedups["unfused"] is not None
        costs = case.dense_costs() if name == "dense" and case.name != "singular_value_grad" else case.costs()
        yield ProviderTime(
            case=case.name,
            shapes=case.label,
            rows=case.rows,
            dtype=str(case.dtype).removeprefix("torch."),
            provider=name,
            median_us=sample.median * 1e6,
            spread=sample.spread,
            floor_us=roofline.floor(card, *costs) * 1e6,
            flops_share=flops / sample.median / card.flops,
            speedup_over_unfused=speedups["unfused"],
            speedup_over_stacked=speedups["stacked"],
            speedup_over_dense=speedups["dense"],
            calls=batches[name].calls,
        )


def run_tests(arguments: Sequence[str], seconds: float) -> PytestRun:
    """Run pytest on the checkout in a new process, for at most ``seconds``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return PytestRun(arguments, passed=False, summary=f"not done after {seconds:.0f} s")
    lines = [
        line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)|no tests", line)
    ]
    return PytestRun(arguments, done.returncode == 0, lines[-1] if lines else (done.stderr or done.stdout)[-500:])


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path("gpu-check.json"),
    seconds: Annotated[float, typer.Option(min=1, help="No case starts later.")] = 420,
    tests: Annotated[bool, typer.Option(help="Run the tests that need a GPU.")] = True,
) -> None:
    """Test and time all kernels on this machine's GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("found no CUDA GPU; run the check on a machine with one")
    plan = full_plan(seconds) if tests else replace(full_plan(seconds), tests=())
    console = Console(width=160)
    report = check(plan, torch.device("cuda", 0), console)
    output.write_text(json.dumps(report.as_dict(), indent=1))
    print_summary(report, console)
    raise typer.Exit(0 if report.sound() else 1)


if __name__ == "__main__":
    typer.run(main)
