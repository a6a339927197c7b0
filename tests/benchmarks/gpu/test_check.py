from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from torch import Tensor

pytest.importorskip("triton")

import typer
from triton import OutOfResources

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import check_cases, check_model, check_tasks, launch_costs
from benchmarks.gpu.check import CheckPlan, check, full_plan, pivoted, quantized, require_same, unpacked
from benchmarks.gpu.check_cases import CaseProvider, GpuCase, complaint, make_operands, providers
from benchmarks.gpu.check_report import TARGETS, LeftOut, ProviderTime, Report, chosen, print_report, read_report
from benchmarks.gpu.check_runner import ROOT, Line, Task, read_lines
from benchmarks.gpu.check_tasks import NO_MEMORY, NO_ROOM
from grasp.bench import conditions
from grasp.bench.workloads import OPS, Problem
from grasp_kernels import launch_configs
from grasp_kernels.launch_configs import Config
from grasp_kernels.triton.launch import gpu_of
from speedgate import timing
from tests.command_line import run_script

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {
    "lowrank_linear": "48x32r5",
    "lowrank_linear_grouped": "48x32r5+48x32r5+48x16r3",
    "lowrank_glu": "48x32r5+48x32r4",
    "singular_value_grad": "48x32r5",
}


def tiny(op: str, rows: int = 3, dtype: str = "bfloat16") -> GpuCase:
    return GpuCase(op, ((op, TINY[op]),), rows, dtype)


LAYER = GpuCase("layer", (("lowrank_linear_grouped", "32x32r5+32x32r5"), ("lowrank_linear", "32x48r4")), 2)
CASES = [LAYER, *map(tiny, TINY), unpacked(tiny("lowrank_linear")), unpacked(LAYER), pivoted(LAYER)]
CASES.append(pivoted(tiny("lowrank_glu")))
CARD = {"name": "tiny", "flops": 1e12, "bandwidth": 1e9}
SETTINGS: dict[str, Any] = {"card": CARD, "rotate_bytes": 0, "repetitions": 2}


def emitted(function: Callable[..., None], **arguments: Any) -> list[Line]:
    """The lines of a task that is run in this process."""
    lines: list[Line] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(timing, "WARM_UP", 0.0)
    patch.setattr(timing, "CPU_BATCH", 0.0)
    patch.setattr(check_tasks, "EAGER_CALLS", 2)
    try:
        function(lines.append, **arguments)
    finally:
        patch.undo()
    return lines


def measured(*cases: GpuCase, **changes: Any) -> Report:
    runs = (emitted(check_tasks.measure, case=asdict(case), **SETTINGS | changes) for case in cases)
    return read_report(line for lines in runs for line in lines)


def test_a_run_times_every_provider_of_every_case() -> None:
    report = measured(*CASES)
    timed = {(result.case, result.provider) for result in report.results}
    for case in CASES:
        wanted = {"triton", "unfused", "dense"}
        if case.name != "singular_value_grad":
            wanted |= {"triton pair", "triton gemms"}
        found = {provider for name, provider in timed if name == case.name}
        assert wanted <= found
        assert "triton fused" not in found  # it has a barrier
    assert ("layer", "stacked") in timed
    assert report.sound()
    layer = {result.provider: result for result in report.results if result.case == "layer"}
    assert layer["unfused"].speedup_over_unfused == 1
    assert layer["dense"].shapes == "32x32r5+32x32r5 32x48r4"
    # At 1e9 bytes/s: weights, x and outputs of 2 bytes each.
    elements = 2 * (32 * 32 + 2 * (32 + 32)) + (32 * 48 + 2 * (32 + 48))
    assert layer["dense"].floor_us == pytest.approx(elements * 2 / 1e3, rel=0.1)
    assert all(result.median_us > 0 for result in report.results)


@pytest.mark.parametrize("storage", ["int8", "int4/64"])
@pytest.mark.parametrize("form", [tiny("lowrank_linear"), pivoted(tiny("lowrank_linear"))], ids=lambda case: case.name)
def test_quantised_factors_are_checked_and_timed(form: GpuCase, storage: str) -> None:
    case = quantized(form, storage)
    report = measured(case)
    assert {"triton", "dense"} <= {result.provider for result in report.results}
    assert report.sound()
    (quarter,), (floating,) = case.costs(), form.costs()
    numbers, rows = (5 * (48 + 32 - 5 * form.pivoted), 32 - 5 * form.pivoted + 5)
    saved = numbers * 2 - numbers * (1 if storage == "int8" else 0.5) - 2 * rows
    assert floating.bytes - quarter.bytes == pytest.approx(saved, abs=rows)  # int4 of odd depth take half a byte more
    assert quarter.flops == floating.flops


