from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grasp.bench import conditions
from grasp.bench import ops as bench_ops
from grasp.bench.ops import OpCase, OpsRequest, cases, floor_seconds, recorded_cases
from grasp.bench.recorded import RecordedCall, Recording, WorkloadResult
from grasp.bench.records import NotMeasured, OpResult
from grasp.bench.results import read_results
from grasp.bench.workloads import OPS, Problem, rotation
from grasp.method.storage import STORAGES
from grasp_kernels import roofline
from grasp_kernels.dispatch import backend_missing
from grasp_kernels.shapes import parse_shape
from speedgate.timing import Rotation
from tests.command_line import RunMain

SHAPE = ("--shape", "48x32r5", "--rows", "3", "--dtype", "float32", "--device", "cpu")
QUICK = ("--repetitions", "2", "--rotate-mb", "0", "--no-compiled")


@pytest.fixture
def ops(bench: RunMain) -> RunMain:
    return lambda *arguments: bench("ops", *SHAPE, *QUICK, *arguments)


def test_every_op_is_timed_beside_its_baselines_and_its_floor(ops: RunMain, tmp_path: Path) -> None:
    outcome = ops("--backend", "reference", "--threads", "1", "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "ops.jsonl")
    timed = [record for record in records if isinstance(record, OpResult)]
    assert [(record.op, record.provider) for record in timed] == [
        (op, provider) for op in OPS for provider in ("reference", "unfused", "dense")
    ]
    for record in timed:
        assert record.median_us > 0
        assert record.conditions.threads == 1
        assert record.conditions.torch == torch.__version__
        assert record.speedup_over_dense > 0
        assert record.provider != "unfused" or record.speedup_over_unfused == 1
    assert {record.provider for record in timed if record.floor_us is None} == {"dense"}
    for op in OPS:
        assert op in outcome.out
    left_out = [record for record in records if isinstance(record, NotMeasured)]
    assert {(record.provider, record.not_measured) for record in left_out} == {("compiled", "left out on request")}
    assert "Not measured: compiled lowrank_linear at 48x32r5, M = 3, float32: left out on request" in outcome.text


def test_results_are_added_to_a_file(ops: RunMain, tmp_path: Path) -> None:
    for _ in range(2):
        ops("--op", "lowrank_linear", "--backend", "reference", "-o", tmp_path / "ops.jsonl")
    assert len(read_results(tmp_path / "ops.jsonl")) == 2 * 4


def test_a_document_has_all_that_the_file_has(ops: RunMain, tmp_path: Path, lines: Callable) -> None:
    outcome = ops("--op", "lowrank_linear", "--backend", "reference", "--json", "-o", tmp_path / "ops.jsonl")
    assert json.loads(outcome.out) == {"results": lines(tmp_path / "ops.jsonl")}


def test_a_file_of_something_else_is_refused_before_anything_is_measured(ops: RunMain, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("hello\n")
    outcome = ops("-o", tmp_path / "notes")
    assert outcome.code == 2
    assert "notes, line 1: it is not JSON" in outcome.err
    assert outcome.out == ""
    assert (tmp_path / "notes").read_text() == "hello\n"


def test_a_wrong_provider_is_not_timed_and_fails_the_run(
    ops: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_ops, "wrong", lambda op, problem, run, of_package: "off by one")
    outcome = ops("--op", "lowrank_linear", "--backend", "reference", "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 1
    assert "WRONG: reference lowrank_linear at 48x32r5, M = 3, float32: off by one" in outcome.text
    records = read_results(tmp_path / "ops.jsonl")
    assert [record.provider for record in records if isinstance(record, NotMeasured) and record.wrong] == ["reference"]
    assert [record.provider for record in records if isinstance(record, OpResult)] == ["unfused", "dense"]


def test_a_case_that_does_not_fit_into_memory_costs_no_other_case(
    ops: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rotate(op: str, problem: Problem, *arguments: int, dense: bool = False) -> Rotation[Problem]:
        if problem.x.shape[0] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rotation(op, problem, *arguments, dense=dense)

    monkeypatch.setattr(bench_ops, "rotation", rotate)
    outcome = ops("--op", "lowrank_linear", "--backend", "reference", "--rows", "4,3", "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "ops.jsonl")
    assert [record.rows for record in records if isinstance(record, OpResult)] == [3, 3, 3]
    reason = "Not measured: * lowrank_linear at 48x32r5, M = 4, float32: the device has too little memory"
    assert reason in outcome.text


def test_what_is_not_measured_is_said(ops: RunMain) -> None:
    outcome = ops("--op", "lowrank_linear", "--shape", "48x32r5+48x16r3", "--backend", "reference")
    assert outcome.code == 0
    assert "Not measured: * lowrank_linear at 48x32r5+48x16r3, M = 3, float32: " in outcome.text


def test_quantised_factors_are_timed_beside_the_floating_ones(ops: RunMain, tmp_path: Path) -> None:
    weights = ("--weights", "int8", "--weights", "int4/32", "--form", "pivoted")
    outcome = ops("--backend", "reference", "--backend", "cpu", *weights, "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 0, outcome.err
    timed = [record for record in read_results(tmp_path / "ops.jsonl") if isinstance(record, OpResult)]
    built = ["cpu"] if backend_missing("cpu") is None else []
    providers = ("reference", "floating", "unfused", "dense", *built)
    expected = {(op, kind, name) for op in OPS for kind in ("int8", "int4/32") for name in providers}
    assert {(line.op, line.weights, line.provider) for line in timed} == {
        case for case in expected if case[0] != "singular_value_grad"
    }
    assert {line.form for line in timed} == {"pivoted"}
    floors = {line.provider: line.floor_us or 0 for line in timed if line.weights == "int8"}
    assert 0 < floors["reference"] <= floors["floating"] == floors["unfused"]
    assert "singular_value_grad at 48x32r5, M = 3, float32: the op takes floating factors" in outcome.text
    assert "form pivoted; weights int4/32" in outcome.text


def test_a_compiler_that_is_not_there_is_said(bench: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(op: str, problem: object) -> None:
        raise RuntimeError("No working C++\ncompiler found")

    monkeypatch.setattr(bench_ops, "compiled", fail)
    outcome = bench("ops", *SHAPE, *QUICK[:-1], "--op", "lowrank_linear", "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 0
    reasons = {
        record.provider: record.not_measured for record in read_results(tmp_path / "ops.jsonl") if record.kind != "op"
    }  # type: ignore[union-attr]
    assert reasons["compiled"] == "torch.compile: No working C++ compiler found"


@pytest.mark.slow
def test_the_compiled_form_is_timed(bench: RunMain, tmp_path: Path) -> None:
    outcome = bench("ops", *SHAPE, *QUICK[:-1], "--op", "lowrank_linear", "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 0, outcome.err
    providers = [record.provider for record in read_results(tmp_path / "ops.jsonl") if isinstance(record, OpResult)]
    assert "compiled" in providers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "matmul"), "unknown op 'matmul'; expected one of lowrank_linear"),
        (("--dtype", "int8"), "unknown dtype 'int8'; expected one of float32"),
        (("--backend", "warp"), "unknown backend 'warp'; expected one of"),
        (("--weights", "int3"), "unknown weights 'int3'; expected one of int8"),
        (("--form", "square"), "form 'square' is not factored or pivoted"),
        (("--shape", "48"), "shape '48' is not KxNrR"),
        (("--device", "tpu"), "device must be a name such as cpu"),
        (("--rows", "0"), "rows must be positive numbers"),
        (("--model", "llama-2-7b"), "got both shapes and a model"),
        (("--retain-ratio", "0.1"), "--retain-ratio sets the ranks of a model's shapes"),
        (("-o", "/absent/ops.jsonl"), "there is no folder /absent"),
    ],
)
def test_bad_arguments_are_one_clear_line(ops: RunMain, arguments: tuple[str, str], message: str) -> None:
    outcome = ops(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err


CALLS = (
    RecordedCall("lowrank_linear", "48x32r5", "pivoted", 3, "float32", "cpu", False, 40),
    RecordedCall("lowrank_linear_grouped", "48x32r5+48x16r3", "pivoted+factored", 2, "bfloat16", "cpu", False, 7),
    RecordedCall("lowrank_linear_grouped", "48x32r5+48x16r3", "pivoted+factored", 2, "bfloat16", "cpu", True, 1),
    RecordedCall("lowrank_linear", "48x32r32", "pivoted", 3, "float32", "cpu", False, 9),  # a dense linear
    RecordedCall("lowrank_linear", "48x32r5", "factored", 3, "float64", "cpu", False, 2),
)
QUANTIZED_CALLS = (
    RecordedCall("lowrank_linear", "48x32r32", "pivoted", 1, "bfloat16", "cpu", False, 9, "int4/32"),  # a dense linear
    RecordedCall(
        "lowrank_linear_grouped", "48x32r5+48x16r3", "factored", 1, "bfloat16", "cpu", False, 7, "int8+floating"
    ),
    RecordedCall(
        "lowrank_linear_grouped", "48x32r5+48x16r3", "factored", 1, "bfloat16", "cpu", True, 2, "int8+floating"
    ),
)


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    (tmp_path / "w.json").write_text(json.dumps(Recording(1, CALLS).to_dict()))
    return tmp_path / "w.json"


def test_a_recorded_workload_is_timed_and_weighted(bench: RunMain, workload: Path, tmp_path: Path) -> None:
    outcome = bench("ops", "--workload", workload, *QUICK, "--backend", "reference", "-o", tmp_path / "ops.jsonl")
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "ops.jsonl")
    timed = {(line.shape, line.form, line.rows, line.dtype, line.calls) for line in records if line.kind == "op"}
    assert timed == {
        ("48x32r5", "pivoted", 3, "float32", 40),
        ("48x32r32", "pivoted", 3, "float32", 9),
        ("48x32r5+48x16r3", "pivoted+factored", 2, "bfloat16", 8),
    }
    totals = {line.provider: line for line in records if isinstance(line, WorkloadResult)}
    assert totals.keys() == {"reference", "unfused", "dense"}  # auto chooses cpu, which is not timed
    assert (totals["dense"].calls, totals["dense"].different) == (57, 3)
    assert "Not measured: * lowrank_linear at 48x32r5, M = 3, float64: 2 calls in float64" in outcome.text
    assert outcome.out.index("Calls of a workload") < outcome.out.index("workload w.json; calls 57; different calls 3")


def test_quantised_calls_are_timed_beside_floating_ones(bench: RunMain, tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps(Recording(1, QUANTIZED_CALLS).to_dict()))
    options = (*QUICK, "--backend", "reference", "-o", tmp_path / "ops.jsonl")
    outcome = bench("ops", "--workload", tmp_path / "w.json", *options)
    assert outcome.code == 0, outcome.err
    records = read_results(tmp_path / "ops.jsonl")
    timed = {(line.shape, line.weights, line.calls) for line in records if isinstance(line, OpResult)}
    assert timed == {("48x32r32", "int4/32", 9), ("48x32r5+48x16r3", "int8+floating", 9)}
    totals = {line.provider for line in records if isinstance(line, WorkloadResult)}
    assert totals == {"reference", "floating", "unfused", "dense"}


def test_calls_of_a_workload_can_be_chosen(workload: Path) -> None:
    device, todo = recorded_cases(OpsRequest(rows=(2,), device="cuda"), workload)
    assert (device, [(case.rows, case.calls) for case in todo if isinstance(case, OpCase)]) == ("cuda", [(2, 8)])
    with pytest.raises(ValueError, match="none of the 5 different calls"):
        recorded_cases(OpsRequest(rows=(9,)), workload)
    with pytest.raises(ValueError, match="got a workload, and shapes or a model"):
        recorded_cases(OpsRequest(shapes=("48x32r5",)), workload)
    for options in ({"form": "pivoted"}, {"weights": ("int8",)}):
        with pytest.raises(ValueError, match="got a workload, whose calls have forms"):
            recorded_cases(OpsRequest(**options), workload)
    workload.write_text(json.dumps(Recording(1, (CALLS[0], replace(CALLS[1], device="cuda"))).to_dict()))
    with pytest.raises(ValueError, match="calls on cpu and cuda; choose a device"):
        recorded_cases(OpsRequest(), workload)


def test_a_models_calls_are_cases_of_the_ops_that_get_them() -> None:
    request = OpsRequest(ops=("lowrank_glu",), model="smollm2-135m", rows=(1, 4), dtypes=("bfloat16",))
    glu = parse_shape("576x1536r41+576x1536r41")
    assert list(cases(request)) == [OpCase("lowrank_glu", glu, rows, torch.bfloat16, "smollm2-135m") for rows in (1, 4)]


def test_floors_are_of_what_a_provider_reads() -> None:
    card = roofline.Card("a card", flops=1e30, bandwidth=1e9)
    case = OpCase("lowrank_linear", parse_shape("4096x4096r204"), 1, torch.float32)
    low_rank, dense = (floor_seconds(case, name, card) for name in ("reference", "dense"))
    assert low_rank == pytest.approx((204 * 8192 + 8192) * 4 / 1e9)
    assert dense == pytest.approx((4096 * 4096 + 8192) * 4 / 1e9)
    pivoted = floor_seconds(case._replace(pivoted=(True,)), "reference", card)
    assert pivoted == pytest.approx((204 * (8192 - 204) + 8192) * 4 / 1e9)
    assert floor_seconds(case._replace(op="singular_value_grad"), "dense", card) is None
    int8 = case._replace(storages=(STORAGES["int8"],))
    assert floor_seconds(int8, "cpu", card) == pytest.approx((204 * 8192 + 4 * (204 + 4096) + 8192 * 4) / 1e9)
    assert [floor_seconds(int8, name, card) for name in ("floating", "dense")] == [low_rank, dense]


def test_conditions_know_the_commit_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    now = conditions.conditions(roofline.Card("a card", flops=1, bandwidth=1), device)
    assert (now.commit is None) == (now.dirty is None)
    if now.commit is not None:
        assert len(now.commit) == 40
    assert conditions.device_name(device)
    assert now.instruction_sets is not None
    assert ("portable" in now.instruction_sets) == (backend_missing("cpu") is None)
    monkeypatch.setattr(conditions, "ROOT", conditions.ROOT / "grasp")  # in a checkout, but not one itself
    assert conditions.commit() is None


def test_a_bandwidth_is_measured_where_little_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(conditions, "free_bytes", lambda device: 1 << 18)
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 30)
    monkeypatch.setattr(conditions, "READERS", [lambda matrix: sizes.append(matrix.nbytes)])
    assert conditions.measure_card(torch.device("cpu"), torch.float32).bandwidth > 0
    assert set(sizes) == {1 << 16}
