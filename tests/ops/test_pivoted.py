"""Pivoted factors in every op: ``weight[order] = cat([Vh, U @ Vh])``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels import (
    Factors,
    cpu,
    direct,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    ops,
    pack_factors,
)
from grasp_kernels.dispatch import OpCall, backend_missing, objection
from tests.definitions import linear
from tests.ops.inputs import BACKENDS, DTYPES, LAYOUTS, normal, pivoted, seeded, tokens
from tests.ops.linears import check_linear
from tests.pairwise import Case, label, pairwise

K, N, R = 24, 16, 5
CASES = pairwise(
    rows=(33, 7, 1, 0),
    N=(63, 128, 300, 16),
    K=(128, 63, 16),
    rank=("all", "most", 5, 1),
    dtype=DTYPES,
    layout=LAYOUTS,
    ndim=(3, 2),
    bias=(True, False),
    backend=tuple(row.name for row in BACKENDS if "lowrank_linear" in row.functions),
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_backend_is_as_accurate_as_linear(case: Case) -> None:
    rank = {"all": case["N"], "most": case["N"] - 1}.get(case["rank"], case["rank"])
    options = {"dtype": case["dtype"], "layout": case["layout"]}
    group = pivoted(case["N"], case["K"], rank, seeded(), bias=case["bias"], **options)
    x = tokens(case["rows"], case["K"], case["ndim"], seeded(1), **options)
    row = next(row for row in BACKENDS if row.name == case["backend"])
    call = OpCall("lowrank_linear", x.device, x.dtype, case["rows"], rank, pivoted=True)
    if (reason := objection(row, call)) is not None:
        pytest.skip(f"{row.name}: {reason}")
    y = lowrank_linear(x, *group, backend=row.name)
    assert (y.shape, y.dtype) == ((*x.shape[:-1], case["N"]), x.dtype)
    check_linear(y, x, group)


@pytest.mark.parametrize("rows", [1, 2, 5, 40, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", [name for name in cpu.INSTRUCTION_SETS if name != "auto"])
def test_every_instruction_set(instruction_set: str, dtype: torch.dtype, rows: int) -> None:
    if (reason := backend_missing("cpu")) is not None or not cpu.supports(instruction_set):
        pytest.skip(reason or f"this processor has no {instruction_set}")
    x = normal((rows, 130), seeded(1), dtype=dtype)
    for n, rank in ((201, 77), (18, 17), (9, 1), (70, 70)):
        group = pivoted(n, 130, rank, seeded(), bias=n < 20, dtype=dtype)
        (y,) = cpu.run(x, (group,), instruction_set=instruction_set)
        check_linear(y, x, group)


@pytest.mark.skipif(backend_missing("cpu") is not None, reason="the CPU kernels are not built")
def test_pivoted_calls_take_the_direct_path(monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups = (
        normal((2, 3, K), seeded(), dtype=torch.float32),
        [
            pivoted(N, K, R, seeded(), bias=True, dtype=torch.float32),
            pivoted(N + 1, K, R + 1, seeded(), dtype=torch.float32),
            Factors(torch.ones(4, 2), torch.ones(2), torch.ones(2, K)),
        ],
    )
    expected = [lowrank_linear(x, *group, backend="reference") for group in groups]

    def fail(*_: object) -> None:
        raise AssertionError("the call left the direct path")

    monkeypatch.setattr(ops, "check_factors", fail)
    for group, y in zip(groups, expected, strict=True):
        torch.testing.assert_close(lowrank_linear(x, *group), y, rtol=1e-4, atol=1e-5)
    for got, y in zip(lowrank_linear_grouped(x, groups), expected, strict=True):
        torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)
    for bad in (groups[0].order.long(), groups[0].order[1:], groups[0].order.repeat(2)[::2]):  # type: ignore[union-attr]
        assert direct.linear(x, *groups[0]._replace(order=bad), "auto") is None


ENTRIES = {"-1": -1, "16": N, "2147483647": 2**31 - 1, "[0-9]+ twice": None}  # in the message → the last of an order
OPS: dict[str, Callable[[Tensor, Factors, Factors, str], Any]] = {
    "linear": lambda x, group, _, backend: lowrank_linear(x, *group, backend=backend),
    "grouped": lambda x, group, good, backend: lowrank_linear_grouped(x, [good, group], backend=backend),
    "merged": lambda x, group, good, backend: lowrank_linear_merged(x, [good, group], backend=backend),
    "gate": lambda x, group, good, backend: lowrank_glu(x, group, good, backend=backend),
    "up": lambda x, group, good, backend: lowrank_glu(x, good, group, backend=backend),
    "registered": lambda x, group, _, backend: torch.ops.grasp.lowrank_linear(x, *group, backend),
    "recorded": lambda x, group, _, backend: lowrank_linear(x.clone().requires_grad_(), *group, backend=backend),
}


def with_last(group: Factors, entry: int | None) -> Factors:
    """The group with another last entry in its order, or with its first entry there too."""
    assert group.order is not None
    order = group.order.clone()
    order[-1] = order[0] if entry is None else entry
    return group._replace(order=order)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("got", ENTRIES)
@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "reference"])
def test_an_order_that_is_no_permutation_is_refused(backend: str, got: str, op: str) -> None:
    if backend != "auto" and (missing := backend_missing(backend)) is not None:
        pytest.skip(missing)
    good = pivoted(N, K, R, seeded(), dtype=torch.float32)
    for rows in (1, 40):
        with pytest.raises(ValueError, match=rf"order must have each of 0\.\.15 once.* got {got}\. "):
            OPS[op](torch.ones(rows, K), with_last(good, ENTRIES[got]), good, backend)


def test_a_compiled_call_refuses_it_too() -> None:
    good = pivoted(N, K, R, seeded(), dtype=torch.float32)
    compiled = torch.compile(lambda x, *group: lowrank_linear(x, *group), backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(3, K), *good).shape == (3, N)
    with pytest.raises(ValueError, match="order must have each"):
        compiled(torch.ones(3, K), *with_last(good, None))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_order_is_read_again_after_a_change_in_place(backend: str) -> None:
    group = pivoted(N, K, R, seeded(), dtype=torch.float32)
    assert group.order is not None
    assert lowrank_linear(torch.ones(1, K), *group, backend=backend).shape == (1, N)
    with torch.no_grad():
        group.order[2] = group.order[3]
    with pytest.raises(ValueError, match="twice"):
        lowrank_linear(torch.ones(1, K), *group, backend=backend)


def test_auto_takes_the_cpu_kernels_for_any_number_of_rows() -> None:
    row = next(row for row in BACKENDS if row.name == "cpu")
    call = OpCall("lowrank_linear", torch.device("cpu"), torch.float32, rows=4096, rank=R)
    assert row.avoids(call) is not None
    assert row.avoids(call._replace(pivoted=True)) is None


def test_they_have_no_packed_form() -> None:
    with pytest.raises(ValueError, match="pivoted factors have no packed form"):
        pack_factors([pivoted(N, K, R, seeded())])


# --- the registered ops -----------------------------------------------------------------------------------------------


def mixed(x: Tensor, first: Factors, second: Factors) -> tuple[Tensor, ...]:
    return lowrank_linear_grouped(x, [first, second._replace(order=None, bias=None), second])


CALLS: dict[str, Callable[[Tensor, Factors, Factors], Any]] = {
    "lowrank_linear": lambda x, first, second: lowrank_linear(x, *first),
    "lowrank_linear_grouped": mixed,
    "lowrank_linear_merged": lambda x, first, second: lowrank_linear_merged(
        x, [first, second._replace(order=None, bias=None), second]
    ),
    "lowrank_glu": lambda x, first, second: lowrank_glu(x, first, second),
}


def arguments(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Tensor, Factors, Factors]:
    x = normal((2, 3, K), seeded(3), dtype=dtype).requires_grad_(requires_grad)
    groups = pivoted(N, K, R, seeded(1), bias=True, dtype=dtype), pivoted(N, K, R + 1, seeded(2), dtype=dtype)
    for tensor in (tensor for group in groups for tensor in group[:4] if tensor is not None):
        tensor.requires_grad_(requires_grad)
    return x, *groups


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def plain(op: str, x: Tensor, first: Factors, second: Factors) -> list[Tensor]:
    """The op, differentiable, without the op."""
    if op == "lowrank_linear":
        return [linear(x, first)]
    if op == "lowrank_glu":
        return [F.silu(linear(x, first)) * linear(x, second)]
    outputs = [linear(x, first), F.linear(F.linear(x, second.Vh), second.U), linear(x, second)]
    return [torch.cat(outputs, -1)] if op == "lowrank_linear_merged" else outputs


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_values_and_gradients_are_those_of_the_formula_and_of_compiled_calls(op: str, compiled: bool) -> None:
    torch.compiler.reset()
    other = torch.compile(CALLS[op], fullgraph=True, backend="aot_eager") if compiled else partial(plain, op)
    results = []
    for run in (CALLS[op], other):
        x, first, second = arguments(requires_grad=True)
        outputs = flat(run(x, first, second))
        sum(y.sin().sum() for y in outputs).backward()  # type: ignore[union-attr]
        leaves = [x, *first[:4], *(second[:4] if op != "lowrank_linear" else ())]
        results.append([*outputs, *(tensor.grad for tensor in leaves if tensor is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_opcheck_and_second_derivatives() -> None:
    x, first, second = arguments(requires_grad=True)
    torch.library.opcheck(torch.ops.grasp.lowrank_linear.default, (x, *first, "auto"))
    columns = [[first.U, second.U], [], [first.Vh, second.Vh], [first.bias], [first.order, second.order], [], []]
    present = [True, False, True, True, True, False, False, True, False, True, False, True, False, False]
    torch.library.opcheck(torch.ops.grasp.lowrank_linear_grouped.default, (x, *columns, present, "auto"))
    x, first, _ = arguments()
    leaves = [t.requires_grad_() for t in (x[:1, :2], first.U, first.Vh, first.bias) if t is not None]

    def run(x: Tensor, U: Tensor, Vh: Tensor, bias: Tensor) -> Tensor:
        return lowrank_linear(x, U, None, Vh, bias, first.order, backend="reference")

    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_export_meta_and_autocast() -> None:
    x, first, second = arguments(torch.float32)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lowrank_linear(x, *first)

    y = lowrank_linear(x, *first)
    torch.testing.assert_close(torch.export.export(Module(), (x,)).module()(x), y)
    meta = [Factors(*(None if t is None else t.to("meta") for t in group)) for group in (first, second)]
    for call in CALLS.values():
        shapes = [out.shape for out in flat(call(x.to("meta"), *meta))]
        assert shapes == [out.shape for out in flat(call(x, first, second))]
    with torch.autocast("cpu", torch.bfloat16):
        cast = lowrank_linear(x, *first)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), y, rtol=0.05, atol=0.05)