def test_unpacked_factors_keep_their_ranks() -> None:
    for case, rank in ((tiny("lowrank_linear"), 16), (unpacked(tiny("lowrank_linear")), 5)):
        assert make_operands(case, DEVICE, 0).low_rank[0][0].groups[0].U.stride(0) == rank


def test_calls_from_python_have_their_host_time() -> None:
    results = {result.provider: result for result in measured(LAYER, kind="eager", without=["dense"]).results}
    assert set(results) >= {"auto", "triton", "unfused"}
    assert "dense" not in results
    for result in results.values():
        assert result.host_us is not None
        assert 0 < result.host_us <= result.median_us
        assert result.case == "layer, eager"  # no case of the targets


def test_compiled_ops_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, modes = torch.compile, []

    def traced(module: Callable[..., Any], *, fullgraph: bool, dynamic: bool, mode: str | None) -> Callable[..., Any]:
        modes.append(mode)
        return compile_(module, fullgraph=fullgraph, dynamic=dynamic, backend="eager")  # code takes seconds

    monkeypatch.setattr(torch, "compile", traced)
    found = measured(tiny("lowrank_linear", dtype="float32"), kind="eager", without=["triton"])
    assert {"torch.compile", "torch.compile reduce-overhead"} <= {result.provider for result in found.results}
    assert modes == [None, "reduce-overhead"]
    assert found.sound()


def test_the_pair_has_blocks_of_its_own_where_matrix_products_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Config] = []
    monkeypatch.setattr(check_cases.lowrank_linear, "run", lambda x, groups, config: used.append(config) or [])
    (problem,) = make_operands(tiny("lowrank_linear", 256), DEVICE, 0).low_rank[0]
    check_cases._on_path("pair", "lowrank_linear")(problem)
    assert used[0].path == "pair"
    assert used[0].block_m < launch_configs.MATRIX_PRODUCTS.block_m


def test_a_model_is_timed_eagerly_and_with_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_model, "_generate", lambda *_: 7.0)  # compiling takes a minute
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {**sizes, "num_hidden_layers": 1, "vocab_size": 64}
    lines = emitted(check_model.eager, config=config, retain_ratio=0.5, new_tokens=2)
    for ratio in (0.5, None):
        lines += emitted(check_model.static_cache, config=config, retain_ratio=ratio)
    models = read_report(lines).of_kind("model")
    names = [line["provider"] for line in models]
    assert names == ["dense", "unfused", "low-rank", "low-rank, static cache", "dense, static cache"]
    assert all(line["tokens_per_s"] > 0 for line in models)


@pytest.mark.slow
def test_a_whole_run_in_processes_is_read_back_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"case": asdict(tiny("lowrank_linear")), "card": CARD, "rotate_bytes": 0, "repetitions": 1}
    bad = Task("bad", "tests.benchmarks.gpu.planted:task", {"providers": ["illegal access", "good"]}, 60)
    tests = Task("tests", "tests.benchmarks.gpu.planted:task", {"providers": ["hang", "printing"]}, 1)
    monkeypatch.setattr(gpu_check, "PRELOAD", ())  # importing takes seconds
    monkeypatch.setattr(gpu_check, "CARD", Task("card", "tests.benchmarks.gpu.planted:card", {"card": CARD}, 60))
    tiny_plan = CheckPlan([Task("times", f"{gpu_check.TASKS}:measure", case, 60)], [tests], [bad])
    monkeypatch.setattr(gpu_check, "full_plan", lambda _: tiny_plan)
    path, console = tmp_path / "lines", Console(file=StringIO())
    check(path, 600, console)
    found = read_report(read_lines(path))
    assert found.of_kind("card")
    assert {"triton", "unfused", "dense"} <= {result.provider for result in found.results}
    assert [line["provider"] for line in found.of_kind("fault")] == ["hang", "illegal access"]
    assert not found.sound()
    before = path.read_text()
    check(path, 600, console)
    assert path.read_text() == before
    assert "crash: illegal access in bad: " in printed(found)


def test_failed_tests_are_named_and_tests_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pass\n")
    arguments = [f"--rootdir={tmp_path}", "-c", "/dev/null", str(file)]
    lines = emitted(check_tasks.pytest_file, arguments=arguments)
    found = read_report(lines)
    assert [line["provider"] for line in found.of_kind("step")] == [f"test_planted.py::test_{c}" for c in "abc"]
    assert [line["test"] for line in found.of_kind("failed_test")] == ["test_planted.py::test_b"]
    assert (lines[-1]["passed_tests"], lines[-1]["failed_tests"]) == (2, 1)
    lines = emitted(check_tasks.pytest_file, arguments=arguments, without=["test_planted.py::test_b"])
    assert lines[-1]["failed_tests"] == 0


