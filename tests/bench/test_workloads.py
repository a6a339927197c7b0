from __future__ import annotations

import pytest
import torch

from grasp.bench.workloads import (
    OPS,
    backends,
    compiled,
    low_rank_costs,
    make_problem,
    quantized,
    rotation,
    wrong,
)
from grasp.method.storage import STORAGES
from grasp_kernels import dispatch
from grasp_kernels.shapes import parse_shape
from tests.numerics import relative_error

CPU = torch.device("cpu")
GROUP = parse_shape("48x32r5+48x16r3")


def test_a_single_linear_is_repeated_as_the_op_needs() -> None:
    single = GROUP[:1]
    assert {op: len(OPS[op].fit(single) or ()) for op in OPS} == {
        "lowrank_linear": 1,
        "lowrank_linear_grouped": 3,
        "lowrank_glu": 2,
        "singular_value_grad": 1,
    }


def test_ops_have_only_shapes_that_they_can_take() -> None:
    assert {op for op in OPS if OPS[op].fit(GROUP) is not None} == {"lowrank_linear_grouped"}
    assert OPS["lowrank_glu"].fit(parse_shape("48x32r5+48x32r9")) is not None
    assert OPS["lowrank_glu"].fit(parse_shape("48x32r5+48x32r9+48x32r9")) is None


def test_every_op_of_the_table_is_here() -> None:
    assert tuple(OPS) == dispatch.OPS


@pytest.mark.parametrize("op", OPS)
def test_unfused_dense_and_reference_agree(op: str) -> None:
    shape = OPS[op].fit(GROUP[:1])
    assert shape is not None
    problem = make_problem(op, shape, 7, torch.float32, CPU)
    exact = OPS[op].unfused(problem.map(torch.Tensor.double))
    for run in (OPS[op].unfused, OPS[op].dense, backends(op, shape, problem)[0]["reference"]):
        for got, expected in zip(run(problem), exact, strict=True):
            assert relative_error(got, expected) < 1e-5
            assert 0.1 < got.std() < 10


def test_forms_may_differ_in_a_group() -> None:
    forms = (True, False)
    problem = make_problem("lowrank_linear_grouped", GROUP, 7, torch.float32, CPU, pivoted=forms)
    assert tuple(group.order is not None for group in problem.groups) == forms
    run = backends("lowrank_linear_grouped", GROUP, problem, pivoted=True)[0]["reference"]
    for got, expected in zip(run(problem), OPS["lowrank_linear_grouped"].dense(problem), strict=True):
        assert relative_error(got, expected.double()) < 1e-5
    plain, pivoted = (low_rank_costs("lowrank_linear_grouped", GROUP, 7, 4, flags)[0] for flags in ((), forms))
    assert (plain.bytes - pivoted.bytes, plain.flops - pivoted.flops) == (4 * 5 * 5, 2 * 7 * 5 * 5)


@pytest.mark.parametrize("weights", ["int8", "int4/32", "fp8"])
@pytest.mark.parametrize("pivoted", [False, True])
def test_quantised_operands_are_checked_and_their_bytes_counted(weights: str, pivoted: bool) -> None:
    shape, storages = parse_shape("96x48r16"), (STORAGES[weights],)
    problem = make_problem("lowrank_linear", shape, 3, torch.bfloat16, CPU, pivoted=pivoted)
    stored = quantized(problem, storages)
    kinds = frozenset({weights.partition("/")[0]})
    run = backends("lowrank_linear", shape, stored, pivoted=pivoted, weights=kinds)[0]["reference"]
    assert wrong("lowrank_linear", stored, run) is None
    assert "relative error" in (wrong("lowrank_linear", stored, lambda p: [1.05 * y for y in run(p)]) or "")
    [cost] = low_rank_costs("lowrank_linear", shape, 3, 2, (pivoted,), storages)
    read = [tensor for tensor in stored.tensors() if tensor is not stored.weights[0]]
    assert cost.bytes == sum(tensor.nbytes for tensor in read) + 3 * 48 * 2
    copies = [copy.tensors() for copy in rotation("lowrank_linear", stored, 1 << 14).copies]
    pointers = [tensor.data_ptr() for tensors in copies for tensor in tensors[1:5]]
    assert len(pointers) == len(set(pointers)) == 4 * len(copies) > 4


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_is_found(op: str) -> None:
    shape = OPS[op].fit(GROUP[:1])
    assert shape is not None
    problem = make_problem(op, shape, 7, torch.bfloat16, CPU)
    right = backends(op, shape, problem)[0]["reference"]
    assert wrong(op, problem, right) is None
    assert "relative error" in (wrong(op, problem, lambda p: [1.05 * y for y in right(p)]) or "")


def test_pytorchs_own_gradient_may_round_as_pytorch_does() -> None:
    shape = GROUP[:1]
    problem = make_problem("singular_value_grad", shape, 700, torch.bfloat16, CPU)
    unfused = OPS["singular_value_grad"].unfused
    assert wrong("singular_value_grad", problem, unfused) is not None
    assert wrong("singular_value_grad", problem, unfused, of_package=False) is None
    assert wrong("singular_value_grad", problem, lambda p: [1.05 * y for y in unfused(p)], of_package=False) is not None


@pytest.mark.slow
@pytest.mark.parametrize("pivoted", [False, True])
def test_the_compiled_form_computes_what_the_unfused_one_does(pivoted: bool) -> None:
    problem = make_problem("lowrank_linear", GROUP[:1], 7, torch.float32, CPU, pivoted=pivoted)
    with torch.inference_mode():
        run = compiled("lowrank_linear", problem)
    assert wrong("lowrank_linear", problem, run, of_package=False) is None


@pytest.mark.parametrize("op", OPS)
def test_rotated_copies_share_no_weights_and_are_as_many_as_fit(op: str) -> None:
    shape = OPS[op].fit(GROUP[:1])
    assert shape is not None
    problem = make_problem(op, shape, 2, torch.float32, CPU)
    for dense in (False, op != "singular_value_grad"):
        read = [
            copy.weights if dense else [tensor for group in copy.groups for tensor in (group.U, group.Vh)]
            for copy in rotation(op, problem, 1 << 16, dense=dense).copies
        ]
        pointers = [tensor.data_ptr() for tensors in read for tensor in tensors]
        assert len(pointers) == len(set(pointers))
        copied = problem.tensors() if op == "singular_value_grad" else read[0]
        assert len(read) == (1 << 16) // sum(tensor.nbytes for tensor in copied) > 1
        assert all(torch.equal(*pair) for pair in zip(read[0], read[-1], strict=True))


def test_without_rotation_there_is_one_copy() -> None:
    problem = make_problem("lowrank_linear", GROUP[:1], 2, torch.float32, CPU)
    assert [len(rotation("lowrank_linear", problem, 0, dense=dense).copies) for dense in (False, True)] == [1, 1]


def test_backends_that_cannot_run_give_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dispatch.Backend("absent", {}, lambda: "not built", lambda _: None, lambda _: None)
    monkeypatch.setattr("grasp.bench.workloads.BACKENDS", (absent, dispatch.BACKENDS[-1]))
    problem = make_problem("lowrank_linear", GROUP[:1], 2, torch.float32, CPU)
    runs, reasons = backends("lowrank_linear", GROUP[:1], problem)
    assert list(runs) == ["reference"]
    assert reasons == {"absent": "has no lowrank_linear"}
