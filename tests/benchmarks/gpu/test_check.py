from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

pytest.importorskip("triton")

import typer
from typer.testing import CliRunner

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import check_cases
from benchmarks.gpu.check import CheckPlan, check, full_plan, run_tests
from benchmarks.gpu.check_cases import CaseProvider, GpuCase, complaint, make_operands, providers
from benchmarks.gpu.check_report import (
    LeftOut,
    ProviderTime,
    PytestRun,
    Report,
    chosen,
    dense_wins,
    print_summary,
    targets,
)
from benchmarks.gpu.launch_costs import LaunchCosts, _read, measure_launches
from grasp.bench import timing
from grasp.bench.workloads import OPS, Problem
from grasp_kernels.shapes import parse_shape
from grasp_kernels.triton.launch import gpu_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SILENT = Console(quiet=True)
TINY = {
    "lowrank_linear": "48x32r5",
    "lowrank_linear_grouped": "48x32r5+48x32r5+48x16r3",
    "lowrank_glu": "48x32r5+48x32r4",
    "singular_value_grad": "48x32r5",
}


def tiny(op: str, rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> GpuCase:
    return GpuCase(op, ((op, parse_shape(TINY[op])),), rows, dtype)


LAYER = GpuCase(
    "layer",
    (("lowrank_linear_grouped", parse_shape("32x32r5+32x32r5")), ("lowrank_linear", parse_shape("32x48r4"))),
    2,
)
PLAN = CheckPlan([LAYER, *map(tiny, TINY)], [], (), seconds=600, rotate_bytes=0, repetitions=2, launches=2)


@pytest.fixture(scope="module")
def report() -> Report:
    patch = pytest.MonkeyPatch()
    patch.setattr(timing, "WARM_UP", 0.0)
    patch.setattr(timing, "CPU_BATCH", 0.0)
    patch.setattr(gpu_check, "measure_card", lambda *_: gpu_check.roofline.measured("tiny", flops=1e12, bandwidth=1e9))
    try:
        return check(PLAN, DEVICE, SILENT)
    finally:
        patch.undo()


def test_a_run_times_every_provider_of_every_case(report: Report) -> None:
    timed = {(result.case, result.provider) for result in report.results}
    paths = {"triton pair", "triton gemms"} | ({"triton fused"} if DEVICE.type == "cuda" else set())
    for case in PLAN.cases:
        wanted = {"triton", "unfused", "dense"}
        if case.name != "singular_value_grad":
            wanted |= paths - ({"triton fused"} if case.name == "lowrank_glu" else set())
        assert wanted <= {provider for name, provider in timed if name == case.name}
    assert ("layer", "stacked") in timed
    assert not any(line.wrong for line in report.not_measured)
    assert report.sound()


def test_results_carry_what_they_are_to_be_read_with(report: Report) -> None:
    assert report.conditions.commit is None or len(report.conditions.commit) == 40
    assert report.conditions.torch == torch.__version__
    assert set(report.configurations) == {"lowrank_linear", "lowrank_glu"}
    assert report.launches is not None
    assert report.launches.programs >= 1
    layer = {result.provider: result for result in report.results if result.case == "layer"}
    assert layer["unfused"].speedup_over_unfused == 1
    assert layer["dense"].shapes == "32x32r5+32x32r5 32x48r4"
    # At 1e9 bytes/s: weights, x and outputs of 2 bytes each.
    elements = 2 * (32 * 32 + 2 * (32 + 32)) + (32 * 48 + 2 * (32 + 48))
    assert layer["dense"].floor_us == pytest.approx(elements * 2 / 1e3, rel=0.1)
    assert all(result.median_us > 0 for result in report.results)


def test_a_report_is_json(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.as_dict()))
    content = json.loads(path.read_text())
    assert len(content["results"]) == len(report.results)
    assert [target["met"] for target in content["targets"]] == [target.met for target in report.targets]


def test_nothing_new_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    monkeypatch.setattr(gpu_check, "measure_card", lambda *_: gpu_check.roofline.measured("tiny", flops=1, bandwidth=1))
    late = check(replace(PLAN, seconds=0.0, compiled=[LAYER]), DEVICE, SILENT)
    assert late.results == []
    assert [(line.case, line.provider) for line in late.not_measured] == [
        *((case.name, "*") for case in PLAN.cases),
        ("layer", "torch.compile"),
    ]