def test_a_test_that_breaks_the_gpu_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=poison))
    file = tmp_path / "test_breaking.py"
    file.write_text("def test_a(): assert False\ndef test_b(): pass\n")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        emitted(check_tasks.pytest_file, arguments=[f"--rootdir={tmp_path}", "-c", "/dev/null", str(file)])


def test_the_speeds_of_a_gpu_are_those_of_graphs_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's clock would add the time of a launch and of a synchronisation to every call."""
    graph = Mock(seconds=Mock(side_effect=[5.0, 2.0, 3.0, 4.0, 5.0]))
    monkeypatch.setattr(conditions, "batch", lambda *_: graph)
    assert conditions._best(torch.device("cuda"), lambda: None) == 2.0


def test_pytest_that_cannot_run_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="USAGE_ERROR"):
        emitted(check_tasks.pytest_file, arguments=[str(tmp_path / "test_missing.py")])


def test_a_file_of_another_commit_or_gpu_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    require_same(path, {"gpu": "H100", "commit": "a"})
    with path.open("a") as file:
        file.write('{"kind": "sta')  # a kill while it was written
    require_same(path, {"gpu": "H100", "commit": "a"})
    with pytest.raises(typer.BadParameter, match="choose another file"):
        require_same(path, {"gpu": "H100", "commit": "b"})


@pytest.mark.parametrize("op", TINY)
def test_every_provider_of_an_op_is_right(op: str) -> None:
    case = tiny(op, rows=5, dtype="float32")
    operands = make_operands(case, DEVICE, 0)
    for name, provider in providers(case, DEVICE)[0].items():
        assert complaint(case, provider, operands) is None, name


def wrong(problem: Problem) -> list[Tensor]:
    return [1.1 * y for y in OPS["lowrank_linear"].unfused(problem)]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong, "lowrank_linear: relative error"),
        (Mock(side_effect=torch.OutOfMemoryError("2 GiB")), NO_MEMORY),
        (Mock(side_effect=OutOfResources(9, 8, "shared")), NO_ROOM),
    ],
    ids=["wrong", "no memory", "no room"],
)
def test_a_provider_that_is_wrong_or_has_no_room_is_left_out(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[Problem], list[Tensor]], reason: str
) -> None:
    able = {"triton": CaseProvider(lambda _: run), "unfused": check_cases.UNFUSED}
    monkeypatch.setitem(check_cases.PROVIDERS, "graph", lambda *_: (able, {}))
    report = measured(tiny("lowrank_linear"))
    assert [line.provider for line in report.results] == ["unfused"]
    (left,) = report.left_out
    assert left.reason.startswith(reason)
    assert (left.provider, left.wrong) == ("triton", run is wrong)


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
    (costs,) = emitted(check_tasks.launches, calls=2, repetitions=2)
    assert costs["gap_us"] > 0
    assert (costs["dependent_gap_us"] is None) == (not gpu_of(DEVICE).dependent_launch)
    (line,) = emitted(check_tasks.barrier, calls=2, repetitions=2)
    assert line["barrier_us"] is not None


def test_a_barrier_is_what_more_crossings_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_costs, "_medians", lambda *_: {"one": 5.0, "more": 5.0 + 32 * 1.25})
    assert launch_costs.measure_barrier(DEVICE) == 1.25


BASE = ProviderTime("", "4096x4096r204", 1, "bfloat16", "triton", 1.0, 0.0, 1.0, 0.5, 1.5, 1.2, 2.0, calls=20)


def result(case: str, shapes: str, rows: int, **changes: Any) -> ProviderTime:
    return replace(BASE, case=case, shapes=shapes, rows=rows, **changes)


def printed(report: Report) -> str:
    console = Console(record=True, width=200, file=StringIO())
    print_report(report, console)
    return console.export_text()


def test_a_target_is_the_worst_of_its_cases() -> None:
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
    worst = [target.worst(chosen(Report(lines))) for target in TARGETS]
    assert [value and value[0] for value in worst] == [1.3, 1.9, 1.2, 0.98, 0.72, 0.9]
    assert worst[0] == (1.3, "lowrank_linear 4096x1024r81, M = 16")
    text = printed(Report(lines))
    assert (
        "missed: one linear, M <= 16, over two matmuls: 1.30 at lowrank_linear 4096x1024r81, M = 16, wanted 1." in text
    )
    assert "met: the same over 8 launches: 1.20 at layer q, M = 1, wanted 1.1" in text
    assert "dense is faster: lowrank_linear 4096x1024r81, M = 16: low-rank at 0.80 of it" in text
    assert printed(Report()).count("not measured: ") == len(TARGETS)


def test_what_counts_is_the_backend_that_auto_would_run() -> None:
    slow = result("lowrank_linear", "4096x4096r204", 1, speedup_over_unfused=1.1)
    fast = replace(slow, provider="cuda", speedup_over_unfused=1.8)
    reference = replace(slow, provider="reference", rows=2)
    assert chosen(Report([slow, fast, reference])) == [fast, reference]


def test_a_wrong_kernel_or_a_failed_test_is_a_failure_but_a_missed_target_is_not() -> None:
    assert not Report(left_out=[LeftOut("layer", 1, "triton", "off", wrong=True)]).sound()
    for line in ({"kind": "failed_test"}, {"kind": "fault"}, {"kind": "end", "status": "failed"}):
        assert not Report([result("layer", "q", 1)], lines=[line]).sound()
    assert not Report().sound()  # nothing was timed
    end = {"kind": "end", "status": "done"}
    assert Report([result("layer", "q", 1, speedup_over_unfused=0.1)], lines=[end]).sound()


def test_the_summary_names_what_failed_and_what_is_missing() -> None:
    left = [LeftOut("layer", 1, "triton", "off by 2", wrong=True), LeftOut("layer", 4, "*", "no time left")]
    gpus = {"model": {"throttle_reasons": ["idle", "power cap"]}, "card": None}
    lines = [{"kind": "state", "task": task, "seconds": 3.0, "gpu": gpu} for task, gpu in gpus.items()]
    lines.append({"kind": "end", "status": "failed", "task": "launches", "reason": "SIGSEGV"})
    text = printed(Report(left_out=left, lines=lines))
    assert "WRONG: triton layer, M = 1: off by 2" in text
    assert "not measured: * layer, M = 4: no time left" in text
    assert "throttled: model: idle, power cap" in text
    assert "not completed: launches: SIGSEGV" in text


def test_the_full_plan_has_all_rows_of_the_targets() -> None:
    tasks = full_plan(CARD).tasks()
    timed = [GpuCase(**t.arguments["case"]) for t in tasks if t.arguments.get("kind") == "graph"]
    rows = {name: {case.rows for case in timed if case.name == name} for name in (*TINY, "layer")}
    assert rows["layer"] == rows["lowrank_linear"] == {1, 4, 16, 64, 256, 2048, 8192}
    assert rows["singular_value_grad"] == {512, 2048, 8192}
    assert sum(len(shape) for _, shape in next(case for case in timed if case.name == "layer").parts) == 7
    assert len({task.key for task in tasks}) == len(tasks)
    assert {"model", "model, static cache", "launches"} < {task.key for task in tasks}


def test_barriers_come_after_everything_that_matters() -> None:
    keys = [task.key.split(":")[0] for task in full_plan(CARD).tasks()]
    first = keys.index("barrier")
    assert set(keys[first:]) == {"barrier", "dense model, static cache", "compiled"}
    assert not {"barrier", "compiled"} & set(keys[:first])
    assert set(check_cases.PROVIDERS["barrier"](LAYER, DEVICE)[0]) == {"triton fused", "unfused"}


def test_the_tests_of_all_triton_kernels_are_run_on_a_gpu() -> None:
    kernels = ("triton_lowrank", "ops_lowrank_linear", "ops_lowrank_glu", "ops_singular_value_grad", "cuda_card")
    assert {f"tests/ops/test_{name}.py" for name in kernels} < set(gpu_check.gpu_tests())
    assert "tests/ops/test_roofline.py" not in gpu_check.gpu_tests()


def test_the_tests_of_a_gpu_are_selected_by_their_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter of the ops' tests, as on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = runpy.run_path(str(ROOT / "tests/ops/inputs.py"))["DEVICES"]
    assert devices[0] == "cpu"
    assert devices[1].values == ("cuda",)
    assert [mark.name for mark in devices[1].marks] == ["gpu"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run_script(gpu_check.main)
    assert done.exit_code == 2
    assert "no CUDA GPU" in done.output


def test_the_stacked_form_is_two_launches_per_group_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem, _), *_ = make_operands(LAYER, DEVICE, 0).low_rank
    calls = Mock()
    for owner, name in ((check_cases.F, "linear"), (torch, "bmm")):
        calls.attach_mock(Mock(wraps=getattr(owner, name)), name)
        monkeypatch.setattr(owner, name, getattr(calls, name))
    check_cases._stacked("lowrank_linear_grouped")(problem)
    assert [name for name, *_ in calls.mock_calls] == ["linear", "bmm"]