@pytest.mark.parametrize("op", TINY)
def test_every_provider_of_an_op_is_right(op: str) -> None:
    case = tiny(op, rows=5, dtype=torch.float32)
    operands = make_operands(case, DEVICE, 0)
    for name, provider in providers(case, DEVICE)[0].items():
        assert complaint(case, provider, operands) is None, name


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_run(problem: Problem) -> list[Tensor]:
        return [1.1 * y for y in OPS["lowrank_linear"].unfused(problem)]

    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    found, _ = providers(tiny("lowrank_linear"), DEVICE)
    broken = {"triton": CaseProvider(lambda _: wrong_run), "unfused": found["unfused"]}
    monkeypatch.setattr(gpu_check, "providers", lambda *_: (broken, {}))
    card = gpu_check.roofline.measured("tiny", flops=1, bandwidth=1)
    lines = list(gpu_check.measure(tiny("lowrank_linear"), DEVICE, card, PLAN, with_compiled=False))
    assert [line.provider for line in lines if isinstance(line, ProviderTime)] == ["unfused"]
    (left,) = [line for line in lines if isinstance(line, LeftOut)]
    assert (left.provider, left.wrong) == ("triton", True)
    assert "relative error" in left.reason


def test_an_output_that_is_not_written_is_wrong() -> None:
    case = tiny("lowrank_linear")
    unwritten = CaseProvider(lambda _: lambda problem: [problem.x.new_empty(3, 32)])
    found = complaint(case, unwritten, make_operands(case, DEVICE, 0))
    assert found is not None
    assert "inf" in found
    assert not torch.are_deterministic_algorithms_enabled()


def test_operands_rotate_through_the_memory_asked_for() -> None:
    case = tiny("lowrank_linear")
    operands = make_operands(case, DEVICE, 100_000)
    factors = 5 * (48 + 32) * 2
    assert len(operands.low_rank) == -(-100_000 // factors)
    assert len(operands.dense) == -(-100_000 // (48 * 32 * 2))
    pointers = {problem.groups[0].U.data_ptr() for (problem,) in operands.low_rank}
    assert len(pointers) == len(operands.low_rank)


def test_launch_costs_are_measured() -> None:
    costs = measure_launches(DEVICE, calls=2, repetitions=2)
    assert costs.gap_us > 0
    assert costs.programs == (1 if DEVICE.type == "cpu" else costs.programs)
    assert (costs.dependent_gap_us is None) == (not gpu_of(DEVICE).dependent_launch)


def test_a_barrier_is_what_more_crossings_take_longer() -> None:
    medians = {"empty": 1.5, "reading": 2.25, "one crossing": 5.0, "more crossings": 5.0 + 32 * 1.25}
    assert _read(medians, 132) == LaunchCosts(1.5, None, 0.75, 1.25, 132)


def result(case: str, shapes: str, rows: int, provider: str = "triton", **changes: Any) -> ProviderTime:
    base = ProviderTime(
        case=case,
        shapes=shapes,
        rows=rows,
        dtype="bfloat16",
        provider=provider,
        median_us=1.0,
        spread=0.0,
        floor_us=1.0,
        flops_share=0.5,
        speedup_over_unfused=1.5,
        speedup_over_stacked=1.2,
        speedup_over_dense=2.0,
        calls=20,
    )
    return replace(base, **changes)


def test_a_target_is_the_worst_of_its_cases(report: Report) -> None:
    lines = [
        result("lowrank_linear", "4096x4096r204", 1, speedup_over_unfused=1.6),
        result("lowrank_linear", "4096x1024r81", 16, speedup_over_unfused=1.3, speedup_over_dense=0.8),
        result("lowrank_linear", "4096x4096r204", 8192, speedup_over_unfused=0.98),
        result("lowrank_linear", "4096x4096r204", 1, provider="triton pair", speedup_over_unfused=0.1),
        result("layer", "q", 1, speedup_over_unfused=1.9, speedup_over_stacked=1.2),
        result("singular_value_grad", "4096x4096r4096", 2048, flops_share=0.72),
        result("singular_value_grad", "4096x4096r4096", 512, flops_share=0.1),
        result("singular_value_grad", "4096x4096r512", 2048, speedup_over_unfused=0.9),
    ]
    found = targets(replace(report, results=lines))
    assert [(target.got, target.met) for target in found] == [
        (1.3, False),
        (1.9, True),
        (1.2, True),
        (0.98, True),
        (0.72, True),
        (0.9, False),
    ]
    assert found[0].where == "4096x1024r81, 16 rows"
    assert [line.shapes for line in dense_wins(replace(report, results=lines))] == ["4096x1024r81"]
    assert {target.met for target in targets(replace(report, results=[]))} == {None}


def test_what_counts_is_the_backend_that_auto_would_run(report: Report) -> None:
    slow = result("lowrank_linear", "4096x4096r204", 1, speedup_over_unfused=1.1)
    fast = replace(slow, provider="cuda", speedup_over_unfused=1.8)
    reference = replace(slow, provider="reference", rows=2)
    assert chosen(replace(report, results=[slow, fast, reference])) == [fast, reference]


def test_a_wrong_kernel_or_a_failed_test_is_a_failure_but_a_missed_target_is_not(report: Report) -> None:
    assert not replace(report, not_measured=[LeftOut("layer", 1, "triton", "off", wrong=True)]).sound()
    assert not replace(report, tests=PytestRun((), passed=False, summary="1 failed")).sound()
    assert replace(report, results=[result("layer", "q", 1, speedup_over_unfused=0.1)]).sound()


def test_the_summary_names_what_failed_what_is_missing_and_what_dense_wins(report: Report) -> None:
    console = Console(record=True, width=200, file=StringIO())
    lines = [result("lowrank_linear", "4096x1024r81", 1, speedup_over_dense=0.8)]
    left = [LeftOut("layer", 1, "triton", "off by 2", wrong=True), LeftOut("layer", 4, "*", "no time left")]
    changed = replace(report, results=lines, not_measured=left)
    changed.targets = targets(changed)
    print_summary(changed, console)
    text = console.export_text()
    assert "WRONG: triton layer, M = 1: off by 2" in text
    assert "not measured: * layer, M = 4: no time left" in text
    assert "dense is faster: lowrank_linear 4096x1024r81, M = 1: low-rank at 0.80 of it" in text
    assert "met: one linear, M <= 16, over two matmuls: 1.50 at 4096x1024r81, 1 rows, wanted 1.4" in text


def test_tests_run_in_a_process_of_their_own() -> None:
    passed = run_tests(["tests/ops/test_roofline.py", "-k", "by_hand"], 120)
    assert passed.passed
    assert "1 passed" in passed.summary


def test_a_failed_test_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 1, stdout="F..\n1 failed, 2 passed in 3.00s\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert run_tests(["tests"], 1) == PytestRun(["tests"], passed=False, summary="1 failed, 2 passed in 3.00s")


def test_tests_that_take_too_long_are_given_up() -> None:
    assert run_tests(["tests/ops/test_roofline.py"], 0.01) == PytestRun(
        ["tests/ops/test_roofline.py"], passed=False, summary="not done after 0 s"
    )


def test_the_full_plan_has_all_rows_of_the_targets() -> None:
    plan = full_plan(420)
    rows = {name: {case.rows for case in plan.cases if case.name == name} for name in (*TINY, "layer")}
    assert rows["layer"] == rows["lowrank_linear"] == {1, 4, 16, 64, 256, 2048, 8192}
    assert rows["singular_value_grad"] == {512, 2048, 8192}
    assert sum(len(shape) for _, shape in next(case for case in plan.cases if case.name == "layer").parts) == 7
    assert len({(case.name, case.label, case.rows) for case in plan.cases}) == len(plan.cases)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    app = typer.Typer()
    app.command()(gpu_check.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2
    assert "no CUDA GPU" in done.output


def test_the_stacked_form_is_two_launches_per_group_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LAYER
    (problem, _), *_ = make_operands(case, DEVICE, 0).low_rank
    calls: list[str] = []
    for name in ("linear", "bmm"):
        owner = check_cases.F if name == "linear" else torch
        function = getattr(owner, name)

        def counted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, counted)
    check_cases._stacked("lowrank_linear_grouped")(problem)
    assert calls == ["linear", "bmm"]
